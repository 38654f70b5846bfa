"""Adapter runs: small matrices that are trained beside weights that stay. A torch module.

LoRA (arXiv 2106.09685, section 4.1): a linear layer ``W x`` becomes ``W x + (alpha / rank) B A x``
with A (rank, in) and B (out, rank). B begins at zero, so that version 0 is the base itself. The
frozen weights may be held in 4 bits (QLoRA, arXiv 2305.14314, section 3). Why the layer is ours
and not PEFT's is in ADR 22; an export is read by PEFT.

A layer keeps its name and its weights' names; what is added is called ``….lora_A`` and
``….lora_B``. Only these have a gradient, so they are what ``named_trainable`` gives, what the
manifest lists and what travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from talkoot.protocol.errors import CapacityError, ConfigError, StateError
from talkoot.protocol.lowbit import levels_of
from talkoot.protocol.manifest import Manifest, TensorSpec, manifest_of
from talkoot.protocol.messages import AdapterSpec
from talkoot.protocol.model import build_model, named_trainable
from talkoot.protocol.weights import WeightsReader

A: Final = "lora_A"
B: Final = "lora_B"
NF4_BLOCK: Final = 64
"""Elements that share a scale."""
SCALES_BLOCK: Final = 256
"""Scales, held in 8 bits, that share a scale of theirs."""

GetBase = Callable[[str], Tensor]
"""A base weight by its name: on the CPU, in any float dtype."""


class _Dequantised(torch.autograd.Function):
    """``x @ W.T + bias`` with W in 4 bits, which is restored twice and kept never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Packed, bias: Tensor | None) -> Tensor:
        ctx.held = held
        return functional.linear(x, held.restore(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (upstream,) = gradients
        return upstream @ ctx.held.restore(upstream.dtype), None, None


class _Packed:
    """One matrix in NF4 with double quantisation (arXiv 2305.14314, section 3), by bitsandbytes."""

    def __init__(self, weight: Tensor) -> None:
        functions = _bitsandbytes()
        self._functions = functions
        self._packed, state = functions.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        # As bitsandbytes does with compress_statistics, but with levels made here: its own are
        # made once and kept, which cannot work when the first use is on fake tensors.
        levels = torch.tensor(levels_of(8, signed=True), device=weight.device)
        offset = state.absmax.mean()
        scales, scales_state = functions.quantize_blockwise(
            state.absmax - offset, code=levels, blocksize=SCALES_BLOCK
        )
        self._state = functions.QuantState(
            absmax=scales,
            shape=state.shape,
            dtype=state.dtype,
            blocksize=state.blocksize,
            code=state.code,
            quant_type=state.quant_type,
            offset=offset,
            state2=scales_state,
        )

    def restore(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in ``dtype``."""
        weight: Tensor = self._functions.dequantize_4bit(self._packed, self._state)
        return weight.to(dtype)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functions
    except Exception as err:  # a broken CUDA set-up raises what it likes
        raise CapacityError(
            "This recipe holds the frozen weights in 4 bits, which needs bitsandbytes: install "
            "talkoot[adapters], or choose another recipe.",
            code="package-missing",
        ) from err
    return functions


class LoraLinear(nn.Linear):
    """A frozen linear layer in place of an ordinary one, whose weights it takes over.

    Args:
        linear: the ordinary one.
        spec: of the adapter; None is a layer without one.
    """

    def __init__(self, linear: nn.Linear, spec: AdapterSpec | None) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: _Packed | None = None
        self._scale = 0.0
        self.lora_A: nn.Parameter | None = None  # (rank, in) fp32
        self.lora_B: nn.Parameter | None = None  # (out, rank) fp32
        if spec is not None:
            self._scale = spec.alpha / spec.rank
            where = linear.weight.device
            self.lora_A = _fresh((spec.rank, linear.in_features), where)
            self.lora_B = _fresh((linear.out_features, spec.rank), where)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if self._packed is None:
            y = functional.linear(x, self.weight, self.bias)
        else:
            apply: Callable[..., Tensor] = _Dequantised.apply
            y = apply(x, self._packed, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        # The adapters are fp32, whatever the base is: small, and updated by small steps.
        narrow = functional.linear(x, self.lora_A.to(x.dtype))
        return y + functional.linear(narrow, self.lora_B.to(x.dtype)) * self._scale

    def quantise(self) -> None:
        """Hold the weight in 4 bits from now on."""
        self._packed = _Packed(self.weight.detach())
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def _fresh(shape: Sequence[int], where: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=torch.float32, device=where))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _targets(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by name.

    Raises :class:`ConfigError` for a target that names no linear layer of this model.
    """
    found: dict[str, nn.Linear] = {}
    missing = set(spec.targets)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in spec.targets and isinstance(module, nn.Linear):
            found[name] = module
            missing.discard(last)
    if missing:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ConfigError(
            f"adapter.targets: this model has no linear layer named {min(missing)!r}: choose from "
            f"{', '.join(sorted(linear))}.",
            code="adapter-targets",
        )
    head = model.get_output_embeddings()  # type: ignore[operator]  # of PreTrainedModel
    for name, module in found.items():
        if module is head:
            raise ConfigError(
                f"adapter.targets: {name!r} is the output head, which may be tied to the input: "
                "choose layers inside the model.",
                code="adapter-targets",
            )
    return found


def base_manifest(config: dict[str, Any], spec: AdapterSpec) -> Manifest:
    """The tensors of the base checkpoint: every parameter of the model, in the base's dtype."""
    outline = build_model(config, seed=None, device="cpu", meta=True)
    tensors = manifest_of(named_trainable(outline)).tensors
    return Manifest(
        tensors=tuple(
            TensorSpec(name=tensor.name, shape=tensor.shape, dtype=spec.base_dtype)
            for tensor in tensors
        )
    )


def model_of(
    config: dict[str, Any],
    spec: AdapterSpec | None,
    base: Path | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model of a run, of either kind, with what is trained left unset.

    Args:
        config: the model's.
        spec: the run's adapters, if it has any.
        base: the file of its frozen weights then.
        device: where everything goes.
        dtype: of the weights.

    Raises:
        ProtocolError: ``base`` is not the base of this model.
    """
    if spec is None:
        return build_model(config, seed=None, device=device, dtype=dtype)
    get = open_base(config, spec, base)
    return build_adapted(config, spec, get, dtype=dtype, quantise=False, seed=None, device=device)


def open_base(config: dict[str, Any], spec: AdapterSpec, path: Path | None) -> GetBase:
    """Hold the header of a base checkpoint against the model; returns what reads it.

    Raises :class:`ProtocolError` when it is another model's, :class:`StateError` when it is not
    there.
    """
    if path is None:
        raise StateError(
            "This run trains adapters and its base weights are not at hand: fetch them first.",
            code="no-base",
        )
    return WeightsReader(path, base_manifest(config, spec)).get


def adapted_outline(config: dict[str, Any], spec: AdapterSpec) -> nn.Module:
    """The model with adapters and without memory; ``named_trainable`` gives the adapters.

    Raises :class:`ConfigError` when a target is not in this model.
    """
    model = build_model(config, seed=None, device="cpu", meta=True)
    _insert(model, spec)
    return model


def adapt(model: nn.Module, spec: AdapterSpec, seed: int) -> None:
    """Freeze a model of memory and give it fresh adapters.

    Raises :class:`ConfigError` when a target is not in this model.
    """
    _insert(model, spec)
    draw_adapters(model, seed)


def _insert(model: nn.Module, spec: AdapterSpec) -> None:
    model.requires_grad_(False)
    for name, linear in _targets(model, spec).items():
        _replace(model, name, LoraLinear(linear, spec))


def build_adapted(
    config: dict[str, Any],
    spec: AdapterSpec,
    get: GetBase,
    *,
    dtype: torch.dtype,
    quantise: bool,
    seed: int | None,
    device: torch.device | str,
) -> nn.Module:
    """The model with its base weights and adapters, in training mode.

    The base comes tensor by tensor, so that what is quantised is never there as a whole.

    Args:
        config: the model's.
        spec: the run's adapters.
        get: the base weights.
        dtype: of the frozen weights, but for the quantised ones.
        quantise: hold all linear layers except the head in 4 bits.
        seed: of the adapters (:func:`draw_adapters`); ``None`` leaves them unset.
        device: where everything goes.

    Raises:
        CapacityError: code ``"package-missing"``: 4 bits without bitsandbytes.
        ConfigError: a target is not in this model.
    """
    where = torch.device(device)
    model = build_model(config, seed=None, device="cpu", dtype=dtype, meta=True)
    _insert(model, spec)
    base = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    quantised = _quantised(model) if quantise else {}
    for name, parameter in base:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        filled = get(name).to(device=where, dtype=parameter.dtype)
        setattr(module, last, nn.Parameter(filled, requires_grad=False))
        if last == "weight" and owner in quantised:
            quantised[owner].quantise()
    for name, parameter in named_trainable(model):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, _fresh(parameter.shape, where))
    model.tie_weights()  # type: ignore[operator]  # a method of PreTrainedModel
    _fill_buffers(model, where)
    if seed is not None:
        draw_adapters(model, seed)
    return model.train()


def _quantised(model: nn.Module) -> dict[str, LoraLinear]:
    """All linear layers but the head, adapters or none, by name."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            found[name] = module
        elif isinstance(module, nn.Linear) and module is not head:
            found[name] = LoraLinear(module, None)
            _replace(model, name, found[name])
    return found


@torch.no_grad()
def _fill_buffers(model: nn.Module, where: torch.device) -> None:
    """Compute what is neither a parameter nor in any file (rotary frequencies)."""
    for module in model.modules():
        empty = [(n, b) for n, b in module.named_buffers(recurse=False) if b.is_meta]
        for name, buffer in empty:
            lasts = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.empty_like(buffer, device=where), persistent=lasts)
        if empty:
            model._init_weights(module)  # type: ignore[operator]  # as from_pretrained does


@torch.no_grad()
def draw_adapters(model: nn.Module, seed: int) -> None:
    """A uniform within 1/sqrt(in) (as ``nn.Linear`` begins, and PEFT), drawn on the CPU; B zero."""
    dice = torch.Generator()
    dice.manual_seed(seed)
    for name, parameter in named_trainable(model):
        if name.endswith(B):
            parameter.zero_()
            continue
        bound = 1.0 / math.sqrt(parameter.shape[1])
        drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=dice)
        parameter.copy_(drawn)


def drawn_base(config: dict[str, Any], spec: AdapterSpec, seed: int) -> GetBase:
    """Base weights of a proof, tensor by tensor in any order: no checkpoint is needed for one.

    Matrices are normal with a deviation of 0.02, gains are one, biases are zero. The same on every
    machine under one torch version.
    """
    manifest = base_manifest(config, spec)

    def get(name: str) -> Tensor:
        tensor = manifest.spec(name)
        if len(tensor.shape) < 2:
            return (torch.zeros if name.endswith("bias") else torch.ones)(tensor.shape)
        dice = torch.Generator()
        dice.manual_seed((seed + manifest.index[name] * 0x9E3779B97F4A7C15) % 2**63)
        drawn = torch.empty(tensor.shape, dtype=getattr(torch, spec.base_dtype))
        return drawn.normal_(0.0, 0.02, generator=dice)

    return get


def merged(
    config: dict[str, Any], spec: AdapterSpec, base: GetBase, adapters: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model with the adapters added to it, by name: fp32, on the CPU.

    The sum is the definition: ``W + (alpha / rank) B A``, in fp32.
    """
    outline = adapted_outline(config, spec)
    adapted = {n for n, m in outline.named_modules() if isinstance(m, LoraLinear)}
    for name, parameter in outline.named_parameters():
        if parameter.requires_grad:
            continue
        weight = base(name).float()
        owner, _, last = name.rpartition(".")
        if owner in adapted and last == "weight":
            added = adapters(f"{owner}.{B}").float() @ adapters(f"{owner}.{A}").float()
            weight = weight + added * (spec.alpha / spec.rank)
        yield name, weight
