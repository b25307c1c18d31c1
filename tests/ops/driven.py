"""Rows that a `Stream` has begun and the controller's kernel goes on with, compared after every step."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from policy import (
    FULL_KV,
    ChunkSettings,
    FixedPolicy,
    KVSettings,
    LearnedPolicy,
    Operating,
    RankPolicy,
    Settings,
    SignalSettings,
    Summary,
)
from policy.difficulty import PAIRS, Difficulty
from policy.settings import AGE, PAGE_TOKENS, SIGNALS
from runtime.control.bucket import Offer
from runtime.control.signals import log_probabilities, next_token_entropy, surprisal
from runtime.control.state import Gathered
from runtime.control.stream import Stream
from runtime.engine.control import Controller, Ladders
from runtime.ops.resolve import Rows
from tests.runtime.reference import drawn_tables

RUNGS = (1, 2, 4, 6, 8)
COSTS = torch.tensor(
    [[0.125, 0.25, 0.5, 0.75, 1.0], [0.1, 0.2, 0.45, 0.8, 1.0], [0.125, 0.3, 0.5, 0.7, 1.0]], dtype=torch.float64
)
"""Of three ladders."""
VOCABULARY, PROBES, HEADS = 40, 3, 5
IDS = 6
"""Of the vocabulary those that occur: few, so that n-grams come again. Of the last one no table knows anything."""
DIFFICULTY = [drawn_tables(1, IDS - 1), drawn_tables(2, IDS - 2, PAIRS // 2), Difficulty.neutral()]
SLOTS = [3, 0, 2]
"""Where the ladders lie; slot 1 is empty."""
PLACES = 7
"""Rows of the batch, of which some stay empty."""
MOST_PAGES = 24
"""That any row here fills."""
GARBAGE = 2**40 + 3
UNTOUCHED = -5.0
"""In pages of rows that have not come."""

# What differs in the float32 numbers are roundings: quotients and exponentials of one operation each for signals, and
# for scales sums of up to 64 products, of size 1 and in another order, through two layers.
CLOSE_SIGNAL = {"atol": 8 * 2**-24, "rtol": 0}
CLOSE_SCALE = {"atol": 64 * 2**-24, "rtol": 0}
# A complexity is a mean of signals that are as close, made by at most 16 operations here and 16 there.
CLOSE_PAGE = {"atol": PAGE_TOKENS * (8 + 32) * 2**-24, "rtol": 0}


def learned(signals=(*SIGNALS, AGE), hidden: int = 48, seed: int = 22) -> LearnedPolicy:
    """One that does not choose the same for long."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = LearnedPolicy(RUNGS, hidden, signals=signals)
        damage = 0.02 * torch.rand(99, 1) * (1 / policy.cost - 1)
        policy.calibrate(torch.rand(99, Summary.FEATURES), damage, torch.linspace(-9, 2, 99))
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return policy


def fixed() -> FixedPolicy:
    return FixedPolicy(RUNGS, torch.tensor([1.3, 1.2, 0.9, 1.1, 1.0]))


@dataclass(frozen=True)
class Requests:
    """Rows that come together: one value of each for every row."""

    places: tuple[int, ...]
    """Where they are in the batch."""
    prompts: tuple[int, ...]
    """Tokens that have gone through the model in blocks before."""
    knobs: tuple[float, ...]
    starts: tuple[int, ...]
    budgets: tuple[float, ...]
    ladders: tuple[int, ...]
    resident: tuple[int, ...]
    unread: int = 0
    """Tokens of the prompt that are decoded one by one."""


INF = float("inf")
FIRST = Requests(
    (4, 0, 5), (3, 0, 11), (-2.5, -3.0, -60.0), (3, 1, 4), (INF, 0.23, 0.5 - 1e-7), (0, 1, 2), (4, 4, 4), unread=3
)
SECOND = Requests((2, 1), (23, 1), (-3.5, 60.0), (0, 2), (0.4, INF), (2, 0), (4, 2))


