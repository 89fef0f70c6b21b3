"""Parquet files: are the columns there that a job names, what are kept ones kept as, and why can a file not be read?"""

from __future__ import annotations

from difflib import get_close_matches

import pyarrow as pa

from pipeline.errors import JobError, ShardError
from pipeline.rows import FETCH_LFS, LFS_POINTER, UnitError
from pipeline.spec import Input

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
