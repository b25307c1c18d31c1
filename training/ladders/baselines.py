"""What a static compressor makes of an adapter: the baselines that a ladder must beat at equal bytes.

Four of them, one contract. Each takes the adapter as it was trained and looks at no data:

    plain_svd   the leading singular directions of every update, 16 bits a value: a rung of the `svd` ladder
    converted   the same by PEFT's own hand, through a dense SVD: what a user reaches for first
    uniform     round-to-nearest of A and B as they are, 8, 4 or 3 bits
    loraquant   singular directions, the leading ones in 2 or 3 bits, the rest in 1

What comes back is decoded, so that one piece of code can run them all, beside the bytes that a file of them takes:
codes at their bits, 16 bits for a scale. Factors in 16 bits are counted so and not rounded, as those of a ladder are.

Shape legend: r a module's rank, n stored directions, R rows, D values of a row, G groups of a row.
Source: Eckart-Young; PEFT, `convert_to_lora`; LoRAQuant, arXiv 2510.26690, and the code its authors published.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from policy.limits import Number, Whole
from policy.rungs import LARGEST_RANK
from runtime.ladder import Adapter, svd_factors
from runtime.ladder.adapter import PREFIX

GROUP = 128
"""Values of a row that share a scale, at most."""
VALUE_BYTES = SCALE_BYTES = 2
REFINE_STEPS = 300
REFINE_RATE = 1e-2
BATCH_VALUES = 2**15 - 1
"""Values of a factor that are refined together: they stay in one core's cache, and torch takes no second thread."""
LONGEST_ROW = 2**31 - 1

RANK = Whole(1, LARGEST_RANK)


@dataclass(frozen=True)
class Compressed:
    """An adapter as a compressor stores it, read back."""

    name: str
    """Compressor and setting: `svd 16`, `convert_to_lora 16`, `int4`, `loraquant 2@0.9`."""
    bytes: float
    """Of all that is stored, scales and zero points included."""
    modules: dict[str, tuple[Tensor, Tensor]]
    """By module path: a [n, d_in] and b [n, d_out], float32; the update is `b.T @ a`, the adapter's scale in it."""


def plain_svd(adapter: Adapter, rank: int) -> Compressed:
    """The `rank` leading singular directions of every module's update, or all where it has fewer.

    Two bytes a value: 2 · n · (d_in + d_out) a module. Raises ValueError for a rank below 1 and an update that
    overflows float32. Source: Eckart-Young; `runtime.ladder.svd_factors`.
    """
    rank = RANK.take("rank", rank)
    factors = {name: svd_factors(module) for name, module in adapter.modules.items()}
    modules = {name: (a[:rank], b[:rank]) for name, (a, b, _) in factors.items()}
    return Compressed(f"svd {rank}", _wide_bytes(modules), modules)


def converted(model: nn.Module, adapter_folder: str | Path, rank: int, *, peft: ModuleType) -> Compressed:
    """What `peft.convert_to_lora` makes of the adapter at `rank`, two bytes a value that it returns.

    `peft` is the imported package: it is no dependency of this one, so who wants the comparison brings it. `model` is
    the plain transformers model of the adapter. It is left as it is: PEFT works on modules of its own over the same
    weights, none of which it writes. PEFT widens a 16-bit adapter to float32 before it factors. Results are on the
    model's device.

    Raises ValueError for a PEFT without that function, a rank below 1, and (PEFT's own) a rank above a module's width.
    Source: PEFT, `convert_to_lora`: an SVD of the dense update, singular values in B.
    """
    if not hasattr(peft, "convert_to_lora"):
        raise ValueError(
            f"peft: expected a release with convert_to_lora, got {getattr(peft, '__version__', 'none')}; upgrade it"
        )
    rank = RANK.take("rank", rank)
    with warnings.catch_warnings():
        # It is meant for other kinds of adapter, and says so; truncating a LoRA is what is wanted here.
        warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already")
        # PEFT reads a property of the model that transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = peft.PeftModel.from_pretrained(_twin(model), adapter_folder)
        _, state = peft.convert_to_lora(wrapped, rank)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    modules = {
        name.removeprefix(PREFIX): (state[f"{name}.lora_A.weight"].float(), state[f"{name}.lora_B.weight"].float().T)
        for name in names
    }
    return Compressed(f"convert_to_lora {rank}", _wide_bytes(modules), modules)


def uniform(adapter: Adapter, bits: int, *, group: int = GROUP) -> Compressed:
    """A and B as they are, rounded to the nearest of 2^bits − 1 levels around zero.

    One bf16 scale per row of `lora_A` [r, d_in] and of `lora_B` [d_out, r], and per `group` values of it where a row is
    longer: absmax / (2^(bits−1) − 1). `bits` a value and two bytes a scale. Raises ValueError for bits outside [2, 8].
    Source: the usual symmetric round-to-nearest, per output channel.
    """
    bits, group = Whole(2, 8).take("bits", bits), Whole(1, LONGEST_ROW).take("group", group)
    modules, nbytes = {}, 0.0
    for name, factors in adapter.modules.items():
        stored = factors.a.float(), factors.b.float()
        a, b = (_joined([_nearest(part, bits) for part in _parts(rows, group)]) for rows in stored)
        modules[name] = a, factors.scale * b.T
        nbytes += sum(_coded_bytes(rows, bits, group, 8 * SCALE_BYTES) for rows in stored)
    return Compressed(f"int{bits}", nbytes, modules)


