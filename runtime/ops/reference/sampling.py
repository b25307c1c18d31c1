"""How a row's next token is chosen, in plain PyTorch: what `runtime.ops.sampling` must equal.

The order and the meaning of the parameters are transformers' (`generation.logits_process`): repetition penalty, and
where a token is drawn temperature, top-k, top-p and min-p, each of which leaves one token at least. Only top-p differs,
and only where logits are equal: all that equal the last one kept are kept, where a sort keeps some of them.

Shape legend: B rows, V vocabulary, S tokens that a row's log holds, E tokens that end a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from policy.limits import Number, Whole, check_fields, limited, refused

from ...control import signals

LEAST_UNIFORM = 2.0**-32
"""What a uniform number of 0 counts as: 31 random bits cannot tell it from anything below 2**-31."""
COLDEST = 1e-6
"""The least temperature above 0: colder ones would leave float32, and would draw the largest logit anyway."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are chosen. Raises ValueError, naming the first field that is out of its limits."""

    temperature: float = field(default=0.0, metadata=limited(Number(0, 1e6)))
    """What divides the logits; 0: the largest is taken."""
    top_k: int = field(default=0, metadata=limited(Whole(0, 2**31 - 1)))
    """How many of the largest logits are kept, and all that equal the last of them; 0: all."""
    top_p: float = field(default=1.0, metadata=limited(Number(0, 1)))
    """The least mass of the most probable tokens, which are kept; 1: all."""
    min_p: float = field(default=0.0, metadata=limited(Number(0, 1)))
    """Tokens less probable than this share of the most probable one's are left out; 0: none."""
    penalty: float = field(default=1.0, metadata=limited(Number(1e-6, 1e6)))
    """What divides the positive logits of tokens that the row has, and multiplies the negative ones; 1: nothing."""
    seed: int = field(default=0, metadata=limited(Whole(0, 2**63 - 1)))
    """Of the noise, with the row's count: the same logits are drawn from alike, wherever in a batch the row is."""

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        if 0 < self.temperature < COLDEST:
            raise refused("sampling.temperature", f"0, or {COLDEST:g} at least", self.temperature)


@dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of every row of a batch: static tensors [B], rewritten in place."""

    temperature: Tensor
    """float32, as are top_p, min_p and penalty."""
    top_k: Tensor
    """int32"""
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    seed: Tensor
    """int64"""

    @classmethod
    def of(cls, rows: int, device: torch.device) -> SamplingRows:
        """`rows` rows, all greedy."""
        whole = {"top_k": torch.int32, "seed": torch.int64}
        greedy = asdict(Sampling()).items()
        dtypes = {name: whole.get(name, torch.float32) for name, _ in greedy}
        return cls(**{name: torch.full((rows,), x, dtype=dtypes[name], device=device) for name, x in greedy})

    def set(self, row: int, sampling: Sampling) -> None:
        """From the next token on `row` is sampled like this. Nobody waits: `tensor[row] = number` would."""
        for parameter in fields(self):
            getattr(self, parameter.name)[row].fill_(getattr(sampling, parameter.name))


@dataclass(frozen=True)
class Generated:
    """What rows have generated: static tensors, which every step updates in place."""

    tokens: Tensor
    """[B] int64: the newest token, the next step's input."""
    seen: Tensor
    """[B, V] uint8: not 0 where the row has the token, in its prompt or since."""
    ended: Tensor
    """[B] uint8: not 0 once a token of `ends` was chosen; the row goes on with `pad`."""
    count: Tensor
    """[B] int32: how many tokens were chosen, pads too; it goes on where the log is full."""
    log: Tensor
    """[B, S] int64: these tokens; those from the S-th on are not kept."""
    given: Tensor
    """[B] int32, at most S: how many tokens of the log are there from the start. They are taken when it is their turn,
    whatever the logits say: a row that was interrupted goes the same way again."""
    pad: Tensor
    """[B] int64"""
    ends: Tensor
    """[E] int64, E may be 0"""

    @classmethod
    def of(cls, rows: int, vocabulary: int, capacity: int, ends: Tensor) -> Generated:
        """Of `rows` rows that have nothing yet, S = `capacity`, pad 0, on the device of `ends`."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=ends.device)

        return cls(
            tokens=zeros(rows),
            seen=zeros(rows, vocabulary, dtype=torch.uint8),
            ended=zeros(rows, dtype=torch.uint8),
            count=zeros(rows, dtype=torch.int32),
            log=zeros(rows, capacity),
            given=zeros(rows, dtype=torch.int32),
            pad=zeros(rows),
            ends=ends,
        )


def process(logits: Tensor, seen: Tensor, rows: SamplingRows) -> Tensor:
    """What the token is chosen from: logits [B, V] float32, seen [B, V] -> [B, V] float32, -inf what is left out."""
    penalised = torch.where(logits < 0, logits * rows.penalty[:, None], logits / rows.penalty[:, None])
    scores = torch.where(seen != 0, penalised, logits)
    drawn = rows.temperature[:, None] > 0
    scores = scores / torch.where(drawn, rows.temperature[:, None], 1.0)
    kept = scores
    for least in (_top_k, _top_p, _min_p):
        kept = kept.masked_fill(kept < least(kept, rows), -torch.inf)
    return torch.where(drawn, kept, scores)


def _top_k(scores: Tensor, rows: SamplingRows) -> Tensor:
    """The least score that top-k keeps, [B, 1]."""
    vocabulary = scores.shape[-1]
    last = torch.where(rows.top_k > 0, rows.top_k, vocabulary).clamp(max=vocabulary)[:, None].long() - 1
    return scores.sort(-1, descending=True).values.gather(-1, last)


def _top_p(scores: Tensor, rows: SamplingRows) -> Tensor:
    ascending = scores.sort(-1).values
    left_out = ascending.softmax(-1).cumsum(-1) <= 1 - rows.top_p[:, None]
    left_out[:, -1] = False
    least = ascending.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)
    return torch.where(rows.top_p[:, None] < 1, least, -torch.inf)


def _min_p(scores: Tensor, rows: SamplingRows) -> Tensor:
    return scores.amax(-1, keepdim=True) + rows.min_p[:, None].log()


def gumbel(uniforms: Tensor) -> Tensor:
    """Gumbel noise of uniform numbers in [0, 1): the argmax of scores and noise is a draw from softmax(scores).

    The large numbers, which decide, come of the small uniforms, of which float32 holds many more than of those near 1.
    """
    return -torch.log(-torch.log1p(-uniforms.clamp(min=LEAST_UNIFORM)))


def sample(
    logits: Tensor, rows: SamplingRows, generated: Generated, uniforms: Tensor, entropy: Tensor, surprisal: Tensor
) -> None:
    """Choose every row's next token and write it into `generated`, everything in place.

    logits [B, V] float32 as the model put them out; uniforms [B, V] in [0, 1), read in rows with a temperature. Written
    to [B] float32, of the distribution before any processing, both divided by log V and in [0, 1]: `entropy`, and
    `surprisal`, that of the token chosen, or given (in a row that has ended: of the one it would have chosen).
    """
    drawn = rows.temperature[:, None] > 0
    scores = process(logits, generated.seen, rows) + torch.where(drawn, gumbel(uniforms), 0.0)
    chosen = _or_given(scores.argmax(-1), generated)
    log_p = signals.log_probabilities(logits)
    entropy.copy_(signals.next_token_entropy(log_p))
    surprisal.copy_(signals.surprisal(log_p, chosen))
    _append(chosen, generated)


def _or_given(chosen: Tensor, generated: Generated) -> Tensor:
    """The tokens chosen, [B] int64; where a row has not ended and its log holds the next one already, that one."""
    given = (generated.count < generated.given) & (generated.ended == 0)
    there = generated.log.gather(1, torch.where(given, generated.count, 0).long()[:, None])[:, 0]
    return torch.where(given, there, chosen)


def _append(chosen: Tensor, generated: Generated) -> None:
    ended = generated.ended != 0
    token = torch.where(ended, generated.pad, chosen)
    row = torch.arange(len(chosen), device=chosen.device)
    fits = generated.count < generated.log.shape[1]
    generated.seen[row[~ended], chosen[~ended]] = 1
    generated.log[row[fits], generated.count[fits].long()] = token[fits]
    generated.count.add_(1)
    generated.tokens.copy_(token)
    generated.ended.copy_(ended | torch.isin(token, generated.ends))
