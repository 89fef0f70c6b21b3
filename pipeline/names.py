"""Names of objects: globs, and file names whose bytes are not UTF-8, which no column of Arrow can hold.

Such bytes are spelt out, `caf\\xe9.jpg`, in every key and URI of ours, and read back when the file is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from pipeline.errors import StoreError, UnfitError

WILDCARD = re.compile(r"[*?\[]")
_GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]")
_MEANING = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def glob_prefix(name: str) -> str:
    """What stands before the first wildcard; `name` itself when there is none."""
    return WILDCARD.split(name, maxsplit=1)[0]


def glob_matcher(name: str) -> Callable[[str], bool]:
    """Does a key or path match the glob? Raises StoreError for a set that cannot be, such as `[z-a]`."""
    name += "**" if name.endswith("/") else ""
    pattern, at = "", 0
    for token in _GLOB.finditer(name):
        inner = re.sub(r"([\\\[\]&~|^])", r"\\\1", token[0][1:-1])
        chars = f"(?!/)[^{inner[1:]}]" if inner.startswith("!") else f"(?!/)[{inner}]"
        pattern += re.escape(name[at : token.start()]) + _MEANING.get(token[0], chars)
        at = token.end()
    try:
        compiled = re.compile(pattern + re.escape(name[at:]), re.DOTALL)
    except re.error as error:
        raise StoreError(f"{name}: {error}", need="a glob of *, **, ? and [a-z]", do="Mend the pattern") from error
    return lambda text: compiled.fullmatch(text) is not None


def from_here(path: str) -> str:
    """The path from the root. Raises UnfitError where it starts from a working folder that has been removed."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        got = f"{path}: a path from the folder that the command runs in, which has been removed"
        raise UnfitError(got, need="a folder that is there", do="Change into one, or give paths from the root") from error


def anything(_: str) -> bool:
    """Matches every name, as a folder does of what is in it."""
    return True


def spelt(name: str) -> str:
    """A name of the operating system as text, bytes that are not UTF-8 spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def on_disk(path: str) -> str:
    """The inverse of `spelt`, for the file that is there; one whose name holds a real `\\xe9`, four characters, goes first."""
    if "\\x" not in path or os.path.lexists(path):
        return path
    return os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes([int(found[1], 16)]), path.encode()))
