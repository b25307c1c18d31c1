"""A LLaMA of 4.5 million parameters, trained from text files -> checkpoints/base/.

What: one GPU, one wall-clock budget (`--minutes`, compilation included), plain next-token loss on
packed documents.  Run tokenizer.py first: it writes the tokenizer into the same folder.

Why: the examples and tests need a base model that writes readable English, fits in a repository,
and can be made again by anybody in eight minutes.

Trade-offs:
- The learning rate follows elapsed time, not steps, so the budget is kept on any machine.  It warms
  up, then falls linearly to zero, which at a fixed budget beats a cosine that ends above zero
  (Bergsma et al. 2025, "Straight to Zero").
- Sequences are as long as the context (1,024), so that every position the model offers is trained.
- Documents are packed without masking across borders: </s> tells the model where one begins.
- The text is seen many times.  Every pass cuts it at another offset; the held-out loss that is
  printed shows whether repeating still helps.

    python checkpoints/recipe/pretrain.py TEXT/*.txt.xz --output checkpoints/base --minutes 8
    python checkpoints/recipe/pretrain.py TEXT/*.txt.xz --output /tmp/base \
        --tokenizer checkpoints/base --minutes 0.3 --device cpu --batch 4 --limit 200 --no-compile
"""

import argparse
import itertools
import json
import lzma
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HELD_OUT_DOCUMENTS = 200
EOS_ID = 2
WARMUP_STEPS = 300
SAVE_SECONDS = 5.0  # kept back from the budget for the last evaluation and for writing
EVAL_BATCH = 32


def model_config(vocab_size: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=3,
    )


def read_documents(paths: list[Path], limit: int | None) -> list[str]:
    """One document a line, newlines written as backslash-n; `limit` documents of each file."""
    documents: list[str] = []
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, limit):
                documents.append(line.rstrip("\n").replace("\\n", "\n"))
    return documents


def tokenize(documents: list[str], tokenizer: Tokenizer) -> Tensor:
    """[tokens] uint16, every document ended by </s>; encoding runs on all cores."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids += encoding.ids
        ids.append(EOS_ID)
    return torch.tensor(ids, dtype=torch.uint16)


def batches(stream: Tensor, batch: int, context: int, generator: torch.Generator) -> Iterator[Tensor]:
    """[batch, context + 1] int64 for ever; every pass has its own offset and order."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        rows = (len(stream) - offset - 1) // context
        starts = offset + context * torch.randperm(rows, generator=generator)
        window = torch.arange(context + 1, device=stream.device)
        for group in starts.to(stream.device).split(batch):
            if len(group) == batch:
                # uint16 has no gather kernel; int16 has, and ids stay below 32,768.
                yield stream.view(torch.int16)[group[:, None] + window].long()


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:]; tokens is [rows, context + 1]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean loss in nats over the held-out rows; uncompiled, so that the last, short batch costs
    no recompilation."""
    total = 0.0
    for group in rows.split(EVAL_BATCH):
        total += float(next_token_loss(model, group.long())) * len(group)
    return total / len(rows)


def rate_factor(step: int, progress: float) -> float:
    """Share of the peak learning rate: warm-up by steps, then linear to zero by elapsed share."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - progress)


def save_bf16(model: LlamaForCausalLM, output: Path) -> None:
    """Writes config and bf16 weights; the model in memory keeps fp32."""
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+", help=".txt.xz files, one document a line")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/base"))
    parser.add_argument("--tokenizer", type=Path, help="folder, default: --output")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--eval-every", type=int, default=1000, help="steps")
    parser.add_argument("--limit", type=int, help="documents of each file, for smoke runs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_tokens(args: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Training stream [tokens] uint16, held-out rows [rows, context + 1], vocabulary size."""
    path = (args.tokenizer or args.output) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a tokenizer at {path}, found none; run tokenizer.py first")
    tokenizer = Tokenizer.from_file(str(path))
    documents = read_documents(args.texts, args.limit)
    held_out = min(HELD_OUT_DOCUMENTS, len(documents) // 10)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    shuffled = [documents[i] for i in order]
    validation = tokenize(shuffled[:held_out], tokenizer)
    train = tokenize(shuffled[held_out:], tokenizer)
    rows = (len(validation) - 1) // args.context
    if rows < 1 or len(train) <= (args.batch + 2) * args.context:
        raise ValueError(
            f"expected text for at least {args.batch + 2} training and 1 held-out sequences of "
            f"{args.context} tokens, got {len(train):,} and {len(validation):,} tokens; give more "
            "text or a smaller --batch"
        )
    starts = args.context * torch.arange(rows)[:, None] + torch.arange(args.context + 1)
    return train, validation.view(torch.int16)[starts], tokenizer.get_vocab_size()


def main() -> None:
    start = time.perf_counter()
    args = parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.output.mkdir(parents=True, exist_ok=True)

    train, validation, vocab_size = load_tokens(args)
    stream, validation = train.to(args.device), validation.to(args.device)
    model = LlamaForCausalLM(model_config(vocab_size, args.context)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    setup_s = time.perf_counter() - start
    print(
        f"{parameters:,} parameters, {len(train):,} training tokens, {validation.numel():,} held "
        f"out, {args.batch * args.context:,} tokens a step, ready after {setup_s:.0f} s"
    )

    on_gpu = args.device.startswith("cuda")
    matrices: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
    norms: list[Tensor] = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=on_gpu,
    )
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else nullcontext()
    data = batches(stream, args.batch, args.context, torch.Generator().manual_seed(args.seed))

    first_step = time.perf_counter()
    span = max(1.0, 60 * args.minutes - SAVE_SECONDS - (first_step - start))
    saved_half = False
    for step in itertools.count():
        progress = (time.perf_counter() - first_step) / span
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_factor(step, progress)
        with autocast:
            loss = loss_of(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            # Waits for the device, so that elapsed time is that of finished steps.
            train_loss = loss.item()
            if not math.isfinite(train_loss):
                raise ValueError(
                    f"training loss is {train_loss} at step {step}; lower --learning-rate (now {args.learning_rate})"
                )
        if step % args.log_every == 0:
            seen = (step + 1) * args.batch * args.context
            print(
                f"step {step} | {100 * progress:.1f} % | loss {train_loss:.3f} | "
                f"{seen / len(train):.2f} epochs | "
                f"{seen / (time.perf_counter() - first_step):,.0f} tokens/s"
            )
        if step % args.eval_every == 0 and step:
            with autocast:
                print(f"step {step} | held-out loss {held_out_loss(model, validation):.4f}")
        if progress > 0.5 and not saved_half:
            save_bf16(model, args.output)
            saved_half = True

    save_bf16(model, args.output)
    saved = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(args.device)
    with autocast:
        final = held_out_loss(saved, validation)
    summary = {
        "parameters": parameters,
        "steps": step,
        "epochs": round(step * args.batch * args.context / len(train), 2),
        "train_loss_nats": round(train_loss, 4),
        "held_out_loss_nats": round(final, 4),
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "torch": torch.__version__,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
