"""Plans that are known already: the shipped table, and what this machine has simulated. No torch.

``table.json`` holds the usual 7B-class models under every recipe (``tools/memory_table.py`` makes
it). Everything else is simulated once, in a child process, and kept in a cache directory under a
key that names the config, the sequence length, the micro-batch, the recipe, the codec and the code
that the answer depends on; so a plan of an older talkoot, torch or transformers is never taken.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import CapacityError, TalkootError
from talkoot.protocol.files import write_atomic
from talkoot.protocol.memory import MemoryPlan, predict
from talkoot.protocol.messages import CodecSpec, RunSpec
from talkoot.protocol.model import config_bytes
from talkoot.protocol.recipes import Recipe, get, recipes_of

CODE: Final = (
    *("codec", "codec_bits", "codec_encode", "losses", "lowbit", "memory", "model"),
    *("recipes", "replica", "rules"),
    *("planner/allocator", "planner/simulate", "planner/tracker"),
)
"""Modules that decide a plan."""
CACHE_VARIABLE: Final = "TALKOOT_PLANS"
MAX_PLAN: Final = 64 * 1024
CHILD_SECONDS: Final = 1800.0
"""A 7B model takes 10 to 60 s a recipe; a much larger one on a busy machine takes longer."""


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the config's one encoding, hexadecimal."""
    return hashlib.sha256(config_bytes(config)).hexdigest()


_PARSING: Final = threading.Lock()
"""CPython 3.11's ``ast.parse`` fails now and then when two threads are in it (SystemError,
"recursion depth mismatch"), and a gateway enrols many nodes at once."""


def code_digest() -> str:
    """Of what a plan depends on: the code (not its comments), torch and transformers."""
    with _PARSING:
        return _code_digest()


@functools.cache
def _code_digest() -> str:
    sha = hashlib.sha256()
    root = files("talkoot.protocol")
    for name in CODE:
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                rest = [part for part in body if not _is_docstring(part)]
                node.body = rest  # type: ignore[attr-defined]
        sha.update(ast.dump(tree).encode())
    for package in ("torch", "transformers"):
        sha.update(f"{package} {version(package)}\n".encode())
    return sha.hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def cache_directory() -> Path:
    """Where simulated plans are kept: ``$TALKOOT_PLANS``, or below the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "talkoot" / "plans"


def table_key(
    config: dict[str, Any], sequence_length: int, micro_batch: int, accumulated: bool = False
) -> str:
    """The key of a model's plans in the table."""
    key = f"{config_digest(config)}/{sequence_length}/{micro_batch}"
    return f"{key}/accumulated" if accumulated else key


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The shipped table: plans by :func:`table_key` and recipe."""
    path = files("talkoot.protocol") / "planner" / "table.json"
    loaded: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["plans"]
    return loaded


def _cache_path(
    config: dict[str, Any],
    sequence_length: int,
    micro_batch: int,
    recipe: Recipe,
    codec: CodecSpec,
    accumulated: bool,
) -> Path:
    parts = (
        config_digest(config),
        sequence_length,
        micro_batch,
        recipe.name,
        codec.model_dump_json(),
        code_digest(),
        accumulated and recipe.accumulates,
    )
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_directory() / f"{name}.json"


def known(
    config: dict[str, Any],
    recipe: Recipe,
    *,
    sequence_length: int,
    micro_batch: int,
    codec: CodecSpec | None = None,
    accumulated: bool = False,
) -> MemoryPlan | None:
    """The plan from the cache or the table, if there is one. A damaged cache file is no plan.

    ``accumulated`` is as in :func:`~talkoot.protocol.memory.predict`, here and below.
    """
    spec = codec or CodecSpec()
    path = _cache_path(config, sequence_length, micro_batch, recipe, spec, accumulated)
    try:
        if path.stat().st_size <= MAX_PLAN:
            return MemoryPlan.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if spec != CodecSpec():
        return None
    summed = accumulated and recipe.accumulates
    rows = table().get(table_key(config, sequence_length, micro_batch, summed), {})
    row = rows.get(recipe.name)
    return None if row is None else MemoryPlan.from_dict({**row, "source": "table"})


def keep(
    plan: MemoryPlan,
    config: dict[str, Any],
    *,
    sequence_length: int,
    micro_batch: int,
    codec: CodecSpec,
    accumulated: bool = False,
) -> None:
    """Put a simulated plan into the cache; a cache that cannot be written is no error."""
    recipe = get(plan.recipe)
    path = _cache_path(config, sequence_length, micro_batch, recipe, codec, accumulated)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(plan.as_dict(), sort_keys=True).encode())
    except (OSError, TalkootError):
        pass


def quick(
    config: dict[str, Any],
    recipe: Recipe,
    *,
    sequence_length: int,
    micro_batch: int,
    parameters: int | None = None,
    codec: CodecSpec | None = None,
    accumulated: bool = False,
) -> MemoryPlan:
    """The known plan, or else the one in closed form. Never slow.

    Raises:
        ConfigError: neither is there, and the config lacks a number that the formula needs.
    """
    plan = known(
        config,
        recipe,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        codec=codec,
        accumulated=accumulated,
    )
    return plan or predict(
        config,
        sequence_length,
        micro_batch,
        recipe=recipe,
        parameters=parameters,
        accumulated=accumulated,
    )


def of_run(spec: RunSpec, config: dict[str, Any], recipe: Recipe) -> MemoryPlan:
    """The plan of a run's replica, known or in closed form.

    Raises:
        ConfigError: the recipe is for the other kind of run, or the config lacks a number.
    """
    accumulated = spec.inner.max_steps > 0  # how long its leases will be, nobody knows yet
    if spec.adapter is not None:
        return predict(
            config,
            spec.sequence_length,
            spec.micro_batch,
            recipe=recipe,
            parameters=spec.parameters,
            adapter=spec.adapter,
            accumulated=accumulated,
        )
    return quick(
        config,
        recipe,
        sequence_length=spec.sequence_length,
        micro_batch=spec.micro_batch,
        parameters=spec.parameters,
        codec=spec.uplink,
        accumulated=accumulated,
    )


def all_of_run(spec: RunSpec, config: dict[str, Any]) -> list[MemoryPlan]:
    """The plans of all recipes of a run's kind."""
    return [
        of_run(spec, config, recipe) for recipe in recipes_of(spec.adapter is not None).values()
    ]


