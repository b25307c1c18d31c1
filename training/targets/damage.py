"""What a rung costs in quality: KL of every rung and scale against the full rank, token by token.

Two measurements per document, each over real text on the real model:

    damage_table   every rung at every scale, uniform over the document                       [T, J, G]
    trajectory     the run under some policy: where chunks opened and what the policy saw     [C], [C, F]

plus, on a random sample of chunks, `later_damage`: one chunk at a rung, everything else at full rank, and the KL of the
tokens behind it, which is damage that reaches them through the KV cache alone.

Shape legend: T tokens of a document, C its chunks, F features, J rungs, G scales, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.contract import Summary
from policy.difficulty import Difficulty
from policy.learned import LearnedPolicy
from policy.operating import Operating
from runtime.reference.adaptive import AdaptiveRun
from runtime.reference.whole import settled

from ..documents import Batch, Example, make_batch, positions_within

LOGITS_BYTES = 2**29
"""Float32 logits of one pass of a damage table take no more, unless one row alone does."""
ROWS = 24
"""Rows of one pass of a damage table, at most, unless a rung has more scales."""
GPU_ROWS, GPU_PADDING = 256, 0.5
"""The same on a GPU, which a few rows do not fill, and how much of a pass may be padding there."""
MOST_PADDING = 0.05
"""Documents share such a pass while padding costs no more than this of their tokens."""


@dataclass(frozen=True)
class Exact:
    """The exact adapter's next-token distribution, which every other is held against; exponentiated once."""

    log_p: Tensor
    """[..., V] float32"""
    p: Tensor
    """[..., V] float32"""

    @classmethod
    def of(cls, logits: Tensor) -> Exact:
        """From logits [..., V] of any float dtype."""
        log_p = logits.float().log_softmax(-1)
        return cls(log_p, log_p.exp())

    @property
    def nbytes(self) -> int:
        return self.log_p.nbytes + self.p.nbytes


def token_kl(exact: Exact, log_q: Tensor) -> Tensor:
    """KL(exact || this) in nats, log-probabilities [..., V] float32 -> [...], never below 0.

    Term by term, p (log p - log q): a difference of two large sums would lose what small divergences consist of.
    """
    return torch.linalg.vecdot(exact.p, torch.sub(exact.log_p, log_q)).clamp_(min=0.0)


def rows_kl(exact: Exact, logits: Tensor) -> Tensor:
    """KL of every row against one exact distribution per token: logits [B, T, V] -> [B, T].

    Row by row: on a CPU, memory that is fresh each time costs more than the arithmetic in it.
    """
    found = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    for row, kl in zip(logits, found, strict=True):
        kl.copy_(token_kl(exact, row.float().log_softmax(-1)))
    return found


