"""One line for each invalid key of a parameter file: the key, its value, and the allowed values."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails


def describe(name: str, schema: type[BaseModel], detail: ErrorDetails) -> str:
    """One line for one of pydantic's errors about the file `name`, which should match `schema`."""
    keys, section = _follow(schema, [str(part) for part in detail["loc"]])
    where = f"{name}: {'.'.join(keys) or 'the file'}"
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return f"{where} is missing. Every key is required; the files in presets/ are complete."
        case "extra_forbidden":
            known = _keys(section)
            return f"{where} is not a known key.{_did_you_mean(keys[-1], known)} Known here: {', '.join(known)}."
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            return f"{where} is {value!r}; allowed: {', '.join(allowed)}.{_did_you_mean(value, allowed)}"
        case "union_tag_invalid":
            tag, allowed = context["tag"], re.findall(r"'([^']*)'", context["expected_tags"])
            return f"{where}.name is {tag!r}; allowed: {', '.join(allowed)}.{_did_you_mean(tag, allowed)}"
        case "union_tag_not_found":
            return f"{where}.name is missing; allowed: {', '.join(_choices(schema, keys))}."
        case "model_type" | "model_attributes_type":
            return f"{where} is {value!r}; it must be a section of keys."
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"[0-9]+e[-+]?[0-9]+", value):
        hint = f" YAML reads {value} as text: write {float(value)!r} or {value.replace('e', '.0e')}."
    return f"{where} is {value!r}; {detail['msg'][0].lower()}{detail['msg'][1:]}.{hint}"


def _follow(schema: type[BaseModel], parts: list[str]) -> tuple[list[str], type[BaseModel]]:
    """The keys of the file in pydantic's location, and the section that contains the last of them.

    If the type of a section depends on its `name`, pydantic adds the name to the location.
    """
    keys: list[str] = []
    parent = section = schema
    options: dict[str, type[BaseModel]] = {}
    for part in parts:
        if part in options:
            section, options = options[part], {}
            continue
        parent = section
        keys.append(part)
        field = _fields(parent).get(part)
        options = {} if field is None else _options(field)
        if field is not None and isinstance(field, type) and issubclass(field, BaseModel):
            section = field
    return keys, parent


def _choices(schema: type[BaseModel], keys: list[str]) -> list[str]:
    _, parent = _follow(schema, keys)
    return list(_options(_fields(parent)[keys[-1]]))


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """The annotation of each key."""
    return {field.alias or key: field.annotation for key, field in section.model_fields.items()}


def _keys(section: type[BaseModel]) -> list[str]:
    return list(_fields(section))


def _options(annotation: Any) -> dict[str, type[BaseModel]]:
    """For a union of sections: the section for each `name`."""
    sections = [part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return {
        get_args(section.model_fields["name"].annotation)[0]: section
        for section in sections
        if "name" in section.model_fields
    }


def _did_you_mean(value: object, allowed: list[str]) -> str:
    close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
