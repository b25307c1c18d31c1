"""The lower rungs of a `mixed` ladder, trained to put out what the exact adapter does, through their own rounding.

One set of factors is shared by all rungs that are trained; every step reads it at each of them, as it will be stored,
and lets the gradient pass the rounding as if there were none (straight-through). The loss of a rung is its KL to the
exact adapter on completion tokens over the KL that it had before, so a rung that loses little counts as much as one
that loses much, and none is improved at another's expense. Where completions are a few tokens behind long prompts,
prompt tokens, on which the exact adapter changes the output as well, count beside them. On validation documents each
rung is then held against what it was: where training did not help, the rung stays as it was.

Only rungs up to an eighth of the adapter are trained. The factors that suit them do not have the adapter's product any
more, so everything above keeps its own bank, whose 8-bit reading is the adapter.
Source: DESIGN section 3; Bengio et al. 2013 for straight-through; Hinton et al. 2015 for the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from runtime.ladder import Bank, Directions, Ladder
from runtime.ladder.factors import DISTILLED
from runtime.ladder.formats import CODED, best_stretch, dequantise, packed, quantise
from runtime.loading import place

from ..documents import Batch, Example, make_batch
from ..learn.checkpoint_io import SafetensorsCheckpointIO, latest
from ..progress import BatchBar
from ..targets.damage import Exact, token_kl
from .build import Measured, exact_pairs, pairs_of
from .quality import Candidate, measure
from .updates import Pair, Update, frozen, low_rank, updated

MakeTrainer = Callable[..., L.Trainer]
TRAINED_SHARE = 1 / 8
"""Rungs up to this share of the adapter are trained."""
SCORED_SHARE = 1 / 4
"""Where fewer of a step's tokens are completion, prompt tokens beside them make up for it."""
STEPS_PER_EPOCH = 50
"""An epoch is what lies between two checkpoints."""
WARMUP = 0.05
LAST_RATE = 0.02


@dataclass(frozen=True)
class Schedule:
    """How much a distillation does."""

    steps: int
    tokens: int
    """Tokens of text in a step, each read at every rung that is trained."""
    learning_rate: float = 4e-3
    """Of the factors, in their rows' root mean squares; rises, then falls to `LAST_RATE` of it as a cosine."""
    seed: int = 0


class Stack(nn.Module):
    """The factors of one side of modules of one shape, and how every trained rung reads them."""

    read: Tensor
    start: Tensor
    unit: Tensor
    stretch: Tensor

    def __init__(self, rows: Tensor, read: Tensor) -> None:
        """rows [S, R, D] float32; read [S, J, F, R] one where a rung reads a direction at a format of `CODED`."""
        super().__init__()
        unit = rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        self.moved = nn.Parameter(torch.zeros_like(rows))
        """[S, R, D] how far the factors have moved, in their rows' root mean squares."""
        for name, value in (("start", rows), ("unit", unit), ("stretch", best_stretch(rows)), ("read", read)):
            self.register_buffer(name, value, persistent=False)

    def rows(self) -> Tensor:
        """[S, R, D] the factors now."""
        return self.start + self.unit * self.moved

    def readings(self) -> Tensor:
        """[S, J, R, D] what every rung reads; differentiable through the rounding."""
        rows = self.rows()
        codes, scales = quantise(rows.detach(), self.stretch)
        total: Tensor | None = None
        for f, bits in enumerate(CODED):
            # In this order what is added is zeros, and the reading is bit for bit what is stored.
            rounded = dequantise(codes, scales, bits) + (rows - rows.detach())
            part = self.read[:, :, f, :, None] * rounded[:, None]
            total = part if total is None else total + part
        assert total is not None
        return total


