"""Everything under `<output.uri>/<fingerprint>`: the log of plans, and the objects of units.

The plans of one output form a log, `runs/000001/plan.parquet`, `runs/000002/…`: each is created only if absent, by a driver that
has read all plans before it. The price is one small read per earlier run. Plans stay in Arrow, and of each only what touches
the inputs in question, so a thousand nights cost a second and not a minute.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import Conflict, StoreError
from pipeline.footer import TOMBSTONE_BYTES, Footer, parquet_file, read_columns, read_footer
from pipeline.job.uris import absolute
from pipeline.storage import Object, Store, below, join, side_by_side
from pipeline.unit import Part, Pin, Unit, dump_types, parse_types

_PLAN = pa.schema(
    [
        ("unit", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
    ]
)
_KEPT = b"nightlabel.kept"  # in a plan's metadata: the types of its kept columns


@dataclass(frozen=True)
class Run:
    """One entry of the log: a table of the parts of its units, and whether its manifest says that they are all there.
    `whole` is the number of its units, also where the table holds only some of them. `kept`: the types of its kept columns; None
    in a plan of before 2026-11-27, and where there are none but sidecars of tars."""

    id: str
    parts: pa.Table
    whole: int
    finished: bool
    kept: pa.Schema | None = None

    @property
    def inputs(self) -> set[Pin]:
        return set(zip(*(self.parts.column(name).to_pylist() for name in ("uri", "etag", "size")), strict=True))

    @property
    def units(self) -> list[Unit]:
        """Raises StoreError when an id does not follow from the inputs."""
        parts: dict[str, list[Part]] = {}
        for unit, *fields in zip(*(self.parts.column(name).to_pylist() for name in _PLAN.names), strict=True):
            parts.setdefault(unit, []).append(Part(*fields))
        # Of equal parts one: plans of before 2026-11-25 name a unit twice that lies between two empty row groups of a file.
        units = [Unit(tuple(dict.fromkeys(items)), self.kept) for items in parts.values()]
        if any(unit.id != name for unit, name in zip(units, parts, strict=True)):
            raise StoreError(f"plan {self.id}: unit ids do not follow from the inputs", need="an intact plan", do="Restore it")
        return units


@dataclass(frozen=True)
class Standing:
    """What stands at the keys of units: committed, or split and never to be committed."""

    committed: frozenset[str]
    split: frozenset[str]


class Log:
    """The runs and data objects of one output and fingerprint. Its root is absolute, as the URIs that a store lists are: a table
    tells its files from others by them."""

    def __init__(self, store: Store, root: str) -> None:
        self.store, self.root = store, absolute(root)

    @property
    def fingerprint(self) -> str:
        return self.root.rstrip("/").rpartition("/")[2].rpartition("=")[2]

    def run_key(self, run_id: str, name: str) -> str:
        return join(self.root, "runs", run_id, name)

    def data_key(self, unit_id: str) -> str:
        return join(self.root, "data", f"{unit_id}.parquet")

    def footer(self, unit_id: str) -> Footer:
        """What stands at a unit's key. Raises InputMissing or Conflict."""
        return read_footer(self.store, self.data_key(unit_id))

    def objects(self) -> dict[str, Object]:
        """What stands under data/, by unit id."""
        found = ((item.uri.rpartition("/")[2], item) for item in below(self.store, self.root, "data"))
        return {name.removesuffix(".parquet"): item for name, item in found if name.endswith(".parquet")}

    def standing(self, ids: Collection[str]) -> Standing:
        """What became of these units. One listing, and a look into each object that has the size of a tombstone."""
        objects = self.objects() if ids else {}
        there = frozenset(unit_id for unit_id in ids if unit_id in objects)
        suspects = [unit_id for unit_id in there if objects[unit_id].size % TOMBSTONE_BYTES == 0]
        gone = side_by_side(self._is_split, suspects)
        split = frozenset(unit_id for unit_id, is_split in zip(suspects, gone, strict=True) if is_split)
        return Standing(there - split, split)

    def _is_split(self, unit_id: str) -> bool:
        try:
            return bool(self.footer(unit_id).split)
        except Conflict:  # something else stands there, which verification will name
            return False

    def runs(self, uris: frozenset[str] | None = None) -> list[Run]:
        """All runs, oldest first; with `uris`, of each only the units that hold one of these inputs."""
        plans, finished = self._entries()
        span = (min(uris), max(uris)) if uris else None

        def load(key: str) -> Run:
            run_id = key.split("/")[-2]
            parts, whole, kept = _load(self.store.read(key), uri=key, uris=uris, span=span)
            return Run(run_id, parts, whole, run_id in finished, kept)

        return list(side_by_side(load, plans))

    def kept(self) -> pa.Schema | None:
        """The types of kept columns that all objects have: those in the first plan that says any. Others are not read."""
        for key in self._entries()[0]:
            if (kept := _load(self.store.read(key), uri=key, uris=frozenset(), span=None)[2]) is not None:
                return kept
        return None

    def finished(self) -> set[str]:
        """Ids of the runs that have a manifest."""
        return self._entries()[1]

    def _entries(self) -> tuple[list[str], set[str]]:
        """(keys of the plans in order, ids of the runs that have a manifest). A listing is no snapshot: on a disk it may show an
        entry and not the one before. So a gap is looked at again; one that stays is a plan that somebody took away."""
        gap: set[int] = set()
        while True:
            keys = [item.uri for item in below(self.store, self.root, "runs") if item.uri.split("/")[-2].isdigit()]
            plans = [key for key in keys if key.endswith("/plan.parquet")]
            ids = {int(key.split("/")[-2]) for key in plans}
            missing = set(range(1, max(ids, default=0))) - ids
            if missing <= gap:
                return plans, {key.split("/")[-2] for key in keys if key.endswith("/manifest.json")}
            gap = missing

    def append(self, units: Collection[Unit], *, after: list[Run]) -> str | None:
        """A new plan as the next entry; its run id, or None when another driver was faster (read the log again).
        Raises AssertionError when a unit is in it twice, or the types of their kept columns differ."""
        if len({unit.id for unit in units}) != len(units):
            raise AssertionError("a unit is in the plan twice")
        kept = {dump_types(kept) for kept in {id(unit.kept): unit.kept for unit in units}.values()}  # a million units share one
        if len(kept) > 1:
            raise AssertionError("a kept column has two types in the plan")
        run_id = f"{int(after[-1].id) + 1 if after else 1:06d}"
        return run_id if self.store.create(self.run_key(run_id, "plan.parquet"), _dump(units, *kept)) else None