def loraquant(
    adapter: Adapter, *, energy: float, high_bits: int, group: int = GROUP, refine_steps: int = REFINE_STEPS
) -> Compressed:
    """LoRAQuant: the leading singular directions in `high_bits`, the others in their signs.

    Every update is written as B'A', singular values split evenly between the sides. The first h directions, the fewest
    that hold the share `energy` of its squared Frobenius norm (`leading`), are rounded to 2^high_bits levels between
    the least and the largest value of a group, zero being one of them; the others to sign(x) · mean |x|. Groups are
    `group` values along a direction, in both factors. Before they are rounded the first h are refined one by one, so
    that `b a^T` as it is read back comes closer to the exact one: `refine_steps` of gradient descent, rate 0.01, on the
    Frobenius norm of the error, from the singular pair. 0 leaves that out.

    Stored of a value: its code; of a group: a 16-bit scale and, in the first h, a zero point of `high_bits`. Raises
    ValueError for a share outside (0, 1], bits outside [2, 8] and an update that overflows float32; the paper uses
    0.8 and 0.9, 2 and 3. Source: arXiv 2510.26690, known here by its abstract and by what others wrote of it, and its
    authors' code (github.com/Anonymous890920/LoRAQuant), which was read.

    What is told of the paper and the code agree on the even split; h by the share of squared singular values; 2 or 3
    bits, rounded to nearest with scale and zero point; signs with the mean magnitude; groups of 128 along B's columns
    and A's rows; gradient descent on the product. From the code alone: one pair at a time, least and largest value as
    the range, the zero point clipped to the codes, 300 steps of plain SGD at 0.01, the norm not squared, signs not
    refined.

    They differ in the gradient. The paper is said to pass it straight through the rounding; the code differentiates
    the rounding as it is, so that only a group's scale has a slope and the descent tunes its range. This follows the
    code, which is the stronger: of the leading directions of real adapters it takes the error at 2 bits from 0.75 to
    0.50 of their norm, where straight-through gradients reach 0.57 to 0.73 at their best step and end higher.

    Decided here: the best step is kept, not the last; h reaches the share (the code stops one direction before, at
    least at 1); scales are bf16; where a row is no multiple of `group` its groups are as equal as can be; scales and
    zero points are counted (the code counts codes alone).
    """
    energy, high_bits = Number(0, 1, above=True).take("energy", energy), Whole(2, 8).take("high_bits", high_bits)
    group, steps = Whole(1, LONGEST_ROW).take("group", group), Whole(0, 10**6).take("refine_steps", refine_steps)
    factors = {name: svd_factors(module) for name, module in adapter.modules.items()}
    counts = {name: leading(values, energy) for name, (_, _, values) in factors.items()}
    high = {name: (a[: counts[name]], b[: counts[name]]) for name, (a, b, _) in factors.items()}
    modules, nbytes = {}, 0.0
    for name, pair in _refined(high, high_bits, group, steps).items():
        low = [side[counts[name] :] for side in factors[name][:2]]
        leads = (_read(rows, high_bits, group) for rows in pair)
        signs = (_joined([_signs(part) for part in _parts(rows, group)]) for rows in low)
        a, b = (torch.cat(sides) for sides in zip(leads, signs, strict=True))
        modules[name] = a, b
        nbytes += sum(_coded_bytes(rows, high_bits, group, 8 * SCALE_BYTES + high_bits) for rows in pair)
        nbytes += sum(_coded_bytes(rows, 1, group, 8 * SCALE_BYTES) for rows in low)
    return Compressed(f"loraquant {high_bits}@{energy:g}", nbytes, modules)


def leading(singular_values: Tensor, energy: float) -> int:
    """The fewest of the [r] descending singular values whose squares sum to the share `energy` of all; at least 1."""
    sums = singular_values.double().square().cumsum(0)
    return min(1 + int((sums < energy * sums[-1]).sum()), len(sums))


def _wide_bytes(modules: dict[str, tuple[Tensor, Tensor]]) -> float:
    return float(sum(VALUE_BYTES * (a.numel() + b.numel()) for a, b in modules.values()))


def _coded_bytes(rows: Tensor, bits: int, group: int, group_bits: int) -> float:
    """Bytes of codes [R, D] and of what each group adds to them."""
    return (rows.numel() * bits + rows.shape[0] * _groups(rows.shape[-1], group) * group_bits) / 8


