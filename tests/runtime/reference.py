"""The definitions of DESIGN sections 4 to 6 in plain Python, and a policy that makes decisions easy to steer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from policy import SIGNALS, Decision, Operating, RankPolicy, Settings, Summary
from policy.difficulty import PAIRS, Difficulty
from policy.rungs import Rung, nearest_rung
from runtime import Adapter, Ladder
from runtime.control.stream import Stream
from runtime.fingerprint import adapter_fingerprint
from runtime.ladder import Directions, svd_factors
from runtime.ladder.factors import exact_bank
from runtime.ladder.formats import BITS, encode

OUTPUTS, SURPRISAL, TOKENS = (0, 1), 2, (3, 4, 5, 6)
"""Of every signal its place: what the model puts out at a token and what it thinks of the next one, what follows from
the tokens."""


class PositionPolicy(RankPolicy):
    """Rung and scale follow from the opening token's position and the row's knob: chunk after chunk another."""

    kind: ClassVar[str] = "position"

    def __init__(self, rungs: Sequence[int], multiplier: int = 5) -> None:
        super().__init__(rungs)
        self.multiplier = multiplier

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        draw = (summary.position * self.multiplier + knob.long()) % 97
        scale = 0.75 + (draw % 3) / 8
        return Decision(draw % len(self.rungs), scale[:, None] + torch.arange(len(self.rungs), device=draw.device) / 64)

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 96.0

    def config(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier}


class FeaturePolicy(RankPolicy):
    """A rung that depends on every number of the summary: whatever leaks into a decision changes it."""

    kind: ClassVar[str] = "feature"

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        features = summary.features()
        weights = torch.arange(1, features.shape[1] + 1).cos()
        draw = (features @ weights * 7).sin() + knob
        rungs = len(self.rungs)
        scale = 1 + draw.sin() / 4
        return Decision(((draw * 50).floor().long()) % rungs, scale[:, None] + torch.arange(rungs) / 64)

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def config(self) -> dict[str, Any]:
        return {}


class AgePolicy(RankPolicy):
    """The rung says how many tokens lie between the opening one and what the model has put out last."""

    kind: ClassVar[str] = "age"

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        assert summary.age is not None
        behind = (1 / (1 - summary.age)).round().long() - 1
        rungs = len(self.rungs)
        return Decision((3 * behind + knob.long()) % rungs, torch.linspace(0.8, 1, rungs).expand(len(behind), -1))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, float(len(self.rungs) - 1)


def seeded_model(config) -> nn.Module:
    """The same random model of a configuration at each call, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


class WavyPolicy(RankPolicy):
    """Its rung swings with every feature, so that one wrong signal shows, and a rounding hardly ever does."""

    kind: ClassVar[str] = "wavy"

    def __init__(self, rungs: Sequence[Rung], seed: int = 0) -> None:
        super().__init__(rungs)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weights", 20 * torch.randn(Summary.FEATURES, generator=generator))

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        swing = 1 + torch.sin(knob + summary.features() @ self.weights)
        rung = nearest_rung(swing * (len(self.rungs) - 1) / 2, len(self.rungs))
        return Decision(rung, 1 - 0.1 * rung[:, None] * torch.ones(len(self.rungs)))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 6.0


