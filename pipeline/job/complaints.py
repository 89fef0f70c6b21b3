"""What pydantic finds wrong with a job → sentences of ours: file and line, field and value, what is required, what to do."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

#: What pydantic puts into a place for the form of a union, `function-before[…]`: no key of the file.
_FORM = re.compile(r"[\[(]|^function-|^constrained-|^tuple$|^str$")
#: Its kinds of error, in words that go behind "required: ".
_NEEDS = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "string_too_short": "one character or more",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "tuple_type": "a list",
}


def sentences(error: ValidationError, name: str, root: yaml.Node | None, model: type[BaseModel]) -> list[str]:
    """A sentence for each field that is wrong, `name` and line before it; `root` is the parsed file, if there is one."""
    told: dict[str, str] = {}  # by field: of a union's complaints the first is the one about the form that was meant
    items = [(_place(item["loc"]), item) for item in error.errors(include_url=False)]
    for loc, item in items:
        form = item["type"] == "string_type" and isinstance(item["input"], list)
        if form and any(other[: len(loc)] == loc and it is not item for other, it in items):
            continue  # where text or a list of it may stand, a list that is wrong was not meant as text
        field = ".".join(str(part) for part in loc)
        told.setdefault(field, f"{name}{line_of(root, loc)}: {_sentence(item, loc, field, model)}")
    return list(told.values())


def _sentence(item: ErrorDetails, loc: list[int | str], field: str, model: type[BaseModel]) -> str:
    kind, got, context = item["type"], item["input"], item.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(field, loc, model)
    if kind == "missing":
        return f"{field} is missing, it is required. Add it; jobs/README.md says what it holds."
    if kind == "value_error" and isinstance(got, dict):  # a cross-check of ours, of several fields: it says it all
        return f"{field}: {context['error']}." if field else f"{context['error']}."
    if kind == "model_type":
        return f"{field} is {shown(got)}; required: a mapping. {_mapping(loc, got, model)}."
    need = context["error"] if kind == "value_error" else item["msg"].removeprefix("Input should be ")
    return f"{field} is {shown(got)}; required: {_NEEDS[kind].format(**context) if kind in _NEEDS else need}. Change it."


def _mapping(loc: list[int | str], got: object, model: type[BaseModel]) -> str:
    """What to write where a mapping belongs: of one that holds a place, what was meant, `input: photos/`."""
    names = _fields_at(loc, model)
    return (
        f"Write {loc[-1]}: {{uri: {shown(got)}}}" if isinstance(got, str) and "uri" in names else f"It holds {', '.join(names)}"
    )


def _place(loc: tuple[int | str, ...]) -> list[int | str]:
    return [*loc[:1], *(part for part in loc[1:] if isinstance(part, int) or not _FORM.search(part))]


def shown(value: object) -> str:
    """A value in a sentence: short, as YAML spells it, and no password in it, which before an @ may hold slashes."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = re.sub(r"""(?<=['"]).+(?=@)""", "***", repr(value)) if "@" in repr(value) else repr(value)
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
    hint = f"Did you mean {close[0]}?" if close else f"Known here: {', '.join(names)}."
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
