"""Run a plan on held-out documents, for real, and add up what it cost and what it lost.

No table of uniform runs stands in for a mixed run here: every number comes from logits of the model while the policy
moved between rungs. Per document, so that a bootstrap can resample documents. `fit` and `evaluate` score here and
nowhere else; what is measured is a registry, `MEASURES`. Several points of one policy, each what a row may spend, are
scored in shared batches: a row gets there what it gets alone. Fixed rungs are not: a batch reads the directions of all
rungs that are active in it, for all of its rows.

Shape legend: D documents, B rows of a batch, T tokens, V vocabulary, J rungs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.contract import RankPolicy
from policy.operating import Operating
from policy.settings import MODEL_SIGNALS, Settings
from runtime.control.record import PROMPT, RESPONSE, Keep, count_rungs
from runtime.control.stream import Stream
from runtime.ladder import Ladder
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate
from runtime.reference.run import AdaptiveCache, AdaptiveRun
from runtime.reference.whole import settled

from ..documents import Batch, Example, batches, make_batch, positions_within
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
    """(log-probabilities [N, V], following tokens [N], exact distributions [N, V]) of the scored tokens -> [N]."""
    value: Callable[[float], float]
    """From the mean per scored token to the number that is reported."""
    against_full: bool
    """Whether it needs the exact distributions."""


def _kl(log_p: Tensor, following: Tensor, exact: Exact | None) -> Tensor:
    assert exact is not None, "a measure against the full rank is given it"
    return token_kl(exact, log_p)


def _nll(log_p: Tensor, following: Tensor, exact: Exact | None) -> Tensor:
    return torch.nn.functional.nll_loss(log_p, following, reduction="none")


MEASURES = {
    "kl": Measure(_kl, float, against_full=True),
    "perplexity": Measure(_nll, lambda nats: float(np.exp(nats)), against_full=False),
}


@dataclass(frozen=True)
class KVBytes:
    """What KV caches hold."""

    text: int
    """Keys and values of the tokens, in the formats of their pages."""
    full: int
    """The same tokens in the model's own dtype."""
    allocated: int
    """Storage, room to spare included."""

    @staticmethod
    def of(cache: AdaptiveCache) -> KVBytes:
        """Of one cache, as it is now."""
        return KVBytes(cache.kv_bytes(), cache.kv_bytes_full(), cache.kv_bytes_allocated())

    @staticmethod
    def together(parts: Sequence[KVBytes | None]) -> KVBytes | None:
        """Of all parts; None where one of them is."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return KVBytes(*(sum(getattr(part, name) for part in known) for name in ("text", "full", "allocated")))


@dataclass(frozen=True)
class Scores:
    """Sums per document, [D] each unless said otherwise."""

    sums: dict[str, np.ndarray]
    """Of every measure over the scored tokens, by its name in `MEASURES`."""
    tokens: np.ndarray
    """Scored tokens."""
    rungs: np.ndarray
    """[D, J] scored tokens that read rung j: their active one, and what a fade from bank to bank reads beside it."""
    prompt_rungs: np.ndarray
    """[D, J] the same of prompt tokens."""
    kv: KVBytes | None = None
    """Of all documents' caches, each at its end; None where several points shared them."""
    processed: int = 0
    """Real tokens that went through the model, prompts included."""
    ms: float = field(default=0.0, compare=False)
    """Wall time of these forwards, a batch of rows at a time, shared among its rows."""

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
            kv=KVBytes.together([part.kv for part in parts]),
            processed=sum(part.processed for part in parts),
            ms=sum(part.ms for part in parts),
        )


PlanFor = Callable[[list[int], list[int]], RunPlan]
"""(documents [B], points [B]) -> the plan of a batch whose rows are these documents at these points."""


