"""Everything about an adaptive run that is decided before the first token.

These records travel inside a policy checkpoint, so that serving repeats exactly what training measured. They are
frozen and validated once, on construction; a command-line flag's default is the default written here. What differs
from request to request, knob, start rung, KV policy and adapter, is not here but in `operating`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MODEL_SIGNALS = ("entropy", "attention")
"""Signals that the model puts out: known of tokens in completed blocks only."""

TOKEN_SIGNALS = ("novelty", "prior")
"""Signals that follow from the tokens alone: known of a token before it is processed."""

SIGNALS = (*MODEL_SIGNALS, *TOKEN_SIGNALS)
"""The complexity signals, in the order of every tensor that has a signal axis. Each lies in [0, 1]."""

STATS = ("mean", "max", "last")
"""What a chunk's summary keeps of each signal, in the order of every tensor that has a statistics axis."""

FADES = (1, 4, 8, 16)
DEFAULT_RUNGS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PAGE_TOKENS = 16
PAGE_ACTIONS = ("full", "int8", "int4", "sparse", "dropped")


def _check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}; correct this setting")


@dataclass(frozen=True)
class SignalSettings:
    """How the four signals are measured (all causal, all in [0, 1])."""

    novelty_window_tokens: int = 256
    """Rolling window in which an n-gram counts as seen before."""
    recent_pages: int = 2
    """Attention to these last pages (the current one included) is local; the proxy is the mass beyond them."""
    attention_layers: int = 3
    """The proxy averages the heads of this many layers, evenly spaced, the last one included."""
    prior_decay_tokens: int = 64
    """The positional prior falls as exp(-i / prior_decay_tokens) over response tokens i = 0, 1, ..."""

    def __post_init__(self) -> None:
        for name in ("novelty_window_tokens", "recent_pages", "attention_layers", "prior_decay_tokens"):
            _check(getattr(self, name) >= 1, f"signals.{name}", "an integer of at least 1", getattr(self, name))


@dataclass(frozen=True)
class ChunkSettings:
    """When a chunk closes: at `max_tokens`, or from `min_tokens` on when the complexity class changes."""

    min_tokens: int = 4
    max_tokens: int = 16
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SIGNALS, 1.0))
    """Weight of each signal in the token complexity, by name; a signal left out counts nothing."""
    smoothing: float = 0.5
    """Weight of the newest value in each signal's running mean; 1 is no smoothing."""
    thresholds: tuple[float, ...] = (0.4, 0.6)
    """Complexity at which one class ends and the next begins, ascending."""
    hysteresis: float = 0.05
    """How far past a threshold the complexity must go before the class changes."""

    def __post_init__(self) -> None:
        _check(isinstance(self.weights, dict), "chunk.weights", f"a weight by name of {SIGNALS}", self.weights)
        unknown = self.weights.keys() - set(SIGNALS)
        _check(not unknown, "chunk.weights", f"names among {', '.join(SIGNALS)}", sorted(unknown))
        weights = {name: float(self.weights.get(name, 0.0)) for name in SIGNALS}
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        lengths = (self.min_tokens, self.max_tokens)
        _check(
            1 <= self.min_tokens <= self.max_tokens, "chunk.min_tokens, chunk.max_tokens", "1 <= min <= max", lengths
        )
        ok = min(weights.values()) >= 0 and sum(weights.values()) > 0
        _check(ok, "chunk.weights", "weights >= 0 that are not all zero", weights)
        _check(0 < self.smoothing <= 1, "chunk.smoothing", "a number in (0, 1]", self.smoothing)
        _check(list(self.thresholds) == sorted(self.thresholds), "chunk.thresholds", "ascending", self.thresholds)
        _check(self.hysteresis >= 0, "chunk.hysteresis", "a number of at least 0", self.hysteresis)


@dataclass(frozen=True)
class KVSettings:
    """What becomes of a KV page of 16 tokens once it is full and has left the window.

    `full` keeps the model's own dtype, `int8` and `int4` are symmetric codes with one bf16 scale, `sparse` keeps the
    `sparse_keep` tokens of the page that received most attention (in int8), `dropped` frees the page.
    """

    hard: str = "int8"
    easy: str = "int4"
    threshold: float = 0.5
    """A page whose mean token complexity is at least this is hard."""
    sink_pages: int = 1
    window_tokens: int = 128
    sparse_keep: int = 4

    def __post_init__(self) -> None:
        for name in ("hard", "easy"):
            action = getattr(self, name)
            _check(action in PAGE_ACTIONS, f"kv.{name}", f"one of {', '.join(PAGE_ACTIONS)}", action)
        _check(self.sink_pages >= 0, "kv.sink_pages", "an integer of at least 0", self.sink_pages)
        _check(self.window_tokens >= 0, "kv.window_tokens", "an integer of at least 0", self.window_tokens)
        _check(1 <= self.sparse_keep <= PAGE_TOKENS, "kv.sparse_keep", f"1 to {PAGE_TOKENS}", self.sparse_keep)

    @property
    def is_full(self) -> bool:
        """True when no page is ever stored in fewer bits than the model computes in."""
        return self.hard == self.easy == "full"


FULL_KV = KVSettings(hard="full", easy="full")
"""Every page in the model's own dtype: what `budget=1.0`, or no policy, means."""


@dataclass(frozen=True)
class Settings:
    """The whole adaptive run: blocks, fades, signals, chunks and KV pages."""

    block_tokens: int = 32
    """Tokens that one forward pass of prefill handles; signals that the model puts out are those of earlier blocks."""
    fade_tokens: int = 1
    """Cross-fade length w; 1 switches hard. A fade reads both of its rungs for w tokens."""
    signals: SignalSettings = field(default_factory=SignalSettings)
    chunk: ChunkSettings = field(default_factory=ChunkSettings)
    kv: KVSettings = field(default_factory=KVSettings)

    def __post_init__(self) -> None:
        _check(self.block_tokens >= 1, "block_tokens", "an integer of at least 1", self.block_tokens)
        _check(self.fade_tokens in FADES, "fade_tokens", f"one of {FADES}", self.fade_tokens)
        # A fade reads the rung it leaves: it must have ended before the next chunk may open.
        least = self.chunk.min_tokens
        _check(self.fade_tokens <= least, "fade_tokens", f"at most chunk.min_tokens, {least}", self.fade_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`. Raises ValueError for an unknown or missing setting."""
        try:
            parts = {"signals": SignalSettings, "chunk": ChunkSettings, "kv": KVSettings}
            return cls(**{k: parts[k](**v) if k in parts else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(
                f"settings: expected those of this version, got {error}; export the policy again"
            ) from None
