"""Everything about an adaptive run that is decided before the first token.

These records travel inside a policy checkpoint, so that serving repeats exactly what training measured. They are
frozen and validated once, on construction; a command-line flag's default is the default written here. What differs
from request to request, knob, start rung, KV policy and adapter, is not here but in `operating`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .limits import Choice, Entries, Limit, Made, Number, Several, Whole, check_fields, limited, read_record, refused

MODEL_SIGNALS = ("entropy", "attention", "surprisal")
"""Signals that the model puts out: known of tokens in completed blocks only. The surprisal is that of a token under the
distribution before it, so the first token of a block has one already."""

TOKEN_SIGNALS = ("novelty", "prior", "difficulty", "pair")
"""Signals that follow from the tokens alone: known of a token before it is processed."""

SIGNALS = (*MODEL_SIGNALS, *TOKEN_SIGNALS)
"""The signals, in the order of every tensor that has a signal axis. Each lies in [0, 1]."""

PAPER_SIGNALS = ("entropy", "attention", "novelty", "prior")
"""The four of the paper, of which a token's complexity is made."""

AGE = "age"
"""How many tokens ago the signals that the model puts out became known: a feature of a policy, of no chunk."""

HIDDEN = "hidden"
"""The model's last hidden state at the latest completed token, and the embedding of the token about to be processed."""

LOOKS = (*SIGNALS, AGE, HIDDEN)
"""All that a learned policy may look at, in the order of its features."""

SIGNAL_SETS = {"four": PAPER_SIGNALS, "default": (*SIGNALS, AGE), "hidden": LOOKS}
"""What a learned policy may look at, by the name of the set."""

STATS = ("mean", "max", "last")
"""What a chunk's summary keeps of each signal, in the order of every tensor that has a statistics axis."""

FADES = (1, 4, 8, 16)
DEFAULT_SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
"""Default rungs, in shares of the adapter's bytes; the last is the exact adapter."""
PAGE_TOKENS = 16
PAGE_ACTIONS = ("full", "int8", "int4", "sparse", "dropped")

MOST_TOKENS = 10**9
"""No text is longer; what counts tokens or pages and holds no memory for them goes up to here."""

COMPLEXITIES = Number(-1000, 1000)
"""What a complexity may be compared with: it lies in [0, 1], and a limit far beyond is one that it never reaches."""


@dataclass(frozen=True)
class SignalWeights(Limit):
    """A weight of every signal, by name; one left out counts nothing."""

    least: float = 1e-6
    """Of a weight that is not 0: the sum of the known ones divides."""
    most: float = 1e6

    def __str__(self) -> str:
        return f"weights by name ({', '.join(SIGNALS)}), 0 or in [{self.least:g}, {self.most:g}], not all 0"

    def take(self, name: str, value: Any) -> dict[str, float]:
        given = Entries(dict.fromkeys(SIGNALS, Number(0, self.most)), complete=False).take(name, value)
        weights = {signal: given.get(signal, 0.0) for signal in SIGNALS}
        if not any(weights.values()) or any(0 < weight < self.least for weight in weights.values()):
            raise refused(name, self, value)
        return weights


@dataclass(frozen=True)
class SignalNames(Limit):
    """What a learned policy looks at: some of the signals, the age of what the model has put out, and its states."""

    def __str__(self) -> str:
        return f"a list of some of {', '.join(LOOKS)}, each once"

    def take(self, name: str, value: Any) -> tuple[str, ...]:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not listed or not value or not all(isinstance(own, str) and own in LOOKS for own in value):
            raise refused(name, self, value)
        if len(set(value)) < len(value):
            raise refused(name, self, value)
        return tuple(own for own in LOOKS if own in value)


@dataclass(frozen=True)
class SignalSettings:
    """How the signals are measured (all causal, all in [0, 1])."""

    novelty_window_tokens: int = field(default=256, metadata=limited(Whole(1, 2**16)))
    """Rolling window in which an n-gram counts as seen before."""
    recent_pages: int = field(default=2, metadata=limited(Whole(1, MOST_TOKENS)))
    """Attention to these last pages (the current one included) is local; the proxy is the mass beyond them."""
    attention_layers: int = field(default=3, metadata=limited(Whole(1, 10_000)))
    """The proxy averages the heads of this many layers, evenly spaced, the last one included."""
    prior_decay_tokens: int = field(default=64, metadata=limited(Whole(1, MOST_TOKENS)))
    """The positional prior falls as exp(-i / prior_decay_tokens) over response tokens i = 0, 1, ..."""

    def __post_init__(self) -> None:
        check_fields(self, "signals")