class Scorer:
    """One adapter's documents, with the exact adapter's distributions where a measure asks for them."""

    def __init__(
        self,
        model: PreTrainedModel,
        ladder: Ladder,
        examples: Sequence[Example],
        measures: Sequence[str] = tuple(MEASURES),
        rows: int = 48,
        whole: bool = False,
    ) -> None:
        """With `whole`, decode is scored by whole texts whose decisions have settled, not token by token."""
        self.model, self.ladder, self.examples, self.rows, self.whole = model, ladder, examples, rows, whole
        self._outputs: dict[tuple[str, int, int], Tensor] = {}
        """Where a text's decisions settle from: what the model put out when it last ran under such a policy, from the
        same start rung."""
        self.measures = {name: MEASURES[name] for name in measures}
        self._exact: dict[int, Exact] = {}

    def on(self, ladder: Ladder) -> Scorer:
        """The same documents under another ladder of the same adapter, whose exact distributions are the same."""
        other = copy.copy(self)
        other.ladder = ladder
        return other

    def score(self, plan: RunPlan, name: str | None = None) -> list[Scores]:
        """Scores of a plan at every row of its `operating`; `name` shows a progress bar."""

        def batch_plan(documents: list[int], points: list[int]) -> RunPlan:
            return replace(plan, operating=plan.operating.select(torch.tensor(points)))

        return self.score_with(batch_plan, len(plan.operating), name, apart=not plan.policy.looks)

    def score_with(
        self, plan_for: PlanFor, points: int, name: str | None = None, *, apart: bool = False
    ) -> list[Scores]:
        """Scores of `points` points, whose runs share batches unless `apart`: `plan_for` makes the plan of each."""
        docs = len(self.examples)
        found = [_Sums(docs, list(self.measures)) for _ in range(points)]
        made = self._batches([[point] for point in range(points)] if apart else [list(range(points))])
        if name is not None:
            made = with_progress(made, name, docs * points, lambda item: len(item[0]))
        for documents, at, batch in made:
            batch = batch.to(self.model.device)
            scored = batch.scored.bool()
            exact = self._exact_of(documents)
            started = time.perf_counter()
            plan = plan_for(documents, at)
            with activate(self.model, plan, keep=Keep.RUNGS) as run:
                if self.whole and plan.settings.block_tokens == 1 and plan.operating.kv.is_full and plan.policy.looks:
                    logits, stream, kv = *self._settled(run, documents, batch, scored), None
                else:
                    cache = run.new_cache(len(at), prompt_tokens=batch.prompt_tokens)
                    logits = run.logits_at(batch.tokens, batch.real, cache, scored)
                    stream, kv = cache.stream, KVBytes.of(cache) if apart or points == 1 else None
            # Reading a number waits for the device, so that the clock sees the whole forward.
            lengths, tokens = batch.real.sum(1).tolist(), scored.sum(1).tolist()
            seconds = time.perf_counter() - started
            values = self._measured(logits, batch.tokens.roll(-1, 1)[scored], tokens, exact)
            active, count = stream.active_rungs(), len(stream.policy.rungs)
            beside = stream.sums.beside
            rungs, prompt_rungs = (
                (count_rungs(active, where, count) + beside[:, part]).cpu().numpy()
                for where, part in ((scored, RESPONSE), (batch.prompt(), PROMPT))
            )
            for row, (document, point) in enumerate(zip(documents, at, strict=True)):
                mine = found[point]
                for measure, by_row in values.items():
                    mine.sums[measure][document] = by_row[row]
                mine.tokens[document] = tokens[row]
                mine.rungs[document], mine.prompt_rungs[document] = rungs[row], prompt_rungs[row]
                mine.processed += lengths[row]
                mine.ms += 1000 * seconds / len(at)
            for point in set(at):
                found[point].kv.append(kv)
        return [sums.scores() for sums in found]

    def _settled(
        self, run: AdaptiveRun, documents: Sequence[int], batch: Batch, scored: Tensor
    ) -> tuple[Tensor, Stream]:
        """Logits [N, V] of the scored tokens, and what decided, of texts run as a whole."""
        starts = run.plan.operating.for_rows(len(documents)).start_rung.tolist()
        keys = [(run.plan.policy.kind, *own) for own in zip(documents, starts, strict=True)]
        known, outputs = [self._outputs.get(key) for key in keys], None
        if all(own is not None for own in known):
            outputs = torch.zeros(*batch.tokens.shape, len(MODEL_SIGNALS), device=batch.tokens.device)
            for row, own in enumerate(known):
                assert own is not None
                outputs[row, : len(own)] = own
        found = settled(run, batch.tokens, batch.real, batch.prompt_tokens, outputs=outputs)
        for key, own, length in zip(keys, found.outputs, batch.real.sum(1).tolist(), strict=True):
            self._outputs[key] = own[:length].clone()
        return found.logits[scored], found.stream

    def _batches(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int], Batch]]:
        """(documents [B], points [B], the batch): every document at every point, those of a group side by side."""
        positions = positions_within(self.model, LOGITS_BYTES)
        for group in groups:
            for index, batch in batches(self.examples, self.rows, positions, len(group)):
                yield [i // len(group) for i in index], [group[i % len(group)] for i in index], batch

    def _measured(
        self, logits: Tensor, following: Tensor, tokens: Sequence[int], exact: Sequence[Exact | None]
    ) -> dict[str, list[float]]:
        """Sums of every measure, row by row, each with its `tokens` of logits [N, V] and following tokens [N].

        One row at a time: its distributions stay in a CPU's cache.
        """
        sums: dict[str, list[Tensor]] = {name: [] for name in self.measures}
        for own, next_tokens, full in zip(logits.split(tokens), following.split(tokens), exact, strict=True):
            log_p = own.float().log_softmax(-1)
            for name, measure in self.measures.items():
                sums[name].append(measure.tokens(log_p, next_tokens, full).double().sum())
        return {name: torch.stack(values).tolist() for name, values in sums.items()}

    def _exact_of(self, documents: Sequence[int]) -> list[Exact | None]:
        """The exact adapter's distributions at the scored tokens of these documents, where a measure asks for them."""
        if not any(measure.against_full for measure in self.measures.values()):
            return [None] * len(documents)
        missing = [document for document in dict.fromkeys(documents) if document not in self._exact]
        made = self._run_exact(missing) if missing else {}
        for document, exact in made.items():
            if sum(kept.nbytes for kept in self._exact.values()) + exact.nbytes <= KEPT_BYTES:
                self._exact[document] = exact
        return [made[document] if document in made else self._exact[document] for document in documents]

    def _run_exact(self, documents: list[int]) -> dict[int, Exact]:
        batch = make_batch([self.examples[document] for document in documents]).to(self.model.device)
        scored = batch.scored.bool()
        with activate(self.model, static_plan(self.ladder, self.ladder.rungs[-1])) as run:
            logits = run.logits_at(batch.tokens, batch.real, run.new_cache(len(documents)), scored)
        parts = logits.split(scored.sum(1).tolist())
        return {document: Exact.of(part) for document, part in zip(documents, parts, strict=True)}


class _Sums:
    """The scores of one point while they are added up."""

    def __init__(self, documents: int, measures: Sequence[str]) -> None:
        self.sums = {measure: np.zeros(documents) for measure in measures}
        self.tokens = np.zeros(documents)
        self.rungs, self.prompt_rungs = [np.zeros(0)] * documents, [np.zeros(0)] * documents
        self.kv: list[KVBytes | None] = []
        self.processed, self.ms = 0, 0.0

    def scores(self) -> Scores:
        by_rung = np.stack(self.rungs), np.stack(self.prompt_rungs)
        return Scores(self.sums, self.tokens, *by_rung, KVBytes.together(self.kv), self.processed, self.ms)


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of every task, on which policies are measured."""

    scorers: tuple[Scorer, ...]

    def measure(
        self, policy: RankPolicy, settings: Settings, operating: Operating, name: str | None = None
    ) -> list[Scores]:
        """Scores of one policy at every row of `operating`, over the documents of all tasks."""
        plans = [RunPlan((scorer.ladder,), policy, settings, operating) for scorer in self.scorers]
        found = [scorer.score(plan, name) for scorer, plan in zip(self.scorers, plans, strict=True)]
        return [Scores.concatenate(parts) for parts in zip(*found, strict=True)]