@torch.no_grad()
def damage_table(run: AdaptiveRun, examples: Sequence[Example], scales: Tensor) -> list[Tensor]:
    """[T, J, G] float32 KL at every token of each document, from runs uniform at every rung and scale [J, G].

    One rung after the other, for a pass reads the directions of all rungs that are active in it, and has to decode
    those that the pass before did not read: the rows of a pass are the scales of one rung, of several documents of
    like length where there is room for their logits.
    """
    rungs, grid = scales.shape
    tables = [torch.zeros(len(example["input_ids"]), rungs, grid) for example in examples]
    positions = positions_within(run.model, LOGITS_BYTES)
    most, padding = (GPU_ROWS, GPU_PADDING) if run.model.device.type == "cuda" else (ROWS, MOST_PADDING)
    groups = _alike([len(own) for own in tables], most // grid, positions // grid, padding)
    for portion in _portions(groups, [len(own) for own in tables], positions // 2):
        together = [_Group.of(run, index, [examples[document] for document in index]) for index in portion]
        for rung in range(rungs - 1):
            for group in together:
                rows = max(1, positions // group.batch.tokens.numel())
                for part in scales[rung].split(rows):
                    group.measure(run, part, rung)
        for group in together:
            # One wait for the device, for all of a group.
            for document, kl in zip(group.index, torch.cat(group.kls, 1).cpu(), strict=True):
                own = kl[:, : len(tables[document])]
                tables[document][:, :-1] = own.view(rungs - 1, grid, -1).permute(2, 0, 1)
    return tables


@dataclass(frozen=True)
class _Group:
    """Documents of like length while they are measured."""

    index: list[int]
    batch: Batch
    exact: list[Exact]
    """Of each document: the top rung, which is exact, runs once, as the reference of all others."""
    kls: list[Tensor]
    """[D, S, T] of what is measured so far"""

    @classmethod
    def of(cls, run: AdaptiveRun, index: list[int], examples: Sequence[Example]) -> _Group:
        batch = make_batch(examples).to(run.model.device)
        one = torch.ones(1, device=run.model.device)
        top = len(run.plan.ladder.rungs) - 1
        return cls(index, batch, [Exact.of(own) for own in _uniform(run, batch, one, top)], [])

    def measure(self, run: AdaptiveRun, scales: Tensor, rung: int) -> None:
        """Every document at each of scales [S] of one rung."""
        rows = _uniform(run, self.batch, scales, rung).split(len(scales))
        self.kls.append(torch.stack([rows_kl(*pair) for pair in zip(self.exact, rows, strict=True)]))


def _uniform(run: AdaptiveRun, batch: Batch, scales: Tensor, rung: int) -> Tensor:
    """Logits [D * S, T, V] of every document of a batch at each of scales [S] of one rung, document after document."""
    count = len(scales)
    weights = torch.zeros(count, 1, len(run.plan.ladder.rungs), device=run.model.device)
    weights[:, 0, rung] = scales.to(weights)
    tokens, real = (x.repeat_interleave(count, 0) for x in (batch.tokens, batch.real))
    return run.gated(tokens, real, weights.repeat(len(batch.tokens), 1, 1))


def _alike(lengths: Sequence[int], most: int, positions: int, padding: float = MOST_PADDING) -> Iterator[list[int]]:
    """Documents of these lengths in groups of like length: of several `most`, and at most `positions` with padding."""
    group: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda document: lengths[document]):
        longest = lengths[document]
        padded, real = (len(group) + 1) * longest, sum(lengths[own] for own in group) + longest
        if group and (len(group) >= most or padded > positions or padded - real > padding * real):
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _portions(groups: Iterable[list[int]], lengths: Sequence[int], positions: int) -> Iterator[list[list[int]]]:
    """Groups whose exact distributions are held at the same time: of several at most `positions`, with padding."""
    portion: list[list[int]] = []
    held = 0
    for group in groups:
        size = len(group) * max(lengths[document] for document in group)
        if portion and held + size > positions:
            yield portion
            portion, held = [], 0
        portion.append(group)
        held += size
    if portion:
        yield portion


@dataclass(frozen=True)
class Trajectory:
    """Where one document's chunks opened and what their decisions saw."""

    starts: Tensor
    """[C] long"""
    features: Tensor
    """[C, F] float32, `Summary.features()`"""
    complexity: Tensor
    """[T] float32"""
    log_lambda: float = math.nan
    """The knob that it ran at, of a learned policy's own."""
    damage: Tensor | None = None
    """[T, J, G] KL of the rungs that were measured inside of this run, nan where none was; None: nowhere."""


@dataclass(frozen=True)
class Ran:
    """A batch that ran under a policy."""

    record: dict[str, Tensor]
    """`Record.columns`"""
    weights: Tensor
    """[B, T, J] what gated every token."""
    log_lambda: Tensor
    """[B] the knob of every row, nan where the policy is not a learned one."""

    def trajectories(self, real: Tensor) -> list[Trajectory]:
        """What was decided in every row; real [B, T] bool."""
        record = {name: value.cpu() for name, value in self.record.items()}
        found = []
        for row, length in enumerate(real.sum(1).tolist()):
            opened = (record["opens"][row] & record["real"][row]).nonzero()[:, 0]
            held, valid, first, positions, age, hidden = (
                record[name][row, opened] for name in ("held", "held_valid", "first", "positions", "age", "hidden")
            )
            features = Summary(held, valid, first, positions, age=age, hidden=hidden).features()
            complexity = record["complexity"][row, :length]
            found.append(Trajectory(positions, features, complexity, float(self.log_lambda[row])))
        return found


@torch.no_grad()
def decided(run: AdaptiveRun, batch: Batch, operating: Operating, difficulty: Difficulty | None = None) -> Ran:
    """Run a batch, already on the model's device, under the run's own policy at what its rows may spend.

    `difficulty` are the tables of every row. The run must keep its record.
    """
    operating = operating.for_rows(len(batch.tokens))
    learned = isinstance(run.plan.policy, LearnedPolicy)
    log_lambda = operating.knob if learned else torch.full_like(operating.knob, torch.nan)
    if run.plan.settings.block_tokens == 1 and operating.kv.is_full:
        whole = settled(run, batch.tokens, batch.real, batch.prompt_tokens, operating, difficulty=difficulty)
        return Ran(whole.stream.columns(), whole.weights, log_lambda)
    cache = run.new_cache(
        len(batch.tokens), prompt_tokens=batch.prompt_tokens, operating=operating, difficulty=difficulty
    )
    run.logits(batch.tokens, batch.real, cache, keep=1)
    record = cache.stream.columns()
    return Ran(record, record["weights"], log_lambda)


def trajectories(
    run: AdaptiveRun, batch: Batch, operating: Operating, difficulty: Difficulty | None = None
) -> list[Trajectory]:
    """What the run's own policy decides on, document by document; arguments as in `decided`."""
    batch = batch.to(run.model.device)
    return decided(run, batch, operating, difficulty).trajectories(batch.real)


@torch.no_grad()
def later_damage(run: AdaptiveRun, example: Example, start: int, end: int, horizon: int) -> tuple[Tensor, Tensor]:
    """(immediate, later) KL sums [J] of one chunk [start, end) at every rung, all other tokens at full rank.

    Immediate is over the chunk's own tokens, later over the `horizon` tokens behind it. Every rung is a row of one
    pass; the prefix is the same in all of them.
    """
    rungs = len(run.plan.ladder.rungs)
    stop = min(len(example["input_ids"]), end + horizon)
    tokens = torch.tensor(example["input_ids"][:stop], device=run.model.device).expand(rungs, -1)
    weights = torch.zeros(rungs, stop, rungs, device=run.model.device)
    weights[:, :, -1] = 1.0
    weights[:, start:end] = torch.eye(rungs, device=run.model.device)[:, None]
    logits = run.gated(tokens, torch.ones_like(tokens, dtype=torch.bool), weights)
    kl = rows_kl(Exact.of(logits[-1]), logits).cpu()
    return kl[:, start:end].sum(1), kl[:, end:].sum(1)
