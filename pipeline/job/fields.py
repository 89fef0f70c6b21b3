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


def _uri(value: str) -> str:
    scheme, colon, rest = value.partition(":")
    if scheme in ("s3", "file") and colon and not rest.startswith("//"):
        raise ValueError(f"two slashes after {scheme}:")
    scheme, sign, rest = value.partition("://")
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


def _cron(value: str) -> str:
    """Five fields of what cron fields are made of; what they mean is the scheduler's to say."""
    if not re.fullmatch(r"[0-9A-Za-z*/,?#-]+( [0-9A-Za-z*/,?#-]+){4}", value):
        raise ValueError('five cron fields, such as "0 2 * * *"')
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


Cron = Annotated[str, AfterValidator(_cron)]
Digest = Annotated[str, *like(r"^sha256:[0-9a-f]{64}$", "sha256: and 64 digits of 0-9 and a-f")]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
Name = Annotated[
    str,
    *like(r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$", "1 to 50 lower case letters, digits and dashes, no dash at either end"),
]
Region = Annotated[str, *like(r"^[a-z0-9-]+$", "a region such as eu-central-1: lower case letters, digits and dashes")]
Uri = Annotated[str, Field(min_length=1), AfterValidator(_uri)]
#: Not by `min_length`, which would count what is left of a list when something in it is wrong.
Uris = Annotated[tuple[Uri, ...], AfterValidator(_some), Field(json_schema_extra={"minItems": 1})]
Word = Annotated[str, Field(min_length=1)]
Webhook = Annotated[str, AfterValidator(_webhook)]
