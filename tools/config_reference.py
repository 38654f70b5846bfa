"""Write the reference of the operator's configuration into docs/operator.md.

The tables come from ``talkoot.server.config``: keys, ranges and defaults from the pydantic models,
meanings from the strings below the attributes. ``tests/test_docs.py`` holds the page to it.

    .venv/bin/python tools/config_reference.py          print the tables
    .venv/bin/python tools/config_reference.py --write  put them into the page
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from talkoot.server.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operator.md"
BEGIN = "<!-- config reference: made by tools/config_reference.py, do not edit -->\n"
END = "<!-- end of the config reference -->\n"

_UNITS = (
    ("_seconds", "seconds"),
    ("_per_second", "a second"),
    ("tokens_per_node", "tokens"),
    ("_tokens", "tokens"),
    ("sequence_length", "tokens"),
    ("micro_batch", "sequences"),
    ("max_steps", "steps"),
    ("_bits", "bits"),
    ("_every", "rounds"),
    ("rounds", "rounds"),
    ("nodes", "nodes"),
    ("quorum", "contributions"),
    ("checkpoints", "checkpoints"),
    ("_parameters", "parameters"),
)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each attribute of a model and of what it inherits from, by name."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if kind is BaseModel or not issubclass(kind, BaseModel):
            continue
        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            name, text = statement.target, after.value
            if isinstance(name, ast.Name) and isinstance(text, ast.Constant):
                found[name.id] = " ".join(str(text.value).split()).replace("``", "`")
    return found


def _allowed(field: FieldInfo) -> str:
    """What a value may be: the type's name, the choices, the range."""
    kind: Any = field.annotation
    choices = [a for a in get_args(kind) if a is not type(None)]
    if get_origin(kind) is Literal:
        return " or ".join(f"`{_toml(choice)}`" for choice in choices)
    if type(None) in get_args(kind):
        (kind,) = choices
    rules: list[Any] = list(field.metadata)
    if get_origin(kind) is Annotated:  # an optional value with a range
        kind, *inner = get_args(kind)
        rules += [rule for one in inner for rule in getattr(one, "metadata", [one])]
    name = {bool: "true or false", int: "integer", float: "number", str: "text"}.get(kind)
    if name is None:
        name = "list of text"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {_number(getattr(rule, key))}"
        for rule in rules
        for key, sign in signs.items()
        if getattr(rule, key, None) is not None
    ]
    return ", ".join([name, *bounds])


def _number(value: float) -> str:
    if isinstance(value, int) and value >= 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def _toml(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)


def _unit(key: str) -> str:
    return next((unit for end, unit in _UNITS if key.endswith(end)), "")


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables of the file; the file's own top level has the empty name and comes first."""
    yield "", Config
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield name, kind


def rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str, str]]:
    """Key, allowed values, unit, default and meaning of everything that is not a table itself."""
    told = meanings(model)
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        if field.default is PydanticUndefined:
            default = "required"
        else:
            default = "none" if field.default is None else f"`{_toml(field.default)}`"
        yield key, _allowed(field), _unit(key), default, told.get(key, "")


def reference() -> str:
    """The whole reference as Markdown."""
    parts = []
    for name, model in sections():
        title = f"[{name}]" if name else "At the top of the file"
        about = "" if not name else " ".join((model.__doc__ or "").split()).replace("``", "`")
        lines = [f"#### {title}", ""]
        lines += [about, ""] if about else []
        lines += ["| key | may be | unit | default | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key}` | {allowed} | {unit} | {default} | {told} |"
            for key, allowed, unit, default, told in rows(model)
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def with_reference(page: str) -> str:
    """The page with the reference in its place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(reference())