class Distillation(L.LightningModule):
    """Trains the factors of a bank. The model is no submodule: it is frozen, and Lightning may not move or save it."""

    start_prompt_kl: Tensor
    """[J] of the first step whose prompt tokens count; zeros before."""

    def __init__(
        self, model: PreTrainedModel, exact: Mapping[str, Pair], measured: Measured, edges: Tensor, kl: Sequence[float],
        scales: Sequence[float], documents: Sequence[Example], schedule: Schedule,
    ) -> None:  # fmt: skip
        """edges [J, M, F] of the rungs that are trained; kl and scales are those that they start from."""
        super().__init__()
        self._model, self._exact, self._documents, self.schedule = [model], exact, documents, schedule
        self._teacher: dict[str, Update] | None = None
        self.names = list(measured.pairs)
        self.rungs = len(edges)
        self.start_kl = torch.tensor(kl)
        self.register_buffer("start_prompt_kl", torch.zeros(len(edges)))
        self.log_scales = nn.Parameter(torch.tensor(scales).log())
        self.stacks = nn.ModuleList()
        stacks: list[Stack] = []
        self._places: list[list[tuple[str, int]]] = []
        shapes: dict[tuple[int, ...], list[tuple[str, int]]] = {}
        for name, pair in measured.pairs.items():
            for half in (0, 1):
                shapes.setdefault(tuple(pair[half].shape), []).append((name, half))
        for members in shapes.values():
            rows = torch.stack([measured.pairs[name][half] for name, half in members]).float()
            read = torch.stack([_reads(edges[:, self.names.index(name)], rows.shape[1]) for name, _ in members])
            stacks.append(Stack(rows, read))
            self._places.append(members)
        self.stacks.extend(stacks)
        self._stacks = stacks

    def readings(self) -> dict[str, Pair]:
        """By module what every rung reads: a [J, R, d_in], b [J, R, d_out], the rung's scale in b."""
        found: dict[str, list[Tensor | None]] = {name: [None, None] for name in self.names}
        scale = self.log_scales.exp()[:, None, None]
        for stack, members in zip(self._stacks, self._places, strict=True):
            for (name, half), own in zip(members, stack.readings(), strict=True):
                found[name][half] = own * scale if half else own
        return {name: (a, b) for name, (a, b) in found.items() if a is not None and b is not None}

    def divergences(self, batch: Batch, *places: Tensor) -> list[Tensor]:
        """[J] mean KL of every rung to the exact adapter over the tokens at each of `places`, [B, T] bool."""
        model = self._model[0]
        tokens, real, *masks = (x.to(model.device) for x in (batch.tokens, batch.real.long(), *places))
        if self._teacher is None:
            self._teacher = low_rank(self._exact, model)
        with torch.no_grad(), updated(model, self._teacher):
            logits = model(input_ids=tokens, attention_mask=real, use_cache=False).logits
            references = [Exact.of(logits[where]) for where in masks]
        updates = {name: _all_rungs(*pair, model.dtype) for name, pair in self.readings().items()}
        with updated(model, updates):
            logits = model(
                input_ids=tokens.repeat(self.rungs, 1), attention_mask=real.repeat(self.rungs, 1), use_cache=False
            ).logits
        per_rung = logits.view(self.rungs, *tokens.shape, -1)
        return [
            torch.stack([token_kl(reference, own[where].float().log_softmax(-1)).mean() for own in per_rung])
            for reference, where in zip(references, masks, strict=True)
        ]

    def on_train_batch_start(self, batch: Any, index: int) -> int | None:
        """-1 ends an epoch: the last one has no more steps than are left."""
        return -1 if self._step(index) >= self.schedule.steps else None

    def training_step(self, batch: Any, index: int) -> Tensor:
        step = self._step(index)
        self._set_rate(step)
        batch = make_batch(self.drawn(step))
        beside = prompt_beside(batch)
        count = int(beside.sum())
        kl, *prompt = self.divergences(batch, batch.scored, *([beside] if count else []))
        loss = (kl / self.start_kl.to(kl)).mean()
        self.log_dict(
            {"train/relative_kl": loss.detach(), **{f"train/kl_{j}": k for j, k in enumerate(kl.detach())}},
            sync_dist=True,
        )
        if not prompt:
            return loss
        if not bool(self.start_prompt_kl.any()):
            self.start_prompt_kl.copy_(prompt[0].detach())
        # As much as the completion, unless there are fewer of them: a few tokens are to be no more than a few.
        weight = min(1.0, count / int(batch.scored.sum()))
        return loss + weight * (prompt[0] / self.start_prompt_kl.clamp(min=1e-9)).mean()

    def _step(self, index: int) -> int:
        return self.current_epoch * STEPS_PER_EPOCH + index

    def drawn(self, step: int) -> list[Example]:
        """The documents of a step: drawn from (seed, step, process) alone, so that a resumed run draws the same."""
        seed = (self.schedule.seed * 100_003 + step) * 1_009 + self.global_rank
        order = torch.randint(
            len(self._documents), (self.schedule.tokens,), generator=torch.Generator().manual_seed(seed)
        )
        chosen: list[Example] = []
        longest = 0
        for i in order.tolist():
            longest = max(longest, len(self._documents[i]["input_ids"]))
            if chosen and longest * (len(chosen) + 1) > self.schedule.tokens:
                break
            chosen.append(self._documents[i])
        return chosen

    def _set_rate(self, step: int) -> None:
        done = step / self.schedule.steps
        rate = min(1.0, (step + 1) / max(1.0, WARMUP * self.schedule.steps))
        rate *= LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * self.schedule.learning_rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.schedule.learning_rate, betas=(0.9, 0.99))

    @torch.no_grad()
    def bank(self) -> Bank:
        """The factors as they are stored."""
        halves: dict[str, list[Any]] = {name: [None, None] for name in self.names}
        for stack, members in zip(self._stacks, self._places, strict=True):
            rows = stack.rows().cpu()
            for i, (name, half) in enumerate(members):
                halves[name][half] = packed(*quantise(rows[i], stack.stretch[i].cpu()))
        return {name: Directions(a, b) for name, (a, b) in halves.items()}


