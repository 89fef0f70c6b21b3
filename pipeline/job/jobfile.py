"""YAML text → a job of any kind. A narrow YAML: no aliases, no tags, no key twice, at most 1 MB; complaints name file, line and
way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import Complaints, JobError, first_line
from pipeline.job.complaints import line_of, sentences, shown
from pipeline.job.recipe import EvaluateJob, QuantizeJob
from pipeline.job.schedule import days_of
from pipeline.job.training import DistillJob, FinetuneJob, TrainingJob
from pipeline.job.uris import Filled, is_dated, with_uris
from pipeline.spec import Job

PreparationJob = TrainingJob | QuantizeJob | EvaluateJob
AnyJob = Job | PreparationJob
KINDS: dict[str, type[AnyJob]] = {
    "label": Job,
    "finetune": FinetuneJob,
    "distill": DistillJob,
    "quantize": QuantizeJob,
    "evaluate": EvaluateJob,
}
MAX_BYTES = 1_000_000
#: What YAML can spell and neither a file system nor Arrow can hold.
_UNTEXT = re.compile("[\\0\ud800-\udfff]")
#: A date in a place within braces, `{uri: in/{date}/}`, and a glob are what YAML most often cannot read.
_QUOTE = "Mend that line; text with {, [, *, ?, % or : in it stands in quotation marks, such as 'in/{date}/'"

#: By what YAML says, what to do where nothing stands in need of quotation marks.
_REMEDIES = {
    r"found character '\t'": "Indent with spaces, YAML takes no tabs",
    "found another document": "Leave one job in the file: what follows --- is another one",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what a job file never needs: aliases (billion laughs), tags (PyYAML raises IndexError for `!!int`)
    and duplicate keys (the last one wins)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "an alias (*name) is not allowed", event.start_mark)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.constructor.ConstructorError(None, None, f"a tag ({tag}) is not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_job(path: Path, *, date: str | None = None) -> AnyJob:
    """The job in a YAML file, `{date}` filled in. Raises JobError: unreadable, not YAML, or not a job."""
    return parse_job(_read(path), name=str(path), date=date)


def load_template(path: Path, *, date: str | None = None) -> AnyJob:
    """Same, with `{date}` left in. Raises JobError also where `--date` says `date`, and there is none to fill."""
    job = _parse(_read(path), str(path))
    if date is not None and not is_dated(job):
        raise JobError(
            f"{path}: --date {date} fills nothing", need="{date} in a uri of the job", do="Add it, or leave out --date"
        )
    return job


def load_label_job(path: Path, *, date: str | None = None) -> Job:
    """The job in a YAML file that labels. Raises JobError for another kind too."""
    return one_day(load_label_template(path, date=date), date, name=str(path))


def load_label_template(path: Path, *, date: str | None = None) -> Job:
    """Same, with `{date}` left in."""
    job = load_template(path, date=date)
    if not isinstance(job, Job):
        raise JobError(f"{path}: kind is {job.kind}", need="label", do="Give a labelling job; nightlabel run takes every kind")
    return job


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}", need="a job file in YAML", do="Give the path of a job file") from error


def parse_job(raw: bytes, *, name: str = "job", date: str | None = None) -> AnyJob:
    """The job in YAML text. `name` is what messages call the file, `date` one day, in any of the forms that `--date` takes."""
    return one_day(_parse(raw, name), date, name=name)


def one_day(job: Filled, date: str | None, *, name: str) -> Filled:
    """The job of the one day that `--date` names. Raises JobError: none, several, or none given where the job needs one."""
    return at_day(job, asked_day(job, date, name=name), name=name)


def asked_day(job: BaseModel, date: str | None, *, name: str) -> str | None:
    """The one day that `--date` names, or None. Raises JobError when it names none or several."""
    days = asked_days(job, date, name=name)
    if len(days) > 1:
        raise JobError(f"{name}: --date {date} is {len(days)} days", need="one", do="Give a day; runs of labelling take several")
    return days[0]


def asked_days(job: BaseModel, date: str | None, *, name: str = "job") -> tuple[str | None, ...]:
    """The days that `--date` names, or one None. Raises JobError when it names none."""
    schedule = job.schedule if isinstance(job, Job) else None
    try:
        return (None,) if date is None else days_of(date, schedule.timezone if schedule else "UTC")
    except ValueError as error:
        raise JobError(f"{name}: {error}") from None


def at_day(job: Filled, day: str | None, *, name: str = "job") -> Filled:
    """`{date}` replaced in every `uri`, of whatever kind of job. Raises JobError when it needs a day and `day` is None."""

    def fill(uri: str) -> str:
        if day is None and "{date}" in uri:
            do = "Give --date YYYY-MM-DD, today or yesterday"
            raise JobError(f"{name}: {uri} contains {{date}}, which needs a date", do=do)
        return uri.replace("{date}", day or "")

    return with_places(job, fill, name=name)


def with_places(job: Filled, change: Callable[[str], str], *, name: str) -> Filled:
    """`with_uris`, where what comes of it may be no job: on some days only, or in some folders. Raises JobError."""
    try:
        return with_uris(job, change)
    except ValidationError as error:
        raise Complaints(sentences(error, name, None, type(job))) from None


def _parse(raw: bytes, name: str) -> AnyJob:
    if len(raw) > MAX_BYTES:
        raise JobError(
            f"{name}: {len(raw):,} bytes", need=f"at most {MAX_BYTES:,}", do="Name prefixes or globs instead of listing images"
        )
    root, data = _yaml(raw, name)
    kind = data.setdefault("kind", "label")
    if not isinstance(kind, str) or kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        do = f"Did you mean {close[0]}?" if close else "Change it"
        raise JobError(f"{name}{line_of(root, ['kind'])}: kind is {shown(kind)}", need=", ".join(KINDS), do=do)
    model = KINDS[kind]
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise Complaints(sentences(error, name, root, model)) from None
    except ValueError as error:
        raise JobError(f"{name}: {error}") from None


def _yaml(raw: bytes, name: str) -> tuple[yaml.Node, dict[str, Any]]:
    """(the parsed tree, for line numbers; the mapping that it is)."""
    try:
        loader = _Loader(raw.decode())
        root = loader.get_single_node()
        data = loader.construct_document(root) if root is not None else None
    except UnicodeDecodeError as error:
        raise JobError(f"{name}: not UTF-8 text", need="a job file in YAML", do="Save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        do = "Mend that line" if isinstance(error, yaml.constructor.ConstructorError) else _QUOTE
        do = next((words for told, words in _REMEDIES.items() if told in str(error)), do)
        raise JobError(
            f"{name}{line}: {getattr(error, 'problem', None) or first_line(error)}", need="plain YAML", do=do
        ) from error
    except (ValueError, TypeError, RecursionError) as error:  # a date of the 30th of February, a list as a key, 1,000 brackets
        reason = first_line(error)
        raise JobError(f"{name}: cannot be read ({reason})", need="plain YAML", do="Put text in quotation marks") from error
    if not isinstance(data, dict):
        got = {type(None): "is empty", list: "is a list"}.get(type(data), "is one value")
        raise JobError(f"{name}: {got}", need="a mapping with kind, name, input, model, output", do="See jobs/README.md")
    if any(isinstance(part, yaml.ScalarNode) and _UNTEXT.search(part.value) for part in _nodes(root)):
        raise JobError(f"{name}: holds NUL or half a character", need="text", do="Remove \\0 and \\ud800 to \\udfff")
    return cast(yaml.Node, root), data


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is not None:
        yield node
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in part if isinstance(part, tuple) else (part,):
            yield from _nodes(inner)


def dump_job(job: AnyJob) -> bytes:
    """The job as YAML with every default written out: what a run keeps as spec.yaml."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()
