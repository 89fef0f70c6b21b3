"""Columns of a Parquet file: are those there that a job names, what are kept ones kept as, and why can a file not be read?

A kept column has one type in all files of an output, which could not be read as one table else. The first input decides; of the
others the values are cast, where that loses none. What was decided is stored with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from pipeline.errors import JobError, NightlabelError, ShardError, Unidentified, first_line
from pipeline.rows import FETCH_LFS, LFS_POINTER, UnitError
from pipeline.spec import Input
from pipeline.storage import Object, RangeFile, Store, side_by_side

#: What reading a Parquet file may raise; a ValueError also where the footer names a column in bytes that are not UTF-8.
UNREADABLE = (pa.ArrowException, OSError, ValueError)
LOOKED_AT = 1_000  # footers at most, for a column that has no values in any: on S3 some 15 s, 16 at a time
_NAMED = 20  # of the columns that there are, in a complaint; tables of features have thousands


def check_columns(schema: pa.Schema, wanted: Input, uri: str) -> None:
    """Raises JobError when the columns that the job names are not there or not images."""
    for name in (wanted.image_column, *((wanted.key_column,) if wanted.key_column else ()), *wanted.keep):
        if schema.names.count(name) != 1:
            do = "Set image_column, key_column (null numbers the rows), keep or, where images are to have labels, label"
            what = "two columns" if name in schema.names else "no column"
            raise JobError(f"{uri}: {what} {name}", need=f"one of {_some(schema.names, like=name)}", do=do)
    kind = schema.field(wanted.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    plain = plain_type(kind)
    # A column of nulls alone has the type null where whoever wrote it was not told another.
    if not (pa.types.is_binary(plain) or pa.types.is_fixed_size_binary(plain) or pa.types.is_null(plain)):
        need = "one encoded image a row, as binary or struct<bytes: binary, path: string>"
        do = "Name another image_column, or write the images so: bytes, no text, no list, no pixels"
        raise JobError(f"{uri}: column {wanted.image_column} is {kind}", need=need, do=do)


def unreadable(uri: str, reason: str, head: bytes) -> ShardError:
    """What is said of a file that begins with `head` and that Arrow does not read, for `reason`."""
    need, do = "an intact Parquet file", "Write the file again"
    if head.startswith(LFS_POINTER):
        reason, need, do = "a Git LFS pointer in place of the file", "the Parquet file itself", FETCH_LFS
    elif head.startswith(b"PARE") or "decrypt" in reason:  # the footer by its magic, columns alone by Arrow's words
        reason, need, do = "it is encrypted", "plain Parquet: nightlabel reads no encrypted one", "Write it without encryption"
    return ShardError(UnitError.PARQUET_CORRUPT, f"{uri}: {reason}", need=need, do=do)


def _some(names: list[str], *, like: str) -> str:
    """The names, or where they are many the nearest and the first of them."""
    some = list(dict.fromkeys([*get_close_matches(like, names), *names]))[:_NAMED] if len(names) > _NAMED else names
    more = f" and {len(names) - len(some):,} more" if len(some) < len(names) else ""
    return ", ".join(some) + more


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type to keep a column in: views, dictionaries and 64-bit offsets, which Arrow cannot sort or join, as plain values."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    return kind


def leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of the values in it: those of a list's items, a struct's fields, a map's keys and values."""
    if not types.is_nested(kind):
        yield kind
        return
    for number in range(kind.num_fields):
        yield from leaves(kind.field(number).type)


def kept_types(store: Store, wanted: Input, inputs: Sequence[Object]) -> pa.Schema | None:
    """Names and types of the kept columns, as the first of the Parquet files has them that can be read and has rows: one footer,
    as a rule. A column of type null, which has no values, is as the next file has it, and text where none of LOOKED_AT files
    tells. None: nothing is kept but sidecars of tars, which are text, or no such file has rows."""
    found: dict[str, pa.DataType] = {}
    for kinds in _types(store, wanted, inputs) if wanted.format == "parquet" and wanted.keep else ():
        for name, kind in kinds.items():
            known = found.get(name, pa.null())
            if types.is_null(known) or (_is_open(known) and not _is_open(kind)):
                found[name] = kind
        if found and not any(map(_is_open, found.values())):
            break
    return pa.schema([(name, _settled(kind)) for name, kind in found.items()]) if found else None


def _types(store: Store, wanted: Input, inputs: Sequence[Object]) -> Iterator[dict[str, pa.DataType]]:
    """Of each file by itself."""
    for some in (inputs[:1], inputs[1:LOOKED_AT]):  # as a rule the first one tells, and no other is opened
        yield from side_by_side(partial(_types_in, store, wanted), some)


