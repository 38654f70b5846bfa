"""Models from a transformers config: validated, built offline, the same weights from a seed.

A config is data from the network, so it is checked as such (:func:`parse_config`): only families
that are known here, no key that makes transformers fetch or execute code, no absurd sizes. torch
and transformers are imported inside the functions that need them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from talkoot.protocol import limits
from talkoot.protocol.errors import ConfigError, ProtocolError, TalkootError

if TYPE_CHECKING:
    import torch

BYTE_VOCABULARY: Final = 260
"""256 byte values, then bos, eos and pad (``tokenizer.py``), padded to a multiple of four."""
MAX_CONFIG: Final = 64 * limits.KIB
MAX_LAYERS: Final = 512
MAX_CONFIG_NUMBER: Final = 2**31
MAX_CONFIG_DEPTH: Final = 6

FAMILIES: Final = frozenset(
    {
        *("gemma", "glm4", "gpt2", "gpt_neox", "granite", "llama", "ministral"),
        *("mistral", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen3", "smollm3"),
        *("stablelm", "starcoder2"),
    }
)
"""Decoder families (dense but for olmoe, a mixture of experts) that build offline, hold all their
state in parameters and train under "sdpa" attention. Another one is added here once
``tests/protocol/test_model.py`` passes with it."""

FORBIDDEN_KEYS: Final = frozenset(
    {
        # fetch or execute code from elsewhere
        *("auto_map", "trust_remote_code", "custom_pipelines", "code_revision", "name_or_path"),
        *("attn_implementation", "experts_implementation", "use_kernels", "kernel_config"),
        *("backbone", "use_timm_backbone", "quantization_config", "allow_all_kernels"),
        # change what named_parameters means
        *("tp_plan", "pp_plan", "distributed_config", "sub_configs"),
    }
)
"""Keys that no config of ours may hold, at any depth; nor may any key that starts with ``_``."""

_LAYER_KEYS: Final = frozenset({"num_hidden_layers", "n_layer", "num_layers"})


def _llama_like(
    model_type: str,
    *,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    tied: bool,
    rope_theta: float = 10_000.0,
    epsilon: float = 1e-5,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rms_norm_eps": epsilon,
        **more,
    }


_BYTES: Final[dict[str, Any]] = {
    "vocab": BYTE_VOCABULARY,
    "positions": 2048,
    "tied": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

PRESETS: Final[Mapping[str, dict[str, Any]]] = {
    "nano": _llama_like("llama", hidden=64, mlp=160, layers=2, heads=4, kv_heads=4, **_BYTES),
    "tiny": _llama_like("llama", hidden=128, mlp=352, layers=5, heads=4, kv_heads=4, **_BYTES),
    "small": _llama_like("llama", hidden=256, mlp=704, layers=5, heads=4, kv_heads=4, **_BYTES),
    "smollm2-135m": _llama_like(
        "llama",
        hidden=576,
        mlp=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocab=49_152,
        positions=8192,
        tied=True,
        rope_theta=100_000.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama-2-7b": _llama_like(
        "llama",
        hidden=4096,
        mlp=11_008,
        layers=32,
        heads=32,
        kv_heads=32,
        vocab=32_000,
        positions=4096,
        tied=False,
    ),
    "mistral-7b": _llama_like(
        "mistral",
        hidden=4096,
        mlp=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=32_000,
        positions=32_768,
        tied=False,
        sliding_window=4096,
    ),
    "qwen2.5-7b": _llama_like(
        "qwen2",
        hidden=3584,
        mlp=18_944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocab=152_064,
        positions=131_072,
        tied=False,
        rope_theta=1_000_000.0,
        epsilon=1e-6,
        bos_token_id=151_643,
        eos_token_id=151_643,
    ),
    "olmo-2-7b": _llama_like(
        "olmo2",
        hidden=4096,
        mlp=11_008,
        layers=32,
        heads=32,
        kv_heads=32,
        vocab=100_352,
        positions=4096,
        tied=False,
        rope_theta=500_000.0,
        epsilon=1e-6,
        bos_token_id=100_257,
        eos_token_id=100_257,
        pad_token_id=100_277,
    ),
    "olmoe-1b-7b": _llama_like(
        "olmoe",
        hidden=2048,
        mlp=1024,
        layers=16,
        heads=16,
        kv_heads=16,
        vocab=50_304,
        positions=4096,
        tied=False,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        eos_token_id=50_279,
        pad_token_id=1,
    ),
}
"""Parameters: nano 111 thousand, tiny 1.0 million, small 4.1 million (the demo's); the rest as
published."""


def preset(name: str) -> dict[str, Any]:
    """A copy of one of :data:`PRESETS`. Raises :class:`ConfigError` on an unknown name."""
    if name not in PRESETS:
        raise ConfigError(
            f"There is no model preset named {name!r}: choose one of {', '.join(PRESETS)}.",
            code="unknown-preset",
        )
    copied: dict[str, Any] = json.loads(json.dumps(PRESETS[name]))
    return copied


def _bad(sentence: str) -> ProtocolError:
    return ProtocolError(f"The model config is refused: {sentence}.", code="config-refused")


def _check_value(key: str, value: object, depth: int) -> None:
    if depth > MAX_CONFIG_DEPTH:
        raise _bad(f"it nests deeper than {MAX_CONFIG_DEPTH} levels")
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            if not isinstance(inner_key, str) or not 1 <= len(inner_key) <= 64:
                raise _bad("a key is not a short string")
            if inner_key.startswith("_") or inner_key in FORBIDDEN_KEYS:
                raise _bad(f"the key {inner_key!r} could load or run code from elsewhere")
            _check_value(inner_key, inner, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(key, item, depth + 1)
    elif isinstance(value, str):
        if len(value) > 256:
            raise _bad(f"the value of {key!r} is a string of more than 256 characters")
    elif isinstance(value, int | float):
        # Comparing is exact for integers of any size, and false for NaN.
        if not abs(value) < MAX_CONFIG_NUMBER:
            raise _bad(f"the value of {key!r} is out of range")
        if key in _LAYER_KEYS and value > MAX_LAYERS:
            raise _bad(f"{key!r} is over {MAX_LAYERS}")
    elif value is not None:
        raise _bad(f"the value of {key!r} is not JSON")


def check_config(config: object) -> dict[str, Any]:
    """Return ``config`` if it is a config that may be built; else :class:`ProtocolError`."""
    if not isinstance(config, dict):
        raise _bad("it is not a JSON object")
    _check_value("config", config, 0)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise _bad(f"model_type {family!r} is not one of {', '.join(sorted(FAMILIES))}")
    return config


def config_bytes(config: dict[str, Any]) -> bytes:
    """The one encoding of a config, which its digest names: sorted keys, no spaces, ASCII."""
    check_config(config)
    return json.dumps(
        config, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def parse_config(data: bytes) -> dict[str, Any]:
    """Read a config that came from the network. Raises :class:`ProtocolError`."""
    if len(data) > MAX_CONFIG:
        raise _bad(f"its {len(data)} bytes are over the cap of {MAX_CONFIG}")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise _bad("it is not JSON") from err
    return check_config(config)


def _instantiate(config: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = dict(config)
    family = settings.pop("model_type")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _bad(f"the installed transformers has no causal language model {family!r}")
    hf_config = AutoConfig.for_model(family, **settings)
    for key, value in hf_config.to_dict().items():
        # Some families drop activations by default. A resumed lease must repeat the same floats,
        # and a random state is one more thing to save, so nothing is dropped.
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(hf_config, key, 0.0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        hf_config, dtype=dtype, attn_implementation="sdpa"
    )
    return model


_BUILDING: Final = threading.Lock()
"""The generator that weights are drawn from, and transformers' switches, are the process's: two
models built by two threads at once would each get some of the other's random numbers."""


def build_model(
    config: dict[str, Any],
    *,
    seed: int | None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    meta: bool = False,
) -> torch.nn.Module:
    """Build the model of ``config``, in training mode, without touching the network.

    Args:
        config: as :func:`parse_config` returns it.
        seed: of the initial weights: drawn on the CPU, so that every device starts from the same
            bits under one torch version. ``None`` leaves the weights unset: whoever asks for that
            fills every parameter.
        device: where the parameters go.
        dtype: of the parameters; fp32 if ``None``.
        meta: shapes without memory; ``seed`` and ``device`` are then unused.

    Raises:
        ProtocolError: the config is refused, or transformers cannot build it.
    """
    import torch

    check_config(config)
    with _BUILDING:
        model = _build(config, seed, torch.float32 if dtype is None else dtype, meta)
    where = torch.device(device)
    if where.type != "cpu" and not meta:  # fake tensors, on the CPU, cannot be moved at all
        model = model.to(where)
    return model.train()


def _build(
    config: dict[str, Any], seed: int | None, kind: torch.dtype, meta: bool
) -> torch.nn.Module:
    """On the CPU, or of no memory."""
    import torch
    from transformers.initialization import no_init_weights

    try:
        # First without memory: a size is checked before anything is allocated for it.
        with torch.device("meta"):
            outline = _instantiate(config, kind)
        parameters = sum(p.numel() for p in outline.parameters())
        if parameters > limits.MAX_PARAMETERS:
            raise _bad(f"{parameters} parameters are over the cap of {limits.MAX_PARAMETERS}")
        if meta:
            return outline
        if seed is None:
            with no_init_weights():
                model = _instantiate(config, kind)
            # Tying is part of the initialisation that was skipped.
            model.tie_weights()  # type: ignore[operator]  # a method of PreTrainedModel
            return model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _instantiate(config, kind)
    except (TalkootError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:
        first_line = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
        raise _bad(f"transformers cannot build it ({first_line})") from err


def named_trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """What is trained, with its names, in the manifest's order; tied weights appear once."""
    return [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def count_parameters(config: dict[str, Any]) -> int:
    """Number of trainable parameters, tied weights once; no weights are allocated."""
    return sum(
        p.numel() for p in build_model(config, seed=None, device="cpu", meta=True).parameters()
    )


_SKIPPED_KEYS: Final = frozenset({"architectures", "transformers_version", "dtype", "torch_dtype"})


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a transformers model, without what a config of ours does not hold.

    Raises:
        ConfigError: it cannot be read.
        ProtocolError: it is refused.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ConfigError(f"{path} is too big to be a model config: check the directory.")
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"{path.parent} is not a transformers model directory ({path.name}: {err}): "
            "give the directory that holds config.json and model.safetensors.",
            code="no-model",
        ) from err
    items = raw.items() if isinstance(raw, dict) else ()
    kept = {key: value for key, value in items if key not in _SKIPPED_KEYS and key[:1] != "_"}
    return check_config(kept)


def named_config(model: str) -> dict[str, Any]:
    """The config that a person means: a preset's name, a model directory, or a config file.

    Raises:
        ConfigError: there is no such thing.
        ProtocolError: the config is refused.
    """
    path = Path(model)
    if model in PRESETS or not (path.exists() or path.suffix or len(path.parts) > 1):
        return preset(model)
    return read_config(path / "config.json" if path.is_dir() else path)


def load_pretrained(directory: Path) -> tuple[dict[str, Any], torch.nn.Module]:
    """Load a local transformers model directory: ``(config, model)``, fp32, on the CPU.

    Only safetensors weights are read. The returned config is one that :func:`parse_config` accepts.

    Raises:
        ConfigError: no such directory, or no causal language model of a known family in it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(directory / "config.json")
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"The weights in {directory} cannot be loaded ({err}): export the model again as "
            "safetensors.",
            code="no-model",
        ) from err
    return config, model.train()
