"""The command line: the only place that prints results, exits and catches."""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the imports below: "first prediction after" counts from the command

import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.commands import cluster as cli_cluster
from pipeline.commands import kube as cli_kube
from pipeline.commands import model as cli_model
from pipeline.commands import nightly as cli_nightly
from pipeline.commands.interrupt import end_by_signals
from pipeline.commands.options import Again, AsJson, Date, Dates, IfRunning, JobPath, Version
from pipeline.commands.printing import outlive_readers, print_json, put, say
from pipeline.errors import ExitCode, Interrupted, NightlabelError

if TYPE_CHECKING:
    from pipeline.job.jobfile import PreparationJob
    from pipeline.plan import Plan
    from pipeline.prepare.outcome import Outcome

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

MetricsTo = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        envvar="NIGHTLABEL_METRICS",
        help="Tell Prometheus how the run goes: a Pushgateway's URL, or the folder of node_exporter's textfile collector.",
    ),
]


@app.callback()
def nightlabel(version: Version = False) -> None:
    """Bulk image labelling: every input ends as a row, labelled or failed with a reason, exactly once."""


def run(
    job: JobPath,
    *,
    date: Dates = None,
    if_running: IfRunning = None,
    again: Again = False,
    as_json: AsJson = False,
    metrics: MetricsTo = None,
) -> None:
    """Do what the job says: label, finetune, distill, quantize or evaluate; go on where an earlier run stopped."""
    from pipeline.job.jobfile import asked_day, at_day, load_template
    from pipeline.prometheus import Metrics
    from pipeline.spec import Job

    template = load_template(job, date=date)
    telling = Metrics(metrics, template, say=say)
    if not isinstance(template, Job):
        day = asked_day(template, date, name=str(job))
        command = shlex.join(["nightlabel", "run", str(job), *(["--date", day] if day else [])])
        with telling:
            _run_preparation(at_day(template, day, name=str(job)), as_json=as_json, command=command)
    from pipeline.nights.nightly import asked

    days = asked(template, date, name=str(job), again=again)
    nights = cli_nightly.label_nights(template, days, if_running=if_running, telling=telling, started=STARTED)
    sys.exit(cli_nightly.print_nights(nights, as_json=as_json, path=job))


def _run_preparation(job: PreparationJob, *, as_json: bool, command: str) -> NoReturn:
    from importlib import import_module

    from pipeline.extras import check_installed

    check_installed(job.kind)
    outcome: Outcome = import_module(f"pipeline.prepare.{job.kind}").run_job(job, say=say, command=command)
    if as_json:
        print_json(dict(outcome.facts))
    else:
        for line in outcome.lines:
            put(line)
    sys.exit(outcome.exit_code)


def plan(job: JobPath, date: Date = None, as_json: AsJson = False) -> None:
    """Show what a run would do. Starts nothing and writes nothing. Exit code 3 where an input is missing, as a run's is."""
    from pipeline.job.jobfile import load_label_job
    from pipeline.start import load_model, plan_job
    from pipeline.tables.publish import check_columns, check_publisher
    from pipeline.unit import bytes_of

    loaded = load_label_job(job, date=date)
    check_publisher(loaded)
    check_columns(loaded)
    told: dict[str, dict[str, Any]] = {}
    artifact = load_model(loaded, weights=False)
    log, planned = plan_job(loaded, artifact, write=False, tell=lambda event, **fields: told.update({event: fields}))
    ignored, missing = told.get("ignored", {}), told.get("missing", {}).get("errors", {})
    parts = [part for unit in planned.units for part in unit.parts]
    facts = {
        "where": log.root,
        "run": planned.run_id,
        "units": len(planned.units),
        "units_done": len(planned.committed),
        "inputs": len({part.uri for part in parts}),
        "bytes": bytes_of(planned.units),
        "todo_bytes": bytes_of(planned.todo),
        "cpus": loaded.resources.cpus,
        "gpus": loaded.resources.gpus,
        "ignored": ignored.get("suffixes", {}),
        "missing": list(missing),
        "exit_code": ExitCode.INPUT if missing else ExitCode.DONE,
    }
    if as_json:
        print_json(facts | {"todo": [{"unit": unit.id, "inputs": [part.uri for part in unit.parts]} for unit in planned.todo]})
    else:
        for line in (*_plan_lines(planned, facts), *(f"missing {error}" for error in missing.values())):
            put(line)
        if ignored:
            put(f"ignored {ignored['text']}, not of the input's format")
        put(f"where   {log.root}")
    sys.exit(facts["exit_code"])


