"""Run a plan on held-out documents, for real, and add up what it cost and what it lost.

No table of uniform runs stands in for a mixed run here: every number comes from logits of the model while the policy
moved between rungs. Per document, so that a bootstrap can resample documents. `fit` and `evaluate` score here and
nowhere else; what is measured is a registry, `MEASURES`.

Shape legend: D documents, B rows of a batch, T tokens, V vocabulary, J rungs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.contract import RankPolicy
from policy.operating import Operating
from policy.settings import Settings
from runtime.control.record import Keep, count_rungs
from runtime.ladder import Ladder
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate

from ..documents import Batch, Example, batches, positions_within
from ..progress import with_progress
from ..targets.damage import Exact, token_kl

LOGITS_BYTES = 2**28
"""Float32 log-probabilities of one batch take no more, unless one document alone does."""
KEPT_BYTES = 2**30
"""The exact distributions are kept between measurements up to this; beyond, they are computed again each time."""


@dataclass(frozen=True)
class Measure:
    """A number per scored token, summed over a document, and what is reported of the sum over all documents."""

    tokens: Callable[[Tensor, Tensor, Exact | None], Tensor]
    """(logits [N, V], following tokens [N], exact distributions [N, V]) of the scored tokens -> [N]."""
    value: Callable[[float], float]
    """From the mean per scored token to the number that is reported."""
    against_full: bool
    """Whether it needs the exact distributions."""


def _kl(logits: Tensor, following: Tensor, exact: Exact | None) -> Tensor:
    assert exact is not None, "a measure against the full rank is given it"
    return token_kl(exact, logits)


def _nll(logits: Tensor, following: Tensor, exact: Exact | None) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), following, reduction="none")


MEASURES = {
    "kl": Measure(_kl, float, against_full=True),
    "perplexity": Measure(_nll, lambda nats: float(np.exp(nats)), against_full=False),
}


@dataclass(frozen=True)
class Scores:
    """Sums per document, [D] each unless said otherwise."""

    sums: dict[str, np.ndarray]
    """Of every measure over the scored tokens, by its name in `MEASURES`."""
    tokens: np.ndarray
    """Scored tokens."""
    rungs: np.ndarray
    """[D, J] scored tokens whose active rung was j."""
    prompt_rungs: np.ndarray
    """[D, J] prompt tokens whose active rung was j."""
    kv_bytes: int = 0
    """Keys and values of all documents, each at its end, in the formats of their pages."""
    kv_bytes_full: int = 0
    """The same tokens in the model's own dtype."""
    kv_bytes_allocated: int = 0
    """Storage of all documents' caches, room to spare included."""
    processed: int = 0
    """Real tokens that went through the model, prompts included."""
    ms: float = field(default=0.0, compare=False)
    """Wall time of these forwards, a batch of rows at a time."""

    @property
    def ms_per_token(self) -> float:
        """Wall time over real tokens."""
        return self.ms / self.processed

    def value(self, measure: str) -> float:
        """What is reported of a measure, over all documents."""
        return MEASURES[measure].value(float(self.sums[measure].sum() / self.tokens.sum()))

    def mean(self, per_rung: np.ndarray) -> float:
        """Mean over scored tokens of a number that every rung has, [J]: its equivalent rank, cost, milliseconds."""
        return float((self.rungs @ per_rung).sum() / self.tokens.sum())

    def prompt_mean(self, per_rung: np.ndarray) -> float | None:
        """The same over prompt tokens; None where there are none."""
        total = self.prompt_rungs.sum()
        return float((self.prompt_rungs @ per_rung).sum() / total) if total else None

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """The documents of all parts."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        return Scores(
            sums={name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums},
            tokens=joined("tokens"),
            rungs=joined("rungs"),
            prompt_rungs=joined("prompt_rungs"),
            kv_bytes=sum(part.kv_bytes for part in parts),
            kv_bytes_full=sum(part.kv_bytes_full for part in parts),
            kv_bytes_allocated=sum(part.kv_bytes_allocated for part in parts),
            processed=sum(part.processed for part in parts),
            ms=sum(part.ms for part in parts),
        )


PlanFor = Callable[[Sequence[int]], RunPlan]
"""The plan for a batch of these documents; only an oracle's differs from batch to batch."""


