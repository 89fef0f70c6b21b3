"""What is to be done: inputs listed once, pinned, cut into units, what is finished subtracted, stored as an immutable plan.

The plans of one output form a log, `runs/000001/plan.parquet`, `runs/000002/…`: each is created only if absent, by a driver that
has read all plans before it, so an input (URI, etag, size) belongs to one unit, whoever plans when. The price is one small read
per earlier run. An input's unit is the one in the newest plan that has it; a unit that was committed stays as it is for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import Conflict, InputMissing, StoreError
from pipeline.storage import Object, Store, join

Input = tuple[str, str, int]  # what pins an input: URI, etag, size

_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Part:
    """One pinned input of a unit, or the rows [start, stop) of it (Parquet; both None: all of it)."""

    uri: str
    etag: str
    size: int
    start: int | None = None
    stop: int | None = None

    @property
    def input(self) -> Input:
        return self.uri, self.etag, self.size


@dataclass(frozen=True)
class Unit:
    """What commits as one object; its id follows from its parts alone."""

    parts: tuple[Part, ...]

    @cached_property
    def id(self) -> str:
        """32 hex digits of sha256(canonical JSON of the parts)."""
        parts = [[part.uri, part.etag, part.size, part.start, part.stop] for part in self.parts]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Run:
    """One entry of the log: the units of a run, and whether its manifest says that they are all there."""

    id: str
    units: tuple[Unit, ...]
    finished: bool


@dataclass(frozen=True)
class Plan:
    """What a driver works from. `run_id` None: every input is part of a finished run, there is nothing to do."""

    run_id: str | None
    units: tuple[Unit, ...]
    committed: frozenset[str]

    @property
    def todo(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.id not in self.committed)


class Log:
    """The runs and data objects under `<output.uri>/<fingerprint>`."""

    def __init__(self, store: Store, root: str) -> None:
        self.store, self.root = store, root

    def run_key(self, run_id: str, name: str) -> str:
        return join(self.root, "runs", run_id, name)

    def data_key(self, unit_id: str) -> str:
        return join(self.root, "data", f"{unit_id}.parquet")

    def committed(self) -> frozenset[str]:
        """Ids of the units that have their object."""
        keys = (uri.rpartition("/")[2] for uri in self._list("data"))
        return frozenset(key.removesuffix(".parquet") for key in keys if key.endswith(".parquet"))

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        keys = [uri for uri in self._list("runs") if uri.split("/")[-2].isdigit()]
        finished = {key.split("/")[-2] for key in keys if key.endswith("/manifest.json")}
        plans = [key for key in keys if key.endswith("/plan.parquet")]
        with ThreadPoolExecutor(16) as pool:
            units = list(pool.map(lambda key: _load(self.store.read(key), uri=key), plans))
        return [Run(key.split("/")[-2], unit, key.split("/")[-2] in finished) for key, unit in zip(plans, units, strict=True)]

    def append(self, units: tuple[Unit, ...], *, after: list[Run]) -> str | None:
        """A new plan as the next entry; its run id, or None when another driver was faster (read the log again)."""
        run_id = f"{int(after[-1].id) + 1 if after else 1:06d}"
        return run_id if self.store.create(self.run_key(run_id, "plan.parquet"), _dump(units)) else None

    def _list(self, folder: str) -> list[str]:
        try:
            return [item.uri for item in self.store.list(join(self.root, folder) + "/")]
        except InputMissing:  # nothing was written yet
            return []


Cut = Callable[[list[Object]], list[Unit]]


def make_plan(log: Log, listing: list[Object], cut: Cut, *, present: Callable[[Part], bool], write: bool = True) -> Plan:
    """The plan for what was listed. `cut` turns inputs that no unit has yet into units; `present` says whether an input that was
    not listed (by this job, at its time) is still there as it was. Writes at most one new plan, or with `write` off none: a plan
    that would be new then has the run id "new".

    Raises Conflict when other drivers keep taking the next entry of the log.
    """
    for _ in range(20):
        runs, committed = log.runs(), log.committed()
        units, fresh = _assign(runs, committed, listing, present)
        units += cut(fresh) if fresh else []
        if not units:
            return Plan(None, (), frozenset())
        ids = frozenset(unit.id for unit in units)
        for run in reversed(runs):
            if not run.finished and ids == {unit.id for unit in run.units}:
                return Plan(run.id, run.units, committed & ids)
        run_id = log.append(tuple(units), after=runs) if write else "new"
        if run_id is not None:
            return Plan(run_id, tuple(units), committed & ids)
    raise Conflict("20 other runs were planned in the meantime", need="a free place in the log of runs", do="Run again later")


def _assign(
    runs: list[Run], committed: frozenset[str], listing: list[Object], present: Callable[[Part], bool]
) -> tuple[list[Unit], list[Object]]:
    """(units that earlier open plans have for the listing, inputs that no unit has yet)."""
    finished, owners = _owners(runs, committed)
    needed = {(item.uri, item.etag, item.size): item for item in listing}
    needed = {key: item for key, item in needed.items() if key not in finished}
    listed = {item.uri for item in listing}
    adopted: dict[str, Unit] = {}
    lost: set[str] = set()
    fresh: list[Object] = []
    for key, item in needed.items():
        for unit in owners.get(key, []):
            if unit.id in adopted or unit.id in lost:
                continue
            # A unit one of whose inputs is gone can never be completed: its other inputs go into new units. Not listed is not
            # gone: another driver may have listed more, and a second unit for the same input would label it twice.
            whole = unit.id in committed or all(
                part.input in needed or (part.uri not in listed and present(part)) for part in unit.parts
            )
            if whole:
                adopted[unit.id] = unit
            else:
                lost.add(unit.id)
        if not any(unit.id in adopted for unit in owners.get(key, [])):
            fresh.append(item)
    return list(adopted.values()), fresh


def _owners(runs: list[Run], committed: frozenset[str]) -> tuple[set[Input], dict[Input, list[Unit]]]:
    """(inputs of finished runs, the units that hold each input of open runs)."""
    finished: set[Input] = set()
    owners: dict[Input, list[Unit]] = {}
    for run in runs:
        if run.finished:
            finished.update(part.input for unit in run.units for part in unit.parts)
            continue
        newer: dict[Input, list[Unit]] = {}
        for unit in run.units:
            for part in unit.parts:
                newer.setdefault(part.input, []).append(unit)
        # The newest plan decides, except over a unit that was committed: its rows are there and stay.
        owners |= {key: units for key, units in newer.items() if not any(unit.id in committed for unit in owners.get(key, ()))}
    return finished, owners


def split(log: Log, plan: Plan, broken: frozenset[str]) -> Plan:
    """A new plan in which each part of a broken unit is a unit of its own, so that one bad shard holds nothing else back."""
    units: list[Unit] = []
    for unit in plan.units:
        units += [Unit((part,)) for part in unit.parts] if unit.id in broken else [unit]
    run_id = None
    while run_id is None:
        run_id = log.append(tuple(units), after=log.runs())
    return Plan(run_id, tuple(units), log.committed() & {unit.id for unit in units})


def _dump(units: tuple[Unit, ...]) -> bytes:
    rows = [(unit.id, part.uri, part.etag, part.size, part.start, part.stop) for unit in units for part in unit.parts]
    columns = zip(*rows, strict=True) if rows else ([] for _ in _SCHEMA)
    sink = BytesIO()
    pq.write_table(
        pa.table([list(column) for column in columns], schema=_SCHEMA), sink, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue()


def _load(data: bytes, *, uri: str) -> tuple[Unit, ...]:
    try:
        table = pq.read_table(BytesIO(data), page_checksum_verification=True)
        parts: dict[str, list[Part]] = {}
        for unit, *fields in zip(*(table.column(name).to_pylist() for name in _SCHEMA.names), strict=True):
            parts.setdefault(unit, []).append(Part(*fields))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise StoreError(
            f"{uri}: not a plan ({error})", need="an intact plan", do="Restore it, or label into another output"
        ) from error
    units = tuple(Unit(tuple(items)) for items in parts.values())
    if any(unit.id != name for unit, name in zip(units, parts, strict=True)):
        raise StoreError(f"{uri}: unit ids do not follow from the inputs", need="an intact plan", do="Restore it")
    return units