def prompt_beside(batch: Batch) -> Tensor:
    """[B, T] bool: prompt tokens, evenly spread, as many as completion tokens lack to `SCORED_SHARE` of all tokens."""
    scored = batch.scored
    where = (batch.prompt() & ~scored).flatten().nonzero()[:, 0]
    lacking = int(SCORED_SHARE * int(batch.real.sum())) - int(scored.sum())
    count = max(0, min(lacking, len(where)))
    chosen = torch.zeros(scored.numel(), dtype=torch.bool)
    chosen[where[torch.arange(count) * len(where) // max(1, count)]] = True
    return chosen.view_as(scored)


def _reads(edges: Tensor, rows: int) -> Tensor:
    """[J, F, R] one where a rung reads a direction at a format of `CODED`; edges [J, len(BITS)], finest first."""
    k = torch.arange(rows)
    eight, four, two = (edges[:, 1 + i, None] for i in range(3))
    return torch.stack([(k >= four) & (k < two), (k >= eight) & (k < four), k < eight], 1).float()


def _all_rungs(a: Tensor, b: Tensor, dtype: torch.dtype) -> Update:
    """The update of rows that are every rung's in turn: x [J * B, ..., d_in]."""
    a, b = a.to(dtype), b.to(dtype)

    def update(x: Tensor) -> Tensor:
        read = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))
        return torch.bmm(read, b).view(*x.shape[:-1], -1)

    return update


def distil(
    ladder: Ladder, measured: Measured, model: PreTrainedModel, train: Sequence[Example],
    validation: Sequence[Example], schedule: Schedule, make_trainer: MakeTrainer, folder: Path | None = None,
) -> Ladder:  # fmt: skip
    """The `mixed` ladder with its rungs up to `TRAINED_SHARE` trained on `train`, where that helps on `validation`.

    `measured` are the directions that the ladder was written from. Checkpoints go to `folder`, from which the same
    call resumes. Raises ValueError when no rung is low enough to be trained.
    """
    low = [j for j, r in enumerate(ladder.rungs) if 0 < r <= TRAINED_SHARE * ladder.rungs[-1]]
    if not low:
        most = TRAINED_SHARE * ladder.rungs[-1]
        raise ValueError(
            f"rungs: expected one up to {most:g}, an eighth of the adapter, to train, got {ladder.rungs}; name a lower "
            "one, or build a mixed ladder"
        )
    exact = exact_pairs(ladder)
    before = measure(model, exact, [_candidate(ladder, j) for j in low], validation, name="rungs before")
    module = Distillation(
        model, exact, measured, ladder.edges[low], [max(own.kl, 1e-9) for own in before],
        [ladder.scales[j] for j in low], train, schedule,
    )  # fmt: skip
    _train(module, model, schedule, make_trainer, folder)
    scales = module.log_scales.detach().exp().tolist()
    trained = _with_bank(ladder, module.bank(), dict(zip(low, scales, strict=True)))
    after = measure(model, exact, [_candidate(trained, j) for j in low], validation, name="rungs after")
    better = [j for j, old, new in zip(low, before, after, strict=True) if new.kl < old.kl]
    return _with_bank(ladder, module.bank(), {j: scales[low.index(j)] for j in better})


def _candidate(ladder: Ladder, rung: int) -> Candidate:
    return Candidate(str(ladder.rungs[rung]), pairs_of(ladder, rung))


def _train(
    module: Distillation, model: PreTrainedModel, schedule: Schedule, make_trainer: MakeTrainer, folder: Path | None
) -> None:
    epochs = math.ceil(schedule.steps / STEPS_PER_EPOCH)
    callbacks: list[L.Callback] = [BatchBar("distillation")]
    if folder is not None:
        keep = ModelCheckpoint(dirpath=folder, filename="last", save_top_k=1, enable_version_counter=False)
        keep.FILE_EXTENSION = ""
        callbacks.append(keep)
    trainer = make_trainer(
        max_epochs=epochs, callbacks=callbacks, log_every_n_steps=10,
        plugins=[SafetensorsCheckpointIO()], enable_checkpointing=folder is not None, use_distributed_sampler=False,
    )  # fmt: skip
    steps: DataLoader[int] = DataLoader(range(min(STEPS_PER_EPOCH, schedule.steps)), batch_size=None)  # type: ignore[arg-type]
    with frozen(model):
        place(model, trainer.strategy.root_device)
        trainer.fit(module, steps, ckpt_path=None if folder is None else latest(folder))
    module.cpu()


def _with_bank(ladder: Ladder, bank: Bank, scales: Mapping[int, float]) -> Ladder:
    """The ladder whose rungs of these indices read a bank of their own, at these scales; it comes first."""
    if not scales:
        return replace(ladder, kind=DISTILLED)
    highest = max(scales)
    counts = ladder.edges[[j for j in range(highest + 1) if j in scales]].amax(0)
    kept = {
        name: Directions(*(half.keep({16: 0, 8: n[1], 4: n[2], 2: n[3]}) for half in (own.a, own.b)))
        for (name, own), n in zip(bank.items(), counts.tolist(), strict=True)
    }
    return replace(
        ladder,
        kind=DISTILLED,
        banks=(kept, *ladder.banks),
        bank_of=tuple(0 if j in scales else own + 1 for j, own in enumerate(ladder.bank_of)),
        scales=tuple(scales.get(j, own) for j, own in enumerate(ladder.scales)),
    )
