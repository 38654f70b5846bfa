"""How one parameter is updated from its gradient: AdamW and Adafactor. A torch module.

A rule works on one tensor at a time, so that it can run as soon as the backward pass has made that
tensor's gradient. Except for fp32 AdamW, which is torch's own fused kernel, it works on slabs of
:data:`SLAB` elements: its temporaries are then some tens of MB and not several times the largest
tensor (an embedding of half a billion elements), on any device and without a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from talkoot.protocol.lowbit import SMALL, Table
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.recipes import Recipe

SLAB: Final = 2**22
"""Elements; a multiple of every block."""
FIRST: Final = "exp_avg"
SECOND: Final = "exp_avg_sq"
MOMENTS: Final = (FIRST, SECOND)
SCALE: Final = "_scale"
"""Behind the name of a quantised moment."""
ROW: Final = "row_var"
COLUMN: Final = "col_var"
VARIANCE: Final = "variance"

States = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What an update needs to know beside the tensors."""

    number: int
    """Of the optimizer's steps, from 1."""
    learning_rate: float
    weight_decay: float
    scale: Tensor  # () fp32: the gradient times this is used
    seed: int
    """Of stochastic rounding; of this step and parameter alone."""


class Rule:
    """One optimizer."""

    def __init__(self, recipe: Recipe, inner: InnerSpec) -> None:
        self.recipe = recipe
        self.inner = inner

    def states(self, parameter: Tensor) -> States:
        """All-zero states of ``parameter``, on its device."""
        raise NotImplementedError

    def update(self, parameter: Tensor, gradient: Tensor, states: States, step: Step) -> None:
        """Change ``parameter`` and ``states`` in place; ``gradient`` may be spoiled."""
        raise NotImplementedError


class FusedAdamW(Rule):
    """torch's AdamW (arXiv 1711.05101) with fp32 weights and moments.

    Fused where torch has a fused kernel for the device: one pass over memory and no temporaries.
    """

    def __init__(self, recipe: Recipe, inner: InnerSpec, device: torch.device) -> None:
        super().__init__(recipe, inner)
        self._fused = _has_fused(device)

    def states(self, parameter: Tensor) -> States:
        """Both moments."""
        return {key: torch.zeros_like(parameter.detach()) for key in MOMENTS}

    def update(self, parameter: Tensor, gradient: Tensor, states: States, step: Step) -> None:
        """One step of AdamW."""
        gradient.mul_(step.scale)
        # torch's fused kernels read the step count on the device, the others on the host.
        where = parameter.device if self._fused else torch.device("cpu")
        before = torch.full((), float(step.number - 1), dtype=torch.float32, device=where)
        adamw(
            [parameter.detach()],
            [gradient],
            [states[FIRST]],
            [states[SECOND]],
            [],
            [before],
            foreach=False,
            fused=self._fused,
            amsgrad=False,
            beta1=self.inner.beta1,
            beta2=self.inner.beta2,
            lr=step.learning_rate,
            weight_decay=step.weight_decay,
            eps=self.inner.epsilon,
            maximize=False,
        )


def _has_fused(device: torch.device) -> bool:
    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