def _plan_lines(planned: Plan, facts: dict[str, Any]) -> Iterator[str]:
    from pipeline.report import many

    if planned.run_id is None:
        yield f"nothing to do: every {'other ' if facts['missing'] else ''}input is labelled"
        return
    size = f"{many(facts['inputs'], 'input')}, {facts['bytes'] / 1e6:,.1f} MB"
    yield f"{many(facts['units'], 'unit')} of {size}; {facts['units_done']:,} of them done"
    yield f"run     {planned.run_id}, asks for {facts['cpus']:g} CPUs and {facts['gpus']:g} GPUs"
    for unit in planned.todo[:10]:
        first = unit.parts[0]
        rows = f" rows {first.start:,}-{first.stop:,}" if first.stop is not None else ""
        yield f"todo    {unit.id[:8]}  {first.uri}{rows}" + (f" and {len(unit.parts) - 1} more" if len(unit.parts) > 1 else "")
    if len(planned.todo) > 10:
        yield f"todo    and {len(planned.todo) - 10:,} more units; --json lists them all"


def validate(
    job: JobPath,
    date: Date = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every row too, as long as that takes: has anything rotted?")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the output: footers, counts, manifests, no input twice. Exit code 6 if not so; unfinished runs are only named."""
    from pipeline.footer import totals
    from pipeline.job.jobfile import load_label_job
    from pipeline.nights.generation import open_retries, validate_all
    from pipeline.start import load_model, open_log, present
    from pipeline.storage import open_input
    from pipeline.verify import open_runs

    loaded = load_label_job(job, date=date)
    artifact = load_model(loaded, weights=False)
    log = open_log(loaded, artifact)
    footers, problems = validate_all(log, deep=deep)
    unfinished = [*open_runs(log, partial(present, open_input(loaded.input))), *open_retries(log)]
    sums = totals(footers)
    if as_json:
        counts = {"units": sums.units, "rows_in": sums.rows_in, "ok": sums.ok, "failed": sums.failed}
        print_json({"where": log.root, **counts, "unfinished": unfinished, "problems": problems})
    else:
        for line in [*(f"wrong   {problem}" for problem in problems), *(f"open    {run}" for run in unfinished)]:
            put(line)
        adds_up = f"{sums.rows_in:,} in = {sums.ok:,} ok + {sums.failed:,} failed, {sums.units:,} units"
        put(f"{'NOT VALID' if problems else 'valid'}: {adds_up}")
        put(f"where   {log.root}")
    sys.exit(ExitCode.CONFLICT if problems else ExitCode.DONE)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The field reference, as in jobs/README.md.")] = False,
) -> None:
    """Print the JSON schema of a job file, for editors."""
    from pipeline.job.reference import json_schema, reference

    typer.echo(reference() if markdown else json_schema(), nl=False)


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the demo's data, model and labels; a new one, or an earlier demo's.")
    ] = Path("demo-out"),
    as_json: AsJson = False,
) -> None:
    """Train a small model on handwritten digits and label the rest: a few minutes, no network, no account, no GPU."""
    from pipeline.extras import check_installed

    check_installed("demo")
    from pipeline.demo import run_demo
    from pipeline.screen import Screen

    def tell(text: str) -> None:
        (say if as_json else put)(text)

    with Screen() as screen:
        outcome = run_demo(out, say=tell, observe=screen.observe)
    cli_nightly.print_receipt(outcome.receipt, as_json=as_json, job=shlex.quote(str(out / "job.yaml")))
    for line in outcome.lines():
        tell(line)
    sys.exit(outcome.exit_code)


#: As --help lists them: what a user needs first comes first.
COMMANDS: tuple[Callable[..., None], ...] = (
    *(run, plan, validate, cli_nightly.retry_failed),
    *(cli_cluster.submit, cli_cluster.status, cli_cluster.logs, cli_cluster.wait, cli_cluster.stop, cli_cluster.list_),
    *(cli_kube.apply, cli_kube.render),
    *(demo, schema),
)
for command in COMMANDS:
    app.command(command.__name__.rstrip("_").replace("_", "-"))(command)
app.add_typer(cli_model.prepare, name="prepare")
app.add_typer(cli_model.model, name="model")


def main() -> None:
    """Entry point of `nightlabel`: exit codes as in the README, one sentence for what a user can act on."""
    end_by_signals()
    if "logs" not in sys.argv[1:2]:  # which has nothing else to do
        outlive_readers()
    try:
        app()
    except (NightlabelError, Interrupted) as error:
        if "--json" in sys.argv:
            print_json({"error": str(error), "error_class": type(error).__name__, "exit_code": error.exit_code})
        typer.echo(f"nightlabel: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001  # the one place: what gets here is a bug of ours
        traceback.print_exc()
        typer.echo("nightlabel: this is a bug; please report it with the lines above. What is committed stays.", err=True)
        sys.exit(ExitCode.BUG)
