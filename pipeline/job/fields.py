"""Text fields of a job: what a URI, an endpoint or a schedule may hold, so that a typing error ends here, in a sentence, and not
somewhere in a client of S3. Each raises ValueError with what is required, in words: a pattern is for the JSON schema.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:[A-Za-z0-9:/_-]+", re.ASCII)
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[!-?A-~]*)?", re.ASCII)
#: `{day}`, `{date:%Y}`, `${DATE}`, `{{date}}`. Not `{a,b}`, a shell's choice, of which a listing has a word to say, nor a GUID.
_PLACEHOLDER = re.compile(r"\$?\{+\s*[A-Za-z_]+\s*(?::[^{}]*)?\}+")
_TERM = re.compile(r"(?:[*?]|(\d{1,4}|[A-Z]{3})(?:-(\d{1,4}|[A-Z]{3}))?)(?:/(\d{1,4}))?", re.ASCII)
_CRON: tuple[tuple[str, int, int, list[str]], ...] = (
    ("minutes", 0, 59, []),
    ("hours", 0, 23, []),
    ("days of the month", 1, 31, []),
    ("months", 1, 12, ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]),
    ("days of the week", 0, 6, ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]),
)
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # days of the months


def _uri(value: str) -> str:
    if not value.strip():  # would be the working folder, or one whose name nobody sees
        raise ValueError("a path or a URI that is not blank")
    scheme, colon, rest = value.partition(":")
    if scheme in ("s3", "file") and colon and not rest.startswith("//"):
        raise ValueError(f"two slashes after {scheme}:")
    scheme, sign, rest = value.partition("://")
    if any(found != "{date}" for found in _PLACEHOLDER.findall(value)):  # would be a folder of that name
        raise ValueError("no other placeholder than {date}; in input.uri, a brace that is meant is written [{]")
    if value.startswith("~"):  # would be a folder of that name, which `rm -r` in a shell takes for one's home
        raise ValueError("a path from / or from here; ~ means a home to a shell alone, and ./~ a folder of that name")
    if sign and scheme not in ("file", "s3"):
        raise ValueError("a local path, file:// or s3://")
    place = rest.partition("/")[0]
    # A secret may hold a slash, so that only a part of it is before the first.
    if sign and "@" in rest and (":" in place or "@" in place) and not place.startswith("arn:"):
        raise ValueError("a URI without credentials; they come from the environment, a profile or a role")
    if sign and not rest.strip("/"):
        raise ValueError("a URI that names a bucket or a folder")
    if scheme == "s3" and sign and not _BUCKET.fullmatch(place.replace("{date}", "2026-11-01")):
        raise ValueError("s3:// and the name of a bucket: 3 to 255 letters, digits, dots, dashes")
    return value


def _endpoint(value: str) -> str:
    match = _ENDPOINT.fullmatch(value)
    if match is None or int((match[2] or ":0")[1:]) > 65535:
        raise ValueError("http:// or https:// and a host, without credentials, such as https://minio.example:9000")
    return value


def plain_cron(value: str) -> str:
    """Five cron fields as Kubernetes reads them (robfig/cron: no L, no #, Sunday is 0), each `*` or its numbers."""
    texts = value.split()
    if len(texts) != len(_CRON):
        raise ValueError('five cron fields, such as "0 2 * * *"')
    numbers = [_numbers(text, *bounds) for text, bounds in zip(texts, _CRON, strict=True)]
    _, _, days, months, weekdays = numbers
    if days and weekdays is None and min(days) > max(_LONGEST[month - 1] for month in months or {1}):
        raise ValueError("a day that one of its months has")
    return " ".join(",".join(map(str, sorted(found))) if found is not None else "*" for found in numbers)


def _numbers(text: str, name: str, low: int, high: int, names: list[str]) -> set[int] | None:
    """What a field of cron stands for; None for a star, beside which the other one of the two fields of days counts."""
    found, star, spelt = set[int](), False, {word: low + number for number, word in enumerate(names)}
    for term in text.upper().split(","):
        match = _TERM.fullmatch(term)
        first, last, step = match.groups() if match else ("", None, None)
        begin, end = (low, high) if first is None else (spelt.get(word, word) for word in (first, last or first))
        values = [int(value) for value in (begin, end, step or 1) if str(value).isdecimal()]
        if len(values) < 3 or not low <= values[0] <= values[1] <= high or not values[2]:
            words = f" or {names[0]} to {names[-1]}" if names else ""
            raise ValueError(f"{name} of {low} to {high}{words}, such as 2, 2-5 or */2")
        star = star or (first is None and values[2] == 1)
        found.update(range(values[0], (high if step and last is None else values[1]) + 1, values[2]))
    return None if star else found


def _cron(value: str) -> str:
    plain_cron(value)
    return value


def _webhook(value: str) -> str:
    if not re.match(r"https://[^/@\s]+(/|$)|http://(127\.0\.0\.1|localhost)[:/]", value):
        raise ValueError("an https:// URL without credentials; NIGHTLABEL_WEBHOOK_TOKEN holds the secret")
    return value


def like(pattern: str, need: str) -> tuple[AfterValidator, FieldInfo]:
    """Text of this pattern, which `need` puts into words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(need)
        return value

    return AfterValidator(check), Field(json_schema_extra={"pattern": pattern})


def _some(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("a URI, or a list of one or more")
    return value


ClassName = Annotated[str, *like(r"^[\s\S]*\S[\s\S]*$", "a name that is not blank")]
Cron = Annotated[str, AfterValidator(_cron)]
Digest = Annotated[str, *like(r"^sha256:[0-9a-f]{64}$", "sha256: and 64 digits of 0-9 and a-f")]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
Name = Annotated[
    str,
    *like(r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$", "1 to 50 lower case letters, digits and dashes, no dash at either end"),
]
Region = Annotated[
    str, *like(r"^[a-z0-9]+(-[a-z0-9]+)*$", "a region such as eu-central-1: lower case letters, digits and dashes")
]
#: Or nothing, which a Delta table has.
TableName = Annotated[
    str,
    *like(
        r"^((\{fingerprint\}|[^.{}])+(\.(\{fingerprint\}|[^.{}])+)+)?$",
        "namespace.table; {fingerprint} may be in it, and no other placeholder",
    ),
]
Uri = Annotated[str, Field(min_length=1), AfterValidator(_uri)]
#: Not by `min_length`, which would count what is left of a list when something in it is wrong.
Uris = Annotated[tuple[Uri, ...], AfterValidator(_some), Field(json_schema_extra={"minItems": 1})]
Word = Annotated[str, Field(min_length=1)]
Webhook = Annotated[str, AfterValidator(_webhook)]
