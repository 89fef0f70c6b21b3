"""What pydantic finds wrong with a job → sentences of ours: file and line, field and value, what is required, what to do."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

#: What pydantic puts into a place for the form of a union, `function-before[…]`: no key of the file.
_FORM = re.compile(r"[\[(]|^function-|^constrained-|^tuple$|^str$")
_PYDANTIC = re.compile(r"^(Value error, |Input should be |(String|Tuple) should (have )?)| or instance of \w+$")


def sentences(error: ValidationError, name: str, root: yaml.Node, model: type[BaseModel]) -> list[str]:
    """A sentence for each field that is wrong, `name` and line before it; `root` is the parsed file."""
    told: dict[str, str] = {}  # by field: of a union's complaints the first is the one about the form that was meant
    items = [(_place(item["loc"]), item) for item in error.errors(include_url=False)]
    for loc, item in items:
        where, field = f"{name}{line_of(root, loc)}: ", ".".join(str(part) for part in loc)
        form = item["type"] == "string_type" and isinstance(item["input"], list)
        if form and any(other[: len(loc)] == loc and it is not item for other, it in items):
            continue  # where text or a list of it may stand, a list that is wrong was not meant as text
        if item["type"] == "extra_forbidden":
            sentence = _unknown(field, loc, model)
        elif item["type"] == "missing":
            sentence = f"{field} is missing, it is required. Add it; jobs/README.md says what it holds."
        elif not loc or "; required: " in item["msg"]:  # a cross-check of ours, which already says it all
            sentence = f"{field}: " * bool(loc) + str(item["msg"]).removeprefix("Value error, ")
        else:
            need = _PYDANTIC.sub("", item["msg"]).replace("dictionary", "mapping").replace("tuple", "list")
            sentence = f"{field} is {shown(item['input'])}; required: {need}. Change it."
        told.setdefault(field, where + sentence)
    return list(told.values())


def _place(loc: tuple[int | str, ...]) -> list[int | str]:
    return [*loc[:1], *(part for part in loc[1:] if isinstance(part, int) or not _FORM.search(part))]


def shown(value: object) -> str:
    """A value in a sentence: short, and no password in it, which before an @ may hold slashes."""
    text = re.sub(r"""(?<=['"]).*(?=@)""", "***", repr(value)) if "@" in repr(value) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def line_of(root: yaml.Node | None, loc: list[int | str]) -> str:
    """`:12` for the deepest part of `loc` that the file has."""
    node, line = root, None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return f":{line}" if line else ""


def _unknown(field: str, loc: list[int | str], model: type[BaseModel]) -> str:
    names = list(_fields_at(loc[:-1], model))
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Known here: {', '.join(names)}"
    return f"unknown field {field}. {hint}"


def _fields_at(loc: list[int | str], model: type[BaseModel]) -> dict[str, Any]:
    for part in loc:
        field = model.model_fields.get(str(part))
        nested = nested_model(field.annotation) if field else None
        if nested is None:
            return {}
        model = nested
    return dict(model.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that an annotation holds (`Cluster | None` → Cluster), or None."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
