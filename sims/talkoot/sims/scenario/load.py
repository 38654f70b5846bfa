"""Scenarios from files and from the library; errors name the key and the line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from talkoot.protocol.errors import ConfigError
from talkoot.sims.scenario.lines import key_lines, line_of
from talkoot.sims.scenario.model import LocatedError, Scenario

MAX_FILE = 2**20
"""Bytes of a scenario file."""


def library() -> dict[str, Path]:
    """The scenarios that ship, by name."""
    root = Path(str(resources.files("talkoot.sims.scenario") / "library"))
    return {path.stem: path for path in sorted(root.glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a scenario: a path, or a name of the library.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        if not path.is_file():
            raise ConfigError(f"There is no scenario at {path}: give a file or a library name.")
        return path
    known = library()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"The library has no scenario {name[:64]!r}: {hint}.")
    return known[name]


def load_scenario(name: str | Path, overrides: Mapping[str, object] | None = None) -> Scenario:
    """A scenario by path or library name, with other values for some keys.

    Args:
        name: a path to a TOML file, or a name of the library.
        overrides: such as ``{"rules.round.deadline_seconds": 7200}``; a part that is a number is a
            place in an array.

    Raises:
        ConfigError: it is not there, or one sentence about what is wrong, with key and line.
    """
    path = find(str(name))
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"{path} is larger than {MAX_FILE} bytes, which no scenario is.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read as text: {err}.") from err
    return parse_scenario(text, where=str(path), base=path.parent, overrides=overrides)


def parse_scenario(
    text: str,
    *,
    where: str = "scenario.toml",
    base: Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Scenario:
    """Read a scenario. Paths in it are relative to ``base``.

    Raises:
        ConfigError: one sentence with the key and the line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{where} is not valid TOML: {err}.") from err
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    if overrides:
        where += f" with other values of {', '.join(overrides)}"
    if base is not None:
        _anchor(data, base)
    try:
        return Scenario.model_validate(data)
    except ValidationError as err:
        raise ConfigError(_sentence(err, where, text, data)) from err


def _override(data: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    place: Any = data
    for part in path:
        if isinstance(place, list):
            if not (part.isdigit() and int(part) < len(place)):
                raise ConfigError(f"{key}: there is no number {part} among {len(place)}.")
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise ConfigError(f"{key}: {part!r} is within a value and not a section.")
    if not isinstance(place, dict):
        raise ConfigError(f"{key}: {last!r} is not a key of a section.")
    place[last] = value


def _anchor(data: dict[str, Any], base: Path) -> None:
    """Make relative paths absolute."""
    model = data.get("model")
    if isinstance(model, dict):
        for key in ("config", "pretrained"):
            if isinstance(model.get(key), str):
                model[key] = str(base / model[key])
    corpus = data.get("corpus")
    if isinstance(corpus, dict) and isinstance(corpus.get("sources"), list):
        corpus["sources"] = [
            str(base / one)
            if isinstance(one, str) and one != "stdlib" and not one.startswith("hf:")
            else one
            for one in corpus["sources"]
        ]


def _sentence(err: ValidationError, where: str, text: str, data: Mapping[str, Any]) -> str:
    faults = err.errors(include_url=False)
    # A key that is misspelt is also missing: say the cause.
    first = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])
    loc: tuple[str | int, ...] = first["loc"]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LocatedError):
        loc = tuple(int(p) if p.isdigit() else p for p in cause.key.split("."))
    line = line_of(key_lines(text), loc)
    at = where if line is None else f"{where}, line {line}"
    key = ".".join(str(part) for part in loc) or "the scenario"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _known_keys(loc[:-1]), n=1)
        return f"{at}: unknown key {key!r}; " + (
            f"did you mean {near[0]!r}?" if near else "remove it."
        )
    if first["type"] == "missing":
        return f"{at}: {key!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f" (it is {str(first['input'])[:80]!r})"
    end = "" if message.endswith("?") else "."
    return f"{at}: {key}: {message}{shown}{end}"


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = Scenario
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model that an annotation such as ``tuple[Population, ...]`` holds, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def schema() -> dict[str, Any]:
    """The JSON schema of a scenario file, for editors (Even Better TOML, taplo)."""
    found = Scenario.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return found
