"""The part of the command line that is about clusters: send a job to one, follow it, look at it, stop it. Prints, like `cli`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.commands.options import AsJson, Dates, JobPath
from pipeline.commands.printing import print_json, put, say
from pipeline.environment import DEFAULT_ADDRESS, Address, cluster_address, set_ray_environment
from pipeline.errors import ExitCode, Interrupted, JobError, NightlabelError, Temporary

if TYPE_CHECKING:
    from pipeline.ship import Parcel
    from pipeline.spec import Job
    from pipeline.submit import Connection, Submission

JobOrId = Annotated[
    str, typer.Argument(metavar="JOB", help="Job file, of which the newest attempt is meant, or a submission id.")
]
AtAddress = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Speak to another machine without a token (RAY_AUTH_TOKEN).")]


def submit(
    job: JobPath,
    date: Dates = None,
    address: AtAddress = DEFAULT_ADDRESS,
    insecure: Insecure = False,
    *,
    installed: Annotated[
        bool, typer.Option("--installed", help="The cluster's image holds nightlabel: ship only the job file.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once the cluster has the job.")] = False,
) -> None:
    """Run a labelling job on a Ray cluster, print its log and end with its exit code. A job that runs there already is joined."""
    where = cluster_address(address, insecure=insecure)
    loaded, parcel = _parcel(job, date, loopback=where.loopback, code=not installed)
    connection = _connect(where)
    if not installed:
        connection.check_version()
    attempt, new = connection.submit(parcel)
    size = f"{len(parcel.archive) / 1000:,.0f} kB"
    say(f"{f'submitted {size} as' if new else 'joining'} {attempt.id} at {connection.url}")
    if no_wait:
        put(attempt.id)
        return
    _follow(connection, attempt.id, loaded)


def wait(job: JobOrId, date: Dates = None, address: AtAddress = DEFAULT_ADDRESS, insecure: Insecure = False) -> None:
    """Follow a submitted job to its end, with its log and its exit code."""
    connection, attempt, loaded = _find(cluster_address(address, insecure=insecure), job, date)
    _follow(connection, attempt.id, loaded)


def logs(
    job: JobOrId,
    date: Dates = None,
    address: AtAddress = DEFAULT_ADDRESS,
    insecure: Insecure = False,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print what a submitted job has said."""
    connection, attempt, _ = _find(cluster_address(address, insecure=insecure), job, date)
    for text in connection.follow(attempt.id) if follow else [connection.logs(attempt.id)]:
        typer.echo(text, nl=False)


def status(
    job: JobOrId, date: Dates = None, address: AtAddress = DEFAULT_ADDRESS, insecure: Insecure = False, as_json: AsJson = False
) -> None:
    """Print how a submitted job stands, as Ray has it; for a job file also how its output stands, which is what counts."""
    _, attempt, loaded = _find(cluster_address(address, insecure=insecure), job, date)
    truths = [_truth(each) for each in loaded]
    if as_json:
        print_json(asdict(attempt) | {"output": truths})
        return
    put(_line(attempt))
    for truth in truths:
        put(f"output  {truth}")


def stop(job: JobOrId, date: Dates = None, address: AtAddress = DEFAULT_ADDRESS, insecure: Insecure = False) -> None:
    """Stop a submitted job. What it has committed stays, and submitting it again goes on from there."""
    connection, attempt, _ = _find(cluster_address(address, insecure=insecure), job, date)
    stopped = connection.stop(attempt.id)
    put(_line(stopped))
    if not stopped.over:
        raise Temporary(f"{attempt.id} has not ended yet", do="Look again with nightlabel status")


def list_(address: AtAddress = DEFAULT_ADDRESS, insecure: Insecure = False, as_json: AsJson = False) -> None:
    """List what nightlabel has submitted to a cluster."""
    attempts = _connect(cluster_address(address, insecure=insecure)).attempts()
    if as_json:
        print_json({"jobs": [asdict(attempt) for attempt in attempts]})
        return
    for attempt in attempts:
        put(_line(attempt))


def _connect(where: Address) -> Connection:
    set_ray_environment(cluster=True)
    from pipeline.submit import Connection  # Ray's client, 0.5 s; neither Ray Data nor torch

    return Connection(where)


def _parcel(path: Path, date: str | None, *, loopback: bool, code: bool) -> tuple[tuple[Job, ...], Parcel]:
    """(the job for every day that is asked for, what is shipped)."""
    from pipeline.job.jobfile import at_day, load_label_template
    from pipeline.ship import pack

    template = load_label_template(path, date=date)
    parcel = pack(template, file=str(path), date=date, loopback=loopback, code=code)
    return tuple(at_day(template, day) for day in parcel.days), parcel


def _find(where: Address, job: str, date: str | None) -> tuple[Connection, Submission, tuple[Job, ...]]:
    """The attempt that is meant, and its jobs when a file was given, which is read before the cluster is asked."""
    if not job.endswith((".yaml", ".yml")) and not Path(job).is_file():  # an id has no dot
        connection = _connect(where)
        return connection, connection.attempt(job), ()
    loaded, parcel = _parcel(Path(job), date, loopback=where.loopback, code=False)
    connection = _connect(where)
    attempts = connection.attempts(parcel.name)
    if not attempts:
        do = f"Its output: {'; '.join(map(_truth, loaded))}"
        raise JobError(f"{connection.url} knows no attempt at {parcel.name}", need="a job that was submitted as it is now", do=do)
    return connection, attempts[-1], loaded


def _follow(connection: Connection, submission_id: str, jobs: tuple[Job, ...]) -> NoReturn:
    try:
        for text in connection.follow(submission_id):
            typer.echo(text, nl=False)
        attempt = connection.attempt(submission_id)
        code = attempt.exit_code()
    except Interrupted as error:
        do = f"The job goes on: nightlabel wait {submission_id} --address {connection.url} joins it, nightlabel stop ends it"
        raise Interrupted(error.got, signal_number=error.exit_code - 128, do=do) from None
    except Temporary:  # Ray has lost the driver, not what it did
        if not jobs or not all(map(_complete, jobs)):
            raise
        say("the cluster has lost the driver; the job is complete all the same, the manifest is there")
        sys.exit(ExitCode.DONE)
    say(f"ended   {_line(attempt)}")
    sys.exit(code)


def _line(attempt: Submission) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started)) if attempt.started else "not yet"
    seconds = (attempt.ended or time.time()) - attempt.started if attempt.started else 0.0
    code = f", exit code {attempt.code}" if attempt.code is not None else ""
    return f"{attempt.id}  {attempt.status}{code}, started {when}, {seconds:,.0f} s"


def _complete(job: Job) -> bool:
    try:
        return _plan(job).run_id is None
    except NightlabelError:
        return False


def _truth(job: Job) -> str:
    """How the job's output stands, as its log of runs says it; a sentence when the store cannot be asked from here."""
    try:
        plan = _plan(job)
    except NightlabelError as error:
        return f"cannot be looked at from here ({str(error).rstrip('.')})"
    if plan.run_id is None:
        return "complete, every input is part of a run with its manifest"
    run = f"run {plan.run_id} has no manifest" if plan.run_id != "new" else "no run has begun with what is not labelled"
    return f"{run}, {len(plan.committed):,} of {len(plan.units):,} units are there"


def _plan(job: Job) -> Any:
    from pipeline.start import load_model, plan_job

    return plan_job(job, load_model(job, weights=False), write=False, some=False)[1]