def _dump(units: Iterable[Unit], kept: str | None = None) -> bytes:
    rows = [(unit.id, part.uri, part.etag, part.size, part.start, part.stop) for unit in units for part in unit.parts]
    columns = zip(*rows, strict=True) if rows else ([] for _ in _PLAN)
    schema = _PLAN if kept is None else _PLAN.with_metadata({_KEPT: kept})
    sink = BytesIO()
    pq.write_table(
        pa.table([list(column) for column in columns], schema=schema), sink, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue()


def _load(
    data: bytes, *, uri: str, uris: frozenset[str] | None, span: tuple[str, str] | None
) -> tuple[pa.Table, int, pa.Schema | None]:
    """(parts of the units that hold one of `uris`, which lie within `span`; number of all units; types of kept columns)."""
    try:
        file = parquet_file(data)
        kept = parse_types((file.metadata.metadata or {}).get(_KEPT))
        if uris is not None and not _may_hold(file.metadata, span):
            return _PLAN.empty_table(), 0, kept
        table = read_columns(file, _PLAN.names)
        whole = pc.count_distinct(table.column("unit")).as_py()
        if uris is not None:
            # Not Arrow's is_in, which hashes all of `uris` anew for each of a thousand plans.
            held = table.filter(pa.array([uri in uris for uri in table.column("uri").to_pylist()], pa.bool_())).column("unit")
            table = table.filter(pc.is_in(table.column("unit"), value_set=held.unique()))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StoreError(
            f"{uri}: not a plan ({error})", need="an intact plan", do="Restore it, or label into another output"
        ) from error
    return table, whole, kept


def _may_hold(metadata: pq.FileMetaData, span: tuple[str, str] | None) -> bool:
    """By the smallest and largest URI of each row group: another night's plan is not even decompressed."""
    if span is None:
        return False
    first, last = span
    column = _PLAN.get_field_index("uri")
    statistics = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    return any(known is None or not known.has_min_max or (known.min <= last and first <= known.max) for known in statistics)