def _groups(width: int, group: int) -> int:
    return -(-width // group)


def _parts(rows: Tensor, group: int) -> list[Tensor]:
    """Rows [R, D] in groups as equal as can be: one view [R, G, values], or two where their lengths differ by one."""
    width = rows.shape[-1]
    count = _groups(width, group)
    short, longer = divmod(width, count)
    if not longer:
        return [rows.unflatten(-1, (count, short))]
    cut = longer * (short + 1)
    return [rows[:, :cut].unflatten(-1, (longer, short + 1)), rows[:, cut:].unflatten(-1, (count - longer, short))]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `_parts`."""
    return torch.cat([part.flatten(-2) for part in parts], -1)


def _stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).float()


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0: a group of zeros, whose codes are zeros then."""
    return torch.where(scale > 0, scale, 1)


def _nearest(part: Tensor, bits: int) -> Tensor:
    """[R, G, values] as read back from symmetric codes of `bits`."""
    top = 2 ** (bits - 1) - 1
    scale = _stored(part.abs().amax(-1, keepdim=True) / top)
    return (part / _divisor(scale)).round_().clamp_(-top, top) * scale


def _signs(part: Tensor) -> Tensor:
    """[R, G, values] as read back from one bit a value."""
    return torch.where(part < 0, -1.0, 1.0) * _stored(part.abs().mean(-1, keepdim=True))


@dataclass(frozen=True)
class _Ranged:
    """Groups rounded between their least and largest value."""

    codes: Tensor
    """[R, G, values], zero point taken off"""
    scale: Tensor
    """[R, G, 1]"""
    largest: Tensor
    """[R, G, 1], as is the least"""
    least: Tensor

    def read(self) -> Tensor:
        return self.codes * self.scale


def _ranged(part: Tensor, bits: int) -> _Ranged:
    top = 2**bits - 1
    least, largest = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    scale = _stored((largest - least) / top)
    divisor = _divisor(scale)
    zero = (-least / divisor).round_().clamp_(0, top)
    # Not `round`: it takes a second thread for so little, and where the machine is shared it waits for that one.
    codes = (part / divisor).add_(zero).clamp_(0, top).add_(0.5).int() - zero
    return _Ranged(codes, scale, largest, least)


def _read(rows: Tensor, bits: int, group: int) -> Tensor:
    """Rows [R, D] as read back from codes of `bits`, scales and zero points."""
    return _joined([_ranged(part, bits).read() for part in _parts(rows, group)])


def _refined(
    pairs: dict[str, tuple[Tensor, Tensor]], bits: int, group: int, steps: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every module's pairs [h, d_in] and [h, d_out], moved to where they round best; modules of a shape together."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, (a, b) in pairs.items():
        shapes.setdefault((a.shape[1], b.shape[1]), []).append(name)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names in shapes.values():
        rows = max(1, BATCH_VALUES // max(pairs[names[0]][0].shape[1], pairs[names[0]][1].shape[1]))
        sides = [torch.cat([pairs[name][side] for name in names]).split(rows) for side in (0, 1)]
        moved = [_refine(a, b, bits, group, steps) for a, b in zip(*sides, strict=True)]
        counts = [len(pairs[name][0]) for name in names]
        a, b = (torch.cat([pair[side] for pair in moved]).split(counts) for side in (0, 1))
        found |= {name: (a[i], b[i]) for i, name in enumerate(names)}
    return {name: found[name] for name in pairs}


@torch.no_grad()
def _refine(a: Tensor, b: Tensor, bits: int, group: int, steps: int) -> tuple[Tensor, Tensor]:
    """Pairs a [R, d_in] and b [R, d_out] near the given ones, whose `b a^T` is closest to theirs once rounded.

    The error ||b a^T - q(b) q(a)^T|| of a pair needs inner products alone. Rounding has no slope, so the norm's
    gradient reaches a group through its scale, (largest - least) / (2^bits - 1): two values of a group move at a step.
    Steps and error scale with the pair, so one rate fits all.
    """
    exact, moving, best = (a, b), (a.clone(), b.clone()), [a, b]
    energy = a.square().sum(-1) * b.square().sum(-1)
    least = torch.full_like(energy, torch.inf)
    for step in range(steps + 1):
        coded = [[_ranged(part, bits) for part in _parts(side, group)] for side in moving]
        read = [_joined([part.read() for part in parts]) for parts in coded]
        overlaps = [(given * now).sum(-1) for given, now in zip(exact, read, strict=True)]
        squares = [now.square().sum(-1) for now in read]
        error = (energy - 2 * overlaps[0] * overlaps[1] + squares[0] * squares[1]).clamp_min(0).sqrt()
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better[:, None], now, kept) for now, kept in zip(moving, best, strict=True)]
        if step == steps:
            break
        pull = (REFINE_RATE / (2**bits - 1)) / _divisor(error)[:, None]
        for side, other in ((0, 1), (1, 0)):
            downhill = pull * (overlaps[other][:, None] * exact[side] - squares[other][:, None] * read[side])
            slopes = _parts(downhill, group)
            for part, now, slope in zip(_parts(moving[side], group), coded[side], slopes, strict=True):
                ends = (part == now.largest).float() - (part == now.least).float()
                part.addcmul_(ends, (now.codes * slope).sum(-1, keepdim=True))
    return best[0], best[1]


def _twin(model: nn.Module) -> nn.Module:
    """Modules of its own over the same weights: parameters that share the memory, buffers that are the same."""
    weights = {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in model.parameters()}
    return deepcopy(model, {**weights, **{id(own): own for own in model.buffers()}})