def drawn_tables(seed: int, vocabulary: int = 256, pairs: int = PAIRS) -> Difficulty:
    """Tables in which every code is as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (vocabulary, pairs)
    return Difficulty(*(torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8) for size in sizes))


def naive_shares(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def naive_entropy(logits: Sequence[float]) -> float:
    shares = naive_shares(logits)
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def naive_surprisal(logits: Sequence[float], token: int) -> float:
    """How surprising a token is under the logits before it, of log V and no more."""
    share = naive_shares(logits)[token]
    return min(1.0, -math.log(share) / math.log(len(logits))) if share else 1.0


def naive_difficulty(tokens: Sequence[int], codes: Sequence[int], pairs: Sequence[int]) -> list[tuple[float, float]]:
    """What two tables of codes say of every token and of the pair that it ends; what they say nothing of is average."""
    found, before = [], None
    for token in tokens:
        own = codes[token] if token < len(codes) else 127
        entry = 0 if before is None else (before * 1_000_003 + token * 8_191 + 1) % (2**31 - 1) % 2**16
        pair = 127 if before is None or entry >= len(pairs) else pairs[entry]
        found.append((own / 254, pair / 254))
        before = token
    return found


def naive_novelty(tokens: Sequence[int], window: int) -> list[float]:
    """Share of the n-grams that end at each token and are not in the set of those that end in the window before it."""
    out = []
    for t in range(len(tokens)):
        new = total = 0
        for n in (2, 3, 4):
            if t + 1 < n:
                continue
            ends = range(max(n - 1, t - window), t)
            seen = {tuple(tokens[end + 1 - n : end + 1]) for end in ends}
            total += 1
            new += tuple(tokens[t + 1 - n : t + 1]) not in seen
        out.append(new / total if total else 1.0)
    return out


@dataclass
class NaiveChunk:
    start: int
    rung: int
    scale: float
    held: list[tuple[float, float, float] | None]
    """Per signal mean, max and last value that the decision saw."""
    age: float
    """1 - 1 / (1 + n), n tokens behind what the model had put out."""
    tokens: list[int] = field(default_factory=list)


def naive_chunks(
    outputs: Tensor,
    surprisals: Sequence[float],
    token_signals: Tensor,
    prompt_tokens: int,
    blocks: Sequence[int],
    settings: Settings,
    policy: RankPolicy,
    operating: Operating,
    cost: Sequence[float],
    banks: Sequence[int],
    resident: int,
) -> tuple[list[NaiveChunk], list[list[float]]]:
    """Chunks and rung weights of one row, by the definition, one token at a time.

    outputs [T, 2] (entropy, attention), surprisals [T] of every token, the first of which means nothing, and
    token_signals [T, 4] (novelty, prior, difficulty, pair); `blocks` are the lengths of the forward passes. A model
    output is known once its pass has ended, and is seen by the first opening after that; how surprising a token is
    follows from the output before it, so that of the first token of a pass is known when the pass begins. A prompt runs
    at the start rung, no chunk above the `resident` one, and no chunk opens at a rung that the budget could not pay for
    as long as the chunk may last, with its fade behind it. `cost` [J] are the rungs' costs and `banks` [J] what each
    reads: of two rungs of one bank a fade reads the dearer, of two banks it reads both.
    """
    chunk, rungs, known = settings.chunk, len(policy.rungs), 0
    knob, start_rung, budget = float(operating.knob), int(operating.start_rung), float(operating.budget)
    balance, fade = 64 * budget, settings.fade_tokens - 1
    count = len(SIGNALS)
    waiting: list[list[int]] = [[] for _ in SIGNALS]  # per signal the tokens whose value no opening has seen
    smoothed: list[float | None] = [None] * count
    held: list[tuple[float, float, float] | None] = [None] * count
    level, chunks, weights, opened_level = 0, [], [], 0
    fade_from: list[float] = []
    fade_to: list[float] = []
    ends = torch.tensor(blocks).cumsum(0).tolist()
    values = torch.cat([outputs, torch.tensor(surprisals)[:, None], token_signals], -1).tolist()
    signal_weights = [chunk.weights[name] for name in SIGNALS]

    def smooth(signal: int, value: float) -> None:
        before = smoothed[signal]
        smoothed[signal] = value if before is None else before + chunk.smoothing * (value - before)

    for t in range(len(values)):
        if t and t == known:
            smooth(SURPRISAL, values[t][SURPRISAL])
            waiting[SURPRISAL].append(t)
        for signal in TOKENS:
            smooth(signal, values[t][signal])
        parts = [(w, s) for w, s in zip(signal_weights, smoothed, strict=True) if s is not None]
        total = sum(w for w, _ in parts)
        complexity = sum(w * s for w, s in parts) / total if total else 0.0
        while level < len(chunk.thresholds) and complexity > chunk.thresholds[level] + chunk.hysteresis:
            level += 1
        while level > 0 and complexity <= chunk.thresholds[level - 1] - chunk.hysteresis:
            level -= 1
        length = t - chunks[-1].start if chunks else 0
        changed = length >= chunk.min_tokens and level != opened_level
        if not chunks or length >= chunk.max_tokens or changed:
            for signal in range(count):
                column = [values[i][signal] for i in waiting[signal]]
                if column:
                    held[signal] = (sum(column) / len(column), max(column), column[-1])
                waiting[signal] = []
            stats = torch.tensor([h or (0.0, 0.0, 0.0) for h in held])[None]
            valid = torch.tensor([[h is not None for h in held]])
            age = 1 - 1 / (1 + t - known)
            summary = Summary(stats, valid, token_signals[t][None], torch.tensor([t]), age=torch.tensor([age]))
            decision = policy.decide(summary, torch.tensor([knob]))
            rung = int(decision.rung) if known and t >= prompt_tokens else start_rung
            rung = min(rung, resident)

            def excess(j: int) -> float:
                return max(0.0, cost[j] - budget)

            def leaving(j: int, to: int) -> float:
                return fade * (excess(j) if banks[j] == banks[to] else cost[j])

            def payable(j: int) -> bool:
                needed = chunk.max_tokens * excess(j) + leaving(j, 0)
                return balance - (leaving(chunks[-1].rung, j) if chunks else 0.0) + 1e-9 >= needed  # noqa: B023

            while rung and not payable(rung):
                rung -= 1
            scale = float(decision.scales[0, rung])
            chunks.append(NaiveChunk(t, rung, scale, list(held), age))
            opened_level = level
            fade_to = [scale * (j == rung) for j in range(rungs)]
            fade_from = weights[-1] if weights else fade_to
        chunks[-1].tokens.append(t)
        for signal in TOKENS:
            waiting[signal].append(t)
        progress = min(1.0, (t - chunks[-1].start + 1) / settings.fade_tokens)
        weights.append([a + (b - a) * progress for a, b in zip(fade_from, fade_to, strict=True)])
        read = [j for j, weight in enumerate(weights[-1]) if weight]
        spent = sum(max(cost[j] for j in read if banks[j] == bank) for bank in {banks[j] for j in read})
        balance = min(balance + budget - spent, 64 * budget)
        if t + 1 in ends:
            for i in range(known, t + 1):
                for signal in OUTPUTS if i == known else (*OUTPUTS, SURPRISAL):
                    smooth(signal, values[i][signal])
                    waiting[signal].append(i)
            known = t + 1
    return chunks, weights


def by_definition(ladder: Ladder, name: str, x: Tensor, weights: Tensor) -> Tensor:
    """A gated update as DESIGN section 4 defines it, direction by direction, in float64.

    Of a bank every direction is read as the highest of its active rungs does, as often as its active rungs have it.
    x [..., d_in], weights [..., J] -> [..., d_out].
    """
    values, alphas = x.double().reshape(-1, x.shape[-1]), weights.expand(*x.shape[:-1], -1).flatten(0, -2)
    bits = ladder.bits()[:, list(ladder.modules).index(name)].tolist()
    rows = {
        (bank, at): own[name].read(0, count, at, torch.float64)
        for bank, own in enumerate(ladder.banks)
        for at, count in zip(BITS, own[name].counts(), strict=True)
    }
    total = torch.zeros(len(values), ladder.modules[name].b.width, dtype=torch.float64)
    for own_alphas in alphas.unique(dim=0):
        read, gates, alpha = [], [], own_alphas.tolist()
        for bank in range(len(ladder.banks)):
            active = [j for j, weight in enumerate(alpha) if weight > 0 and ladder.bank_of[j] == bank]
            for k, finest in enumerate(bits[active[-1]] if active else ()):
                if finest:
                    read.append([half[k] for half in rows[bank, finest]])
                    gates.append(sum(alpha[j] * ladder.scales[j] for j in active if bits[j][k]))
        if read:
            here = (alphas == own_alphas).all(1)
            a, b = (torch.stack(halves) for halves in zip(*read, strict=True))
            total[here] = (values[here] @ a.T * torch.tensor(gates, dtype=torch.float64)) @ b
    return total.view(*x.shape[:-1], -1)


def handmade_ladder(adapter: Adapter, seed: int = 0) -> Ladder:
    """A ladder whose rungs differ in everything that a rung may: two banks in few bits beside the exact one, every
    module another mix of 8, 4, 2 and no bits, every rung its own scale. The adapter's rank is a multiple of 8."""
    generator, rank = torch.Generator().manual_seed(seed), adapter.rank
    banks: list[dict[str, Directions]] = [{}, {}]
    for name, own in adapter.modules.items():
        for bank, noise in zip(banks, (0.0, 0.01), strict=True):  # the second is another list of directions
            pair = (half + noise * torch.randn(half.shape, generator=generator) for half in svd_factors(own)[:2])
            bank[name] = Directions(*map(encode, pair))
    # Eighths of the rank at which the ranges of 16, 8, 4 and 2 bits end, of every fourth module alike.
    mixes = [
        [(0, 0, 1, 3), (0, 0, 0, 0), (0, 1, 1, 2), (0, 0, 2, 2)],
        [(0, 1, 2, 5), (0, 0, 0, 2), (0, 1, 3, 3), (0, 0, 3, 6)],
        [(0, 1, 3, 6), (0, 0, 2, 4), (0, 0, 0, 3), (0, 2, 2, 8)],
        [(0, 2, 5, 8), (0, 0, 4, 6), (0, 0, 3, 8), (0, 3, 6, 8)],
        [(0, 8, 8, 8)] * 4,
        [(8, 8, 8, 8)] * 4,
    ]
    edges = torch.tensor([[mix[m % 4] for m in range(len(adapter.modules))] for mix in mixes]) * rank // 8
    rungs = [share * rank for share in (1 / 16, 1 / 8, 5 / 32, 1 / 4, 1 / 2, 1)]
    ladder = Ladder(
        "distilled", tuple(rungs), (*banks, exact_bank(adapter)), (0, 0, 1, 1, 1, 2), edges,
        (1.12, 1.06, 0.95, 1.03, 1.01, 1.0), adapter_fingerprint(adapter), adapter.base_model,
    )  # fmt: skip
    assert bool((ladder.rung_bytes().diff() > 0).all()), "a higher rung costs more"
    return ladder