def simulated(
    config: dict[str, Any],
    recipes: Iterable[Recipe],
    *,
    sequence_length: int,
    micro_batch: int,
    codec: CodecSpec | None = None,
    accumulated: bool = False,
) -> dict[str, MemoryPlan]:
    """Known plans, and simulations (in one child process, kept) of those that are not known.

    Raises:
        CapacityError: the child did not end well.
        TalkootError: what the simulation itself said.
    """
    spec = codec or CodecSpec()
    plans, missing = dict[str, MemoryPlan](), []
    for recipe in recipes:
        plan = known(
            config,
            recipe,
            sequence_length=sequence_length,
            micro_batch=micro_batch,
            codec=spec,
            accumulated=accumulated,
        )
        if plan is None:
            missing.append(recipe)
        else:
            plans[recipe.name] = plan
    if missing:
        request = {
            "config": config,
            "recipes": [recipe.name for recipe in missing],
            "sequence_length": sequence_length,
            "micro_batch": micro_batch,
            "codec": spec.model_dump(mode="json"),
            "accumulated": accumulated,
        }
        for plan in _ask_child(request):
            keep(
                plan,
                config,
                sequence_length=sequence_length,
                micro_batch=micro_batch,
                codec=spec,
                accumulated=accumulated,
            )
            plans[plan.recipe] = plan
    return plans


def _ask_child(request: dict[str, Any]) -> list[MemoryPlan]:
    """One plan a line from ``python -m talkoot.protocol.planner``."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "talkoot.protocol.planner"],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise CapacityError(
            f"The simulation did not end ({err}): try again when the machine is less busy.",
            code="not-simulated",
        ) from err
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if lines and "sentence" in lines[-1]:
        raise CapacityError(str(lines[-1]["sentence"]), code=str(lines[-1]["code"]))
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CapacityError(
            f"The simulation failed ({(reason or ['no reason given'])[-1][:300]}): report it with "
            "the model's config.",
            code="not-simulated",
        )
    return [MemoryPlan.from_dict(line) for line in lines]