class SlabAdamW(Rule):
    """AdamW computed in fp32, with weights and moments held in fewer bits."""

    def __init__(self, recipe: Recipe, inner: InnerSpec, device: torch.device) -> None:
        super().__init__(recipe, inner)
        self._tables: dict[str, Table] = {}
        if recipe.states in ("8-bit", "4-bit"):
            bits = 8 if recipe.states == "8-bit" else 4
            for key in MOMENTS:
                self._tables[key] = Table.make(bits, signed=key == FIRST, device=device)

    def states(self, parameter: Tensor) -> States:
        """Both moments; quantised ones with their scales."""
        numel, device = parameter.numel(), parameter.device
        if not self._tables or numel < SMALL:
            narrow = self.recipe.states == "bfloat16"
            dtype = torch.bfloat16 if narrow else torch.float32
            return {
                key: torch.zeros(parameter.shape, dtype=dtype, device=device) for key in MOMENTS
            }
        states = {}
        for key, table in self._tables.items():
            states[key], states[key + SCALE] = table.empty(numel, device)
        return states

    def update(self, parameter: Tensor, gradient: Tensor, states: States, step: Step) -> None:
        """One step of AdamW; moments are rounded only after they have been used."""
        inner, rate = self.inner, step.learning_rate
        correction1 = 1 - inner.beta1**step.number
        correction2 = 1 - inner.beta2**step.number
        flat, slopes = parameter.detach().view(-1), gradient.reshape(-1)
        dice = _dice(parameter.device, step.seed)
        for start, end in slabs(flat.numel()):
            slope = slopes[start:end].float() * step.scale
            first = self._load(states, FIRST, start, end).lerp_(slope, 1 - inner.beta1)
            second = self._load(states, SECOND, start, end)
            second.lerp_(slope.square_(), 1 - inner.beta2)
            self._store(states, FIRST, start, end, first, dice)
            self._store(states, SECOND, start, end, second, dice)
            weights = flat[start:end].float()
            if step.weight_decay:
                weights = weights * (1 - rate * step.weight_decay)
            second.sqrt_().div_(correction2**0.5).add_(inner.epsilon)
            weights = weights.addcdiv(first, second, value=-rate / correction1)
            write(flat[start:end], weights, dice if self.recipe.stochastic_rounding else None)

    def _load(self, states: States, key: str, start: int, end: int) -> Tensor:
        """(end - start,) fp32 in memory of its own."""
        if key + SCALE not in states:
            return states[key].view(-1)[start:end].to(torch.float32, copy=True)
        table = self._tables[key]
        first, last = start // table.block, -(-end // table.block)
        per_code = 8 // table.bits
        codes = states[key][first * table.block // per_code : last * table.block // per_code]
        return table.restore(codes, states[key + SCALE][first:last])[: end - start]

    def _store(
        self,
        states: States,
        key: str,
        start: int,
        end: int,
        values: Tensor,
        dice: torch.Generator | None,
    ) -> None:
        if key + SCALE not in states:
            # To nearest, a bf16 second moment would never shrink where 1 - beta2 is below the
            # rounding error (0.4 %): what it loses a step is then rounded away. Values are copied,
            # as the update still needs them.
            target = states[key].view(-1)[start:end]
            write(target, values.clone() if target.dtype != values.dtype else values, dice)
            return
        table = self._tables[key]
        first, last = start // table.block, -(-end // table.block)
        missing = (last - first) * table.block - values.numel()
        whole = torch.nn.functional.pad(values, (0, missing)) if missing else values
        codes, scales = table.quantise(whole)
        per_code = 8 // table.bits
        begin = first * table.block // per_code
        states[key][begin : begin + codes.numel()] = codes
        states[key + SCALE][first:last] = scales


class Adafactor(Rule):
    """Adafactor (arXiv 1804.04235, algorithm 4) without momentum, at the run's learning rate.

    The second moment of a matrix is the outer product of its row and column means. The rate is
    absolute, not relative to the weights' size, so that it means what it means for AdamW's nodes;
    the update's root mean square is kept at :data:`CLIP` of it or below (section 6).
    """

    CLIP: Final = 1.0
    DECAY: Final = -0.8
    EPSILON: Final = 1e-30

    def states(self, parameter: Tensor) -> States:
        """Row and column means of a matrix (of each, if there are more than two dimensions)."""
        shape, device = parameter.shape, parameter.device
        if parameter.dim() < 2:
            return {VARIANCE: torch.zeros(shape, dtype=torch.float32, device=device)}
        return {
            ROW: torch.zeros((*shape[:-1], 1), dtype=torch.float32, device=device),
            COLUMN: torch.zeros((*shape[:-2], 1, shape[-1]), dtype=torch.float32, device=device),
        }

    def update(self, parameter: Tensor, gradient: Tensor, states: States, step: Step) -> None:
        """One step of Adafactor; the gradient is read three times, slab by slab."""
        fresh = step.number**self.DECAY
        matrix = _matrix(parameter.detach())  # (matrices, rows, columns)
        slopes = _matrix(gradient)
        if parameter.dim() < 2:
            variance = _matrix(states[VARIANCE])
            for part in parts(matrix):
                variance[part].lerp_((slopes[part].float() * step.scale).square_(), fresh)
        else:
            self._factors(slopes, states, step.scale, fresh)
        squares = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for part in parts(matrix):
            squares += self._direction(slopes, states, part, step.scale).square_().sum()
        size = (squares / matrix.numel()).sqrt()
        factor = step.learning_rate / (size / self.CLIP).clamp(min=1.0)
        dice = _dice(parameter.device, step.seed)
        for part in parts(matrix):
            weights = matrix[part].float()
            if step.weight_decay:
                weights = weights * (1 - step.learning_rate * step.weight_decay)
            weights = weights - self._direction(slopes, states, part, step.scale).mul_(factor)
            write(matrix[part], weights, dice if self.recipe.stochastic_rounding else None)

    def _factors(self, slopes: Tensor, states: States, scale: Tensor, fresh: float) -> None:
        """Take the gradient into the row and column means."""
        rows, columns = _matrix(states[ROW]), _matrix(states[COLUMN])
        sums = torch.zeros_like(columns)
        for part in parts(slopes):
            squares = (slopes[part].float() * scale).square_()
            rows[part].lerp_(squares.mean(-1, keepdim=True), fresh)
            sums[part[0]] += squares.sum(-2, keepdim=True)
        columns.lerp_(sums.div_(slopes.shape[1]), fresh)

    def _direction(
        self, slopes: Tensor, states: States, part: tuple[slice, slice], scale: Tensor
    ) -> Tensor:
        """The gradient over the root of its second moment, for some rows."""
        slope = slopes[part].float() * scale
        if VARIANCE in states:
            return slope.mul_(_matrix(states[VARIANCE])[part].clamp(min=self.EPSILON).rsqrt())
        rows = _matrix(states[ROW])
        share = rows[part] / rows[part[0]].mean(-2, keepdim=True).clamp(min=self.EPSILON)
        slope.mul_(share.clamp_(min=self.EPSILON).rsqrt_())
        return slope.mul_(_matrix(states[COLUMN])[part[0]].clamp(min=self.EPSILON).rsqrt())


def _matrix(tensor: Tensor) -> Tensor:
    """A view of three dimensions: (matrices, rows, columns); a vector is one column of rows."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1, 1)
    return tensor.reshape(-1, *tensor.shape[-2:])


def parts(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index of some rows of one matrix, of about a slab at a time."""
    rows = max(1, SLAB // matrix.shape[2])
    for number in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], rows):
            yield slice(number, number + 1), slice(start, start + rows)


def slabs(numel: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive slabs."""
    for start in range(0, numel, SLAB):
        yield start, min(start + SLAB, numel)


def _dice(device: torch.device, seed: int) -> torch.Generator:
    dice = torch.Generator(device)
    dice.manual_seed(seed)
    return dice


def write(target: Tensor, values: Tensor, dice: torch.Generator | None) -> None:
    """Copy fp32 ``values`` into ``target``; with ``dice``, bf16 is rounded stochastically.

    A value between two bf16 numbers becomes the upper with the probability of where it lies between
    them, so that small updates arrive on average: to nearest they are lost one and all (arXiv
    2010.06192). ``values`` may be spoiled.
    """
    if dice is None or target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    values = values.contiguous()
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 2**16, generator=dice)
    # bf16 is the upper half of an fp32: adding below carries into it as often as it should.
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    target.copy_(values)


def make_rule(recipe: Recipe, inner: InnerSpec, device: torch.device) -> Rule:
    """The rule of ``recipe`` for weights on ``device``."""
    if recipe.optimizer == "adafactor":
        return Adafactor(recipe, inner)
    if (recipe.trained, recipe.states) == ("float32", "float32"):
        return FusedAdamW(recipe, inner, device)
    return SlabAdamW(recipe, inner, device)