def _types_in(store: Store, wanted: Input, item: Object) -> dict[str, pa.DataType]:
    try:
        footer = pq.read_metadata(RangeFile(store, item))
        schema = footer.schema.to_arrow_schema()
        check_columns(schema, wanted, item.uri)
    except Unidentified:
        raise
    except (NightlabelError, *UNREADABLE):  # which whoever reads it says
        return {}
    return {name: plain_type(schema.field(name).type) for name in wanted.keep} if footer.num_rows else {}


def _is_open(kind: pa.DataType) -> bool:
    """Is it null, or a list that is always empty, or the like?"""
    return any(map(types.is_null, leaves(kind)))


def _settled(kind: pa.DataType) -> pa.DataType:
    """Text where it is open. Nothing in it has to be there."""
    if types.is_null(kind):
        return pa.string()
    if types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_settled(kind.value_type), kind.list_size)
    if types.is_map(kind):
        return pa.map_(_settled(kind.key_type), _settled(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, _settled(field.type)) for field in kind])
    return kind


def with_kept(images: pa.Table, table: pa.Table, *, keep: tuple[str, ...], kept: pa.Schema | None, uri: str) -> pa.Table:
    """The image rows of a table of the file `uri`, and beside them its kept columns: of the types in `kept`, or of their own.
    Raises what `cast_kept` raises."""
    for name in keep:
        column = table.column(name)
        plain = column.cast(plain_type(column.type)) if kept is None else cast_kept(column, kept.field(name), uri)
        images = images.append_column(name, plain)
    return images


def cast_kept(column: pa.ChunkedArray, wanted: pa.Field, uri: str) -> pa.ChunkedArray | pa.Array:
    """The column as `wanted`. Raises JobError where that would lose or change a value."""
    plain = column.cast(plain_type(column.type))
    if plain.null_count == len(plain):
        return pa.nulls(len(plain), wanted.type)
    reason = ""
    if _goes_into(plain.type, wanted.type):
        try:
            return plain.cast(wanted.type)
        except pa.ArrowException as error:
            reason = f" ({first_line(error)})"
    need = f"{wanted.type} without loss, as the output has it from its first input"
    do = "Write the file so, leave the column out of input.keep, or label into another output"
    raise JobError(f"{uri}: column {wanted.name} is {plain.type}{reason}", need=need, do=do)


def _goes_into(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Can values of `kind` be cast so that each is kept, or refused by Arrow?"""
    if kind == wanted or types.is_null(kind):
        return True
    if types.is_struct(kind) and types.is_struct(wanted):  # cast by name, and what `wanted` has not would be dropped
        inner = [(field.type, wanted.get_field_index(field.name)) for field in kind]
        return all(at >= 0 and _goes_into(one, wanted.field(at).type) for one, at in inner)
    if (_is_list(kind) and _is_list(wanted)) or (types.is_map(kind) and types.is_map(wanted)):
        return all(_goes_into(kind.field(at).type, wanted.field(at).type) for at in range(kind.num_fields))
    return any(fits(kind) and any(other(wanted) for other in others) for fits, others in _CASTS)


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_binary(kind) or types.is_fixed_size_binary(kind))


def _is_local(kind: pa.DataType) -> bool:
    return bool(types.is_timestamp(kind) and kind.tz is None)


def _is_zoned(kind: pa.DataType) -> bool:
    return bool(types.is_timestamp(kind) and kind.tz is not None)


_Is = Callable[[pa.DataType], bool]
#: What is cast into what: each value is kept, or Arrow (26) refuses it. Of its other casts some change values in silence: 1e300
#: is an infinite float, a timestamp as a date has no time of day, and a number as a timestamp is of whatever unit that has.
_CASTS: tuple[tuple[_Is, tuple[_Is, ...]], ...] = (
    (types.is_integer, (types.is_integer, types.is_float32, types.is_float64, types.is_decimal, types.is_string)),
    (types.is_floating, (types.is_integer, types.is_string)),
    (types.is_float16, (types.is_float32, types.is_float64)),
    (types.is_float32, (types.is_float64,)),
    (types.is_decimal, (types.is_decimal, types.is_integer, types.is_string)),
    (_is_text, (_is_text,)),
    (types.is_date, (types.is_date, _is_local)),
    (_is_local, (_is_local,)),
    (_is_zoned, (_is_zoned,)),
    (types.is_time, (types.is_time,)),
    (types.is_duration, (types.is_duration,)),
)
