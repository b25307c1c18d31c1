"""What is asked of the engine, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from policy.limits import Whole, shown
from policy.operating import KVRows, Operating
from policy.settings import PAGE_TOKENS, Settings

from ..control.bucket import Offer, affordable
from ..control.stream import static_rungs
from ..kv.units import Units
from ..ops.reference.sampling import Sampling
from ..plan import RunPlan
from .model import Model

NEW_TOKENS = Whole(1, 2**24)
PRIORITY = Whole(-(2**31), 2**31)


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, what may be spent on it, and how it is answered. Raises ValueError, naming what is out of limits."""

    prompt: Sequence[int]
    """Token ids; kept as a tuple, as a prompt that gives way is gone through again"""
    operating: Operating
    """Of one row: adapter, budget or rung, KV policy; `Engine.operating` makes one"""
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    """Strings that end the answer, which goes up to where the first of them begins"""
    priority: int = 0
    """Higher ones are let in first, and give way last"""

    def __post_init__(self) -> None:
        NEW_TOKENS.take("request.max_new_tokens", self.max_new_tokens)
        PRIORITY.take("request.priority", self.priority)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"request.sampling: expected a Sampling, got {shown(self.sampling)}; make one")
        given = tuple(self.prompt)
        if not given:
            raise ValueError("request.prompt: expected at least one token id, got none; pass a prompt")
        odd = next((own for own in given if not isinstance(own, Integral) or isinstance(own, bool)), None)
        if odd is not None:
            raise ValueError(
                f"request.prompt: expected token ids, got {shown(odd)}; pass whole numbers, as `tolist` has"
            )
        object.__setattr__(self, "prompt", tuple(map(int, given)))
        if isinstance(self.stop, str) or not all(isinstance(own, str) and own for own in self.stop):
            raise ValueError(f"request.stop: expected strings that are not empty, got {self.stop!r}; correct it")
        if len(self.operating) != 1:
            raise ValueError(
                f"request.operating: expected that of one row, got {len(self.operating)} rows; select one of them"
            )


END, LENGTH, STOP, CANCELLED = "end", "length", "stop", "cancelled"
"""Why an answer is over: a token that ends texts, as many tokens as were asked for, a stop string, or the caller."""


@dataclass(eq=False)
class Answer:
    """A request on its way."""

    request: Request
    number: int
    """In the order of arrival"""
    tokens: list[int] = field(default_factory=list)
    """What has been answered so far, as far as the host has seen it"""
    text: str = ""
    """The same as text, up to a stop string, and without what may be the beginning of one; none without a tokenizer"""
    finished: str | None = None
    """Why it is over; None: it is not"""
    preempted: int = 0
    """How often it has given way to others, and was computed again"""

    @property
    def rank(self) -> tuple[int, int]:
        """Ascending: who is let in before others, and gives way after them."""
        return -self.request.priority, self.number


@dataclass(frozen=True)
class News:
    """What a step has brought an answer."""

    answer: Answer
    tokens: list[int]
    text: str
    """What its text has become longer by"""
    finished: str | None


def pages_why_not(kv: KVRows, model: Model, settings: Settings) -> str | None:
    """Why the engine cannot keep pages by such a policy, as a clause; None where it can."""
    if kv.is_full:
        return None
    if kv.may_be_sparse:
        return "its KV policy makes pages sparse"
    if any(layer.window for layer in model.layers):
        return "its KV policy codes pages, and layers of the model see a window of the text"
    least = PAGE_TOKENS * max(1, settings.signals.recent_pages - 1)
    shortest = int(kv.window_tokens.min())
    if shortest < least:
        return f"its KV policy keeps a window of {shortest} tokens, and attention is listened to over {least}"
    return None


def check_operating(
    operating: Operating, plan: RunPlan, offer: Offer, model: Model, units: Units, *, decides: bool
) -> None:
    """Raise ValueError for a row that an engine does not serve which holds this plan, whose ladders `offer` so much,
    this model, pages in such units, and `decides` or has none who does."""
    number = int(operating.adapter[0])
    if not 0 <= number < len(plan.ladders):
        raise ValueError(f"adapter: expected a number below {len(plan.ladders)}, got {number}; see `operating`")
    if not operating.kv.is_full and not units.coded:
        raise ValueError(
            "kv: expected pages in the model's own dtype, as the engine's policy keeps them, got some that may be "
            "coded; make the engine with a policy that codes pages"
        )
    reason = pages_why_not(operating.kv, model, plan.settings)
    if reason is not None:
        raise ValueError(f"kv: expected pages that the engine keeps, got others: {reason}; leave it to the policy")
    offer = offer.select(operating.adapter)
    if not decides and static_rungs(plan.policy, operating, offer) is None:
        raise ValueError("operating: expected a rung that stays, as the engine has no policy, got one that moves")
    start = min(int(operating.start_rung[0]), int(offer.resident[0]))
    if decides and not affordable(operating, offer):
        raise ValueError(
            f"operating: expected a start rung within the budget {float(operating.budget[0]):.4g}, got rung number "
            f"{start}, which costs {float(offer.cost[0, start]):.4g}; lower it, as `operating` does"
        )
