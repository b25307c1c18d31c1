"""Run a policy on held-out documents, for real, and add up what it cost and what it lost.

No table of uniform runs stands in for a mixed run here: every number comes from logits of the model while the policy
moved between rungs. Per document, so that a bootstrap can resample documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.contract import RankPolicy
from policy.oracle import OraclePolicy
from policy.settings import FULL_KV, Settings
from runtime.adaptive import activate
from runtime.ladder import Ladder
from runtime.plan import RunPlan, static_plan

from .documents import Batch, Example, batches, positions_within
from .oracle import by_position, oracle_rungs
from .targets import token_kl

LOGITS_BYTES = 2**28
"""Float32 log-probabilities of one batch take no more, unless one document alone does."""
KEPT_BYTES = 2**30
"""Full-rank log-probabilities are kept between measurements up to this; beyond, they are computed again each time."""


@dataclass(frozen=True)
class Scores:
    """Sums per document, [D] each unless said otherwise."""

    kl: np.ndarray
    """Nats over scored tokens."""
    tokens: np.ndarray
    """Scored tokens."""
    rungs: np.ndarray
    """[D, J] scored tokens whose active rung was j."""
    prompt_rank: np.ndarray
    """Byte-weighted active rank over prompt tokens."""
    prompt_tokens: np.ndarray
    nll: np.ndarray
    """Negative log-likelihood of the completion, nats."""

    def mean_rank(self, rung_rank: np.ndarray) -> float:
        return float((self.rungs @ rung_rank).sum() / self.tokens.sum())

    def mean_cost(self, cost: np.ndarray) -> float:
        """Mean over scored tokens of the active rung's cost, `cost` [J]."""
        return float((self.rungs @ cost).sum() / self.tokens.sum())

    def mean_kl(self) -> float:
        return float(self.kl.sum() / self.tokens.sum())

    def mean_prompt_rank(self) -> float | None:
        total = self.prompt_tokens.sum()
        return float(self.prompt_rank.sum() / total) if total else None


@dataclass(frozen=True)
class Hindsight:
    """What the oracle knows of one document's C chunks."""

    starts: Tensor
    """[C] long"""
    damage: Tensor
    """[C, J] nats per token"""
    scored: Tensor
    """[C] scored tokens"""


Policies = Callable[[Sequence[int]], RankPolicy]
"""The policy for a batch of these documents; only an oracle's differs from batch to batch."""


class HeldOut:
    """Documents with their full-rank log-probabilities, against which policies are measured."""

    def __init__(self, model: PreTrainedModel, ladder: Ladder, examples: Sequence[Example], rows: int = 24) -> None:
        self.model, self.ladder, self.examples = model, ladder, examples
        made = batches(examples, rows, positions_within(model, LOGITS_BYTES))
        self.batches = [(index, batch.to(model.device)) for index, batch in made]
        self._rung_rank = ladder.mean_rank()
        self._full: dict[int, Tensor] = {}

    def _full_log_p(self, number: int) -> Tensor:
        if number in self._full:
            return self._full[number]
        batch = self.batches[number][1]
        with activate(self.model, static_plan(self.ladder, self.ladder.rungs[-1])) as run:
            logits = run.logits(batch.tokens, batch.real, run.new_cache(len(batch.tokens)))
        log_p = logits.float().log_softmax(-1)
        if sum(kept.nbytes for kept in self._full.values()) + log_p.nbytes <= KEPT_BYTES:
            self._full[number] = log_p
        return log_p

    @torch.no_grad()
    def measure(self, policy: RankPolicy | Policies, settings: Settings, knob: float) -> Scores:
        """Scores of one policy at one knob, KV in full precision so that rank alone is judged."""
        docs, rungs = len(self.examples), len(self.ladder.rungs)
        columns = {name: np.zeros(docs) for name in ("kl", "tokens", "prompt_rank", "prompt_tokens", "nll")}
        shares = np.zeros((docs, rungs))
        settings = replace(settings, kv=FULL_KV)
        for number, (index, batch) in enumerate(self.batches):
            chosen = policy if isinstance(policy, RankPolicy) else policy(index)
            plan = RunPlan(self.ladder, chosen, settings, knob)
            with activate(self.model, plan) as run:
                cache = run.new_cache(len(index), prompt_tokens=batch.prompt_tokens)
                logits = run.logits(batch.tokens, batch.real, cache)
            active = cache.stream.record()["active"]
            found = self._sums(self._full_log_p(number), logits, batch, active)
            for name, column in columns.items():
                column[index] = found[name].cpu().numpy()
            one_hot = torch.nn.functional.one_hot(active, rungs) * batch.scored[..., None]
            shares[index] = one_hot.sum(1).cpu().numpy()
        return Scores(rungs=shares, **columns)

    def _sums(self, full: Tensor, logits: Tensor, batch: Batch, active: Tensor) -> dict[str, Tensor]:
        rank = self._rung_rank.to(active.device)[active]
        steps = torch.arange(batch.tokens.shape[1], device=active.device)
        prompt = batch.real & (steps < batch.prompt_tokens[:, None])
        following = batch.tokens.roll(-1, 1)
        nll = -logits.float().log_softmax(-1).gather(2, following[..., None])[..., 0]
        return {
            "kl": (token_kl(full, logits) * batch.scored).sum(1),
            "tokens": batch.scored.sum(1),
            "prompt_rank": (rank * prompt).sum(1),
            "prompt_tokens": prompt.sum(1),
            "nll": (nll * batch.scored).sum(1),
        }

    def with_hindsight(self, hindsight: Sequence[Hindsight], scales: Tensor) -> HeldOut:
        """Give the oracle what it knows of each document, measured at the rungs' `scales` [J]."""
        self._hindsight, self._scales = list(hindsight), scales
        return self

    def measure_oracle(self, settings: Settings, mean_rank: float) -> Scores:
        """Scores of the policy that knows every chunk's damage ahead, aimed at a mean rank over scored tokens.

        Its chunks are those of the full-rank run; the mixed run's own may open elsewhere, so the mean rank is
        corrected once by what the first run showed.
        """
        first = self._measure_schedule(settings, mean_rank)
        missed = first.mean_rank(self._rung_rank.double().numpy()) - mean_rank
        second = self._measure_schedule(settings, mean_rank - missed)
        return min((first, second), key=lambda s: abs(s.mean_rank(self._rung_rank.double().numpy()) - mean_rank))

    def _measure_schedule(self, settings: Settings, mean_rank: float) -> Scores:
        damage = torch.cat([known.damage for known in self._hindsight])
        scored = torch.cat([known.scored for known in self._hindsight])
        rungs = oracle_rungs(damage, scored, self._rung_rank, mean_rank)
        per_document = rungs.split([len(known.starts) for known in self._hindsight])

        def schedule(index: Sequence[int]) -> OraclePolicy:
            rows = [
                by_position(self._hindsight[i].starts, per_document[i], len(self.examples[i]["input_ids"]))
                for i in index
            ]
            rung = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return OraclePolicy(settings, rung, self._scales[rung])

        return self.measure(schedule, settings, 0.0)