class Scorer:
    """One adapter's documents, with their full-rank log-probabilities where a measure asks for them."""

    def __init__(
        self,
        model: PreTrainedModel,
        ladder: Ladder,
        examples: Sequence[Example],
        measures: Sequence[str] = tuple(MEASURES),
        rows: int = 24,
    ) -> None:
        self.model, self.ladder, self.examples, self.rows = model, ladder, examples, rows
        self.measures = {name: MEASURES[name] for name in measures}
        self._exact: dict[int, Exact] = {}

    def score(self, plan: RunPlan | PlanFor, name: str | None = None) -> Scores:
        """Scores of one plan; `name` shows a progress bar."""
        docs = len(self.examples)
        sums = {measure: np.zeros(docs) for measure in self.measures}
        tokens, rungs, prompt_rungs = np.zeros(docs), [np.zeros(0)] * docs, [np.zeros(0)] * docs
        kv_bytes = kv_bytes_full = kv_bytes_allocated = processed = 0
        seconds = 0.0
        made = batches(self.examples, self.rows, positions_within(self.model, LOGITS_BYTES))
        if name is not None:
            made = with_progress(made, name, docs, lambda item: len(item[0]))
        for number, (index, batch) in enumerate(made):
            batch = batch.to(self.model.device)
            scored = batch.scored.bool()
            exact = self._exact_at(number, batch, scored)
            started = time.perf_counter()
            with activate(self.model, plan(index) if callable(plan) else plan, keep=Keep.RUNGS) as run:
                cache = run.new_cache(len(index), prompt_tokens=batch.prompt_tokens)
                logits = run.logits_at(batch.tokens, batch.real, cache, scored)
            # Reading a number waits for the device, so that the clock sees the whole forward.
            processed += int(batch.real.sum())
            seconds += time.perf_counter() - started
            owner, following = scored.nonzero()[:, 0], batch.tokens.roll(-1, 1)[scored]
            for measure, chosen in self.measures.items():
                values = chosen.tokens(logits, following, exact).double()
                total = values.new_zeros(len(index)).index_add_(0, owner, values)
                sums[measure][index] = total.cpu().numpy()
            tokens[index] = scored.sum(1).cpu().numpy()
            active, count = cache.stream.active_rungs(), len(cache.stream.policy.rungs)
            for where, into in ((scored, rungs), (batch.prompt(), prompt_rungs)):
                for document, counts in zip(index, count_rungs(active, where, count).cpu().numpy(), strict=True):
                    into[document] = counts
            kv_bytes += cache.kv_bytes()
            kv_bytes_full += cache.kv_bytes_full()
            kv_bytes_allocated += cache.kv_bytes_allocated()
        by_rung = np.stack(rungs), np.stack(prompt_rungs)
        return Scores(sums, tokens, *by_rung, kv_bytes, kv_bytes_full, kv_bytes_allocated, processed, 1000 * seconds)

    def _exact_at(self, number: int, batch: Batch, scored: Tensor) -> Exact | None:
        """The exact adapter's distributions at the scored tokens [B, T] of a batch, where a measure asks for them."""
        if not any(measure.against_full for measure in self.measures.values()):
            return None
        if number in self._exact:
            return self._exact[number]
        with activate(self.model, static_plan(self.ladder, self.ladder.rungs[-1])) as run:
            cache = run.new_cache(len(batch.tokens))
            exact = Exact.of(run.logits_at(batch.tokens, batch.real, cache, scored))
        if sum(kept.nbytes for kept in self._exact.values()) + exact.nbytes <= KEPT_BYTES:
            self._exact[number] = exact
        return exact


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of every task, on which policies are measured."""

    scorers: tuple[Scorer, ...]

    def measure(self, policy: RankPolicy, settings: Settings, operating: Operating) -> Scores:
        """Scores of one policy where every row may spend `operating`, over the documents of all tasks."""
        plans = [RunPlan((scorer.ladder,), policy, settings, operating) for scorer in self.scorers]
        return Scores.concatenate([scorer.score(plan) for scorer, plan in zip(self.scorers, plans, strict=True)])