@dataclass(frozen=True)
class ChunkSettings:
    """When a chunk closes: at `max_tokens`, or from `min_tokens` on when the complexity class changes.

    By default every token is a chunk: held over four tokens or more, every gain of choosing vanishes (log).
    """

    min_tokens: int = field(default=1, metadata=limited(Whole(1, MOST_TOKENS)))
    max_tokens: int = field(default=1, metadata=limited(Whole(1, MOST_TOKENS)))
    weights: dict[str, float] = field(
        default_factory=lambda: {name: float(name in PAPER_SIGNALS) for name in SIGNALS},
        metadata=limited(SignalWeights()),
    )
    """Weight of each signal in the token complexity, by name; a signal left out counts nothing."""
    smoothing: float = field(default=0.5, metadata=limited(Number(0, 1, above=True)))
    """Weight of the newest value in each signal's running mean; 1 is no smoothing."""
    thresholds: tuple[float, ...] = field(
        default=(0.4, 0.6), metadata=limited(Several(COMPLEXITIES, 0, 64, ascending=True))
    )
    """Complexity at which one class ends and the next begins, ascending."""
    hysteresis: float = field(default=0.05, metadata=limited(Number(0, 1000)))
    """How far past a threshold the complexity must go before the class changes."""

    def __post_init__(self) -> None:
        check_fields(self, "chunk")
        if self.min_tokens > self.max_tokens:
            expected = f"a whole number in [1, {self.max_tokens}], chunk.max_tokens"
            raise refused("chunk.min_tokens", expected, self.min_tokens)


@dataclass(frozen=True)
class KVSettings:
    """What becomes of a KV page of 16 tokens once it is full and has left the window.

    `full` keeps the model's own dtype, `int8` and `int4` are symmetric codes with one bf16 scale, `sparse` keeps the
    `sparse_keep` tokens of the page that received most attention (in int8), `dropped` frees the page.
    """

    hard: str = field(default="int8", metadata=limited(Choice(PAGE_ACTIONS)))
    easy: str = field(default="int4", metadata=limited(Choice(PAGE_ACTIONS)))
    threshold: float = field(default=0.5, metadata=limited(COMPLEXITIES))
    """A page whose mean token complexity is at least this is hard."""
    sink_pages: int = field(default=1, metadata=limited(Whole(0, MOST_TOKENS)))
    window_tokens: int = field(default=128, metadata=limited(Whole(0, MOST_TOKENS)))
    sparse_keep: int = field(default=4, metadata=limited(Whole(1, PAGE_TOKENS)))

    def __post_init__(self) -> None:
        check_fields(self, "kv")

    @property
    def is_full(self) -> bool:
        """True when no page is ever stored in fewer bits than the model computes in."""
        return self.hard == self.easy == "full"


FULL_KV = KVSettings(hard="full", easy="full")
"""Every page in the model's own dtype: what `budget=1.0`, or no policy, means."""


@dataclass(frozen=True)
class Settings:
    """The whole adaptive run: blocks, fades, signals, chunks and KV pages."""

    block_tokens: int = field(default=32, metadata=limited(Whole(1, MOST_TOKENS)))
    """Tokens of a text that one pass of `model(...)` handles; signals that the model puts out are those of earlier
    blocks."""
    prompt_tokens: int = field(default=512, metadata=limited(Whole(1, MOST_TOKENS)))
    """Tokens of a prompt that one pass handles, when it is followed by an answer; more than `block_tokens`, as all of a
    prompt runs at its start rung and no choice waits for a block to end."""
    fade_tokens: int = field(default=1, metadata=limited(Choice(FADES)))
    """Cross-fade length w; 1 switches hard. A fade reads both of its rungs for w tokens."""
    signals: SignalSettings = field(default_factory=SignalSettings, metadata=limited(Made(SignalSettings)))
    chunk: ChunkSettings = field(default_factory=ChunkSettings, metadata=limited(Made(ChunkSettings)))
    kv: KVSettings = field(default_factory=KVSettings, metadata=limited(Made(KVSettings)))

    def __post_init__(self) -> None:
        check_fields(self)
        # A fade reads the rung it leaves: it must have ended before the next chunk may open.
        least = self.chunk.min_tokens
        if self.fade_tokens > least:
            raise refused(
                "fade_tokens", f"at most chunk.min_tokens, {least}", self.fade_tokens, "lower it, or raise that"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Settings:
        """The inverse of `to_dict`. Raises ValueError for an unknown or missing setting, or one beyond its limit."""
        parts: dict[str, type] = {"signals": SignalSettings, "chunk": ChunkSettings, "kv": KVSettings}
        if isinstance(values, dict):
            read: dict[str, Any] = {
                name: read_record(parts[name], values[name], name) for name in parts if name in values
            }
            values = {**values, **read}
        return read_record(cls, values, "settings")