@dataclass(frozen=True)
class Running:
    """Rows that came together."""

    index: Tensor
    stream: Stream
    sums: Tensor
    """[n, P] float64 of every page's complexities, as the stream measures them."""

    def add(self, complexity: Tensor, real: Tensor) -> None:
        """Complexity [n, T] of the latest block."""
        pages = self.stream.block.positions // PAGE_TOKENS
        self.sums.scatter_add_(1, pages, complexity.double() * real)


class Driver:
    """Streams, and the controller that goes on from where their prompts end, fed with the same random numbers.

    With `pages` the controller sums complexities of so many a row, their signals weighted by `weights`.
    """

    def __init__(
        self, policy: RankPolicy, window: int, device: torch.device, *, pages: int = 0,
        weights: dict[str, float] | None = None, **options: Tensor,
    ) -> None:  # fmt: skip
        self.policy, self.device = policy.to(device), device
        signals = SignalSettings(novelty_window_tokens=window, prior_decay_tokens=20)
        chunk = ChunkSettings() if weights is None else ChunkSettings(weights=weights)
        self.settings = Settings(signals=signals, chunk=chunk)
        self.complexity: Tensor | None = None
        if pages:
            self.complexity = torch.full((PLACES, pages), UNTOUCHED, dtype=torch.float64, device=device)
            options["complexity"] = self.complexity
        self.random = torch.Generator().manual_seed(3)
        self.scales = torch.cat([0.5 + self.draw(3, len(RUNGS) - 1), torch.ones(3, 1, device=device)], 1)
        self.ladders = Ladders.of(4, IDS - 1, len(RUNGS), device)
        self.ladders.token[1], self.ladders.pair[1], self.ladders.scale[1] = 9, 9, float("nan")
        for slot, difficulty, scales in zip(SLOTS, DIFFICULTY, self.scales, strict=True):
            self.ladders.put(slot, difficulty, scales)
        self.rows = Rows(self.whole(-1, dtype=torch.int32), self.whole(0, dtype=torch.int32), self.whole(0.0))
        self.controller = Controller(policy, self.settings, self.rows, self.ladders, **options)
        state = self.controller.state
        for poisoned in (state.gathered, state.balance, state.budget, state.cost, state.knob):
            poisoned.fill_(float("nan"))
        self.running: list[Running] = []
        self.tokens, self.entropy = self.whole(GARBAGE), self.whole(float("nan"))
        self.surprisal, self.distant = self.whole(float("nan")), torch.full((PROBES, PLACES, HEADS), float("nan"))
        self.distant = self.distant.to(device)

    def whole(self, value: float, **kind) -> Tensor:
        return torch.full((PLACES,), value, device=self.device, **kind)

    def draw(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random).to(self.device)

    def draw_tokens(self, *shape: int) -> Tensor:
        return (self.draw(*shape) * IDS).long()

    def logits(self, *shape: int) -> Tensor:
        return 4 * self.draw(*shape, VOCABULARY) ** 2 * self.draw(*shape, 1)

    def admit(self, requests: Requests) -> None:
        """A stream that has seen its prompts, in blocks of 5, and the controller's rows that go on from it."""
        given = {f.name: torch.tensor(getattr(requests, f.name)) for f in fields(Requests)}
        ladders, counts = given["ladders"], given["prompts"]
        operating = Operating.at(
            given["knobs"], given["starts"], FULL_KV if self.complexity is None else KVSettings(), ladders,
            torch.tensor(requests.budgets, dtype=torch.float64),
        )  # fmt: skip
        stream = Stream(
            self.settings, self.policy, operating, Offer.of(COSTS[ladders], resident=given["resident"]), self.device,
            counts + requests.unread, difficulty=Difficulty.stack([DIFFICULTY[i] for i in requests.ladders]),
        )  # fmt: skip
        index = torch.tensor(requests.places, device=self.device)
        sums = torch.zeros(len(index), MOST_PAGES, dtype=torch.float64, device=self.device)
        running = Running(index, stream, sums)
        for start in range(0, max(requests.prompts), 5):
            real = (start + torch.arange(5) < counts[:, None]).to(self.device)
            stream.open_block(self.draw_tokens(len(counts), 5), real)
            if stream.static is None:
                running.add(stream.close_block(self.logits(len(counts), 5), self.draw(len(counts), 5)), real)
        slots = torch.tensor(SLOTS, device=self.device)[ladders.to(self.device)]
        # Of the pages that a prompt has filled; it is for the controller to begin the others.
        filled = sums[:, : -(-max(requests.prompts) // PAGE_TOKENS)]
        self.controller.load(index, stream, slots, None if self.complexity is None else filled)
        self.tokens[index] = self.draw_tokens(len(index))
        if stream.expected is not None:  # which of a row without a token says nothing
            first = surprisal(stream.expected, self.tokens[index])
            self.surprisal[index] = torch.where(stream.state.position > 0, first, float("nan"))
        self.running.append(running)

    def step(self, hears: bool = True) -> None:
        """One token of every row through streams and controller, which must agree; then what follows from it."""
        self.rows.rung.fill_(-7)
        self.rows.weight.fill_(float("nan"))
        self.controller.step(self.tokens, self.entropy, self.surprisal, self.distant if hears else None)
        for running in self.running:
            index, stream = running.index, running.stream
            real = torch.ones(len(index), 1, dtype=torch.bool, device=self.device)
            weights = stream.open_block(self.tokens[index, None], real)
            self.compare(running, weights[:, 0])
            logits = self.logits(len(index), 1)
            self.distant[:, index] = self.draw(PROBES, len(index), HEADS)
            running.add(stream.close_block(logits, self.distant[:, index].mean((0, 2))[:, None]), real)
            log_p = log_probabilities(logits[:, 0])
            self.entropy[index], self.tokens[index] = next_token_entropy(log_p), self.draw_tokens(len(index))
            self.surprisal[index] = surprisal(log_p, self.tokens[index])

    def compare(self, running: Running, weights: Tensor) -> None:
        index, stream = running.index, running.stream
        own, state, rung = self.controller.state, stream.state, stream.block.rung[:, 0]
        assert self.rows.rung[index].tolist() == rung.tolist()
        scales = self.scales[state.operating.adapter].gather(1, rung[:, None])[:, 0]
        torch.testing.assert_close(self.rows.weight[index], weights.sum(1) * scales, **CLOSE_SCALE)
        assert own.position[index].tolist() == state.position.tolist()
        assert own.balance[index].tolist() == state.bucket.balance.tolist()
        if self.policy.looks:
            self.check_apart(stream)
        elif self.complexity is None:
            return
        gathered = torch.stack([getattr(state.gathered, f.name) for f in fields(Gathered)], 1)
        torch.testing.assert_close(own.gathered[index], gathered, **CLOSE_SIGNAL)
        past = state.position[:, None] - stream.history.shape[1] + torch.arange(stream.history.shape[1]).to(index)
        assert torch.equal(own.history[index].gather(1, past % own.history.shape[1]).long(), stream.history)
        if self.complexity is not None:
            # Of a token that is about to be processed the model has put out nothing: up to the one before it.
            sums = running.sums[:, : self.complexity.shape[1]]
            torch.testing.assert_close(self.complexity[index], sums, **CLOSE_PAGE)

    def check_apart(self, stream: Stream) -> None:
        """That no decision hangs on a rounding: the best two rungs differ by more than those."""
        block = stream.block
        summary = Summary(block.held[:, 0], block.held_valid[:, 0], block.first[:, 0], block.positions[:, 0])
        best = self.policy.logits(summary.features(), stream.state.operating.knob)[0].topk(2).values
        assert ((best[:, 0] - best[:, 1]) > 2e-5 * best[:, 0].abs()).all()


def check_untouched(driver: Driver, places: list[int]) -> None:
    """That rows without a ladder have no rung and stand still."""
    state = driver.controller.state
    assert driver.rows.rung[places].tolist() == driver.rows.weight[places].tolist() == [0] * len(places)
    assert not state.position[places].any()
    assert not state.step[places].any()
    assert (state.history[places] == -1).all()
    assert state.gathered[places].isnan().all()
    assert state.balance[places].isnan().all()
    assert driver.complexity is None or (driver.complexity[places] == UNTOUCHED).all()