@contextmanager
def definition_hooks(model: nn.Module, ladder: Ladder, weights: Tensor) -> Iterator[None]:
    """The plain model whose linears add `by_definition`, for weights [B, T, J] of the whole sequence."""
    with ExitStack() as undo:
        for name in ladder.modules:

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
                return output + by_definition(ladder, name, args[0], weights).to(output.dtype)

            undo.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def weights_of(record: dict[str, Tensor], settings: Settings, rungs: int) -> Tensor:
    """Rung weights [B, N, J] from recorded `opens`, `rung` and `scale` alone, by the fade's formula, in float64."""
    rows, steps = record["rung"].shape
    out = torch.zeros(rows, steps, rungs, dtype=torch.float64)
    for row in range(rows):
        before: Tensor | None = None
        for t in range(steps):
            if record["opens"][row, t]:
                target = torch.zeros(rungs, dtype=torch.float64)
                target[record["rung"][row, t]] = record["scale"][row, t].double()
                # The first chunk fades from nothing.
                start_weights, opened = target if before is None else before, t
            progress = min(1.0, (t - opened + 1) / settings.fade_tokens)
            before = out[row, t] = start_weights + (target - start_weights) * progress
    return out


def drive(
    stream: Stream, tokens: Tensor, lengths: Sequence[int], logits: Tensor, attention: Tensor, block: int
) -> None:
    """Take rows tokens [B, T] of their lengths, with what a model would put out, through `stream` in blocks."""
    steps = torch.arange(tokens.shape[1])
    real = steps < torch.tensor(lengths)[:, None]
    for start in range(0, max(lengths), block):
        part = slice(start, min(start + block, max(lengths)))
        stream.open_block(tokens[:, part], real[:, part])
        stream.close_block(logits[:, part], attention[:, part])


def row_of(record: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a stream's record without its padding, [N, ...]."""
    real = record["real"][row]
    return {name: value[row][real] for name, value in record.items()}
