"""The context manager that makes a model adaptive, and its `generate` fast where that can be.

with adaptive(model, adapter, policy="policy/") as run:
    model.generate(**inputs)        # the engine, or transformers' own loop: run.path says which and why
    model(input_ids).logits         # perplexity harnesses see the same rank policy
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from policy.checkpoint import PolicyCheckpoint
from policy.rungs import Rung

from ..control.record import Keep
from ..loading import kernels_why_not
from ..plan import AdapterSource
from ..reference import adaptive as reference
from ..reference.adaptive import AdaptiveRun, check_length
from .options import why_not_call

log = logging.getLogger("chunkwise_lora")
FAST = "fast: the engine, one graph for every token"
LEAVE_OUT = {
    "fast": "leave fast out, and transformers' own loop serves it",
    "latency_budget_ms": "the policy's milliseconds are the engine's; use budget",
}
"""What to do where the engine does not cover what is asked for, by the argument that insists on it."""


@contextmanager
def adaptive(
    model: PreTrainedModel,
    adapter: AdapterSource | Sequence[AdapterSource],
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: Rung | Sequence[Rung] | None = None,
    resident_rung: Rung | None = None,
    keep_record: bool = False,
    fast: bool | None = None,
    batch: int | None = None,
) -> Iterator[AdaptiveRun]:
    """Make `model.generate(...)` and `model(...)` adaptive until the block ends; arguments as in `generate`.

    `fast` True: `generate` goes through the engine, and what the engine cannot do is refused, with the reason; False:
    it never does; None: it does on a GPU where it can. `run.path` says which way the latest went and why. A
    `latency_budget_ms` insists as well where the policy's table is of the engine. All else is as in
    `reference.adaptive.adaptive`.
    """
    insists = "fast" if fast else None
    if latency_budget_ms is not None and policy is not None:
        policy = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
        if policy.latency is not None and policy.latency.of_engine:
            insists = insists or "latency_budget_ms"
    chosen = reference.adaptive(
        model, adapter, policy=policy, budget=budget, latency_budget_ms=latency_budget_ms, rung=rung,
        resident_rung=resident_rung, keep_record=keep_record, batch=batch,
    )  # fmt: skip
    with chosen as run:
        reason = _why_not(model, run, fast)
        if insists is not None and reason is not None:
            raise _not_covered(insists, "run", reason)
        own: Any = model.generate
        replaced: Any = model
        replaced.generate = _choosing(model, run, own, reason, insists)
        try:
            yield run
        finally:
            replaced.generate = own


def _why_not(model: PreTrainedModel, run: AdaptiveRun, fast: bool | None) -> str | None:
    """Why the run does not go through the engine, as a clause; None where it does."""
    if fast is False:
        return "fast=False"
    reason = kernels_why_not(model.device, interpreted=bool(fast))
    if reason is not None:
        return reason
    if run.keep is Keep.DECISIONS:
        return "a record of every decision is asked for"
    from .fast import why_not  # not before it is known that there is Triton

    return why_not(model, run.plan)


def _not_covered(insists: str, what: str, reason: str) -> ValueError:
    return ValueError(
        f"{insists}: expected a {what} that the engine covers, got one that it does not: {reason}; {LEAVE_OUT[insists]}"
    )


def _choosing(
    model: PreTrainedModel, run: AdaptiveRun, own: Callable[..., Any], reason: str | None, insists: str | None
) -> Callable[..., Any]:
    """`model.generate` through the engine, made at its first call, or through `own` for a reason."""
    engine: list[Any] = []
    said: set[str] = set()

    @functools.wraps(own)
    def generate(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        why = reason
        if why is None:
            why = "it asks for more than a batch of token ids" if ids is None or args else None
        if why is None and ids is not None:
            why = why_not_call(model, len(ids), {**kwargs, "generation_config": generation_config})
        if why is not None and insists is not None:
            raise _not_covered(insists, "call", why)
        run.path = FAST if why is None else f"reference: {why}"
        if run.path not in said:
            said.add(run.path)
            log.info("path %s", run.path)
        if why is not None:
            seed = kwargs.pop("seed", None)
            if seed is not None:
                raise ValueError(f"seed: expected none on the reference path, got {seed}; use transformers.set_seed")
            return own(inputs, generation_config, *args, **kwargs)
        assert ids is not None
        kwargs["generation_config"] = generation_config
        check_length(model, ids, kwargs.get("attention_mask"), kwargs)
        with run.alone():
            if not engine:
                from .fast import FastPath

                engine.append(FastPath(model, run))
            return engine[0].generate(ids, kwargs)

    return generate
