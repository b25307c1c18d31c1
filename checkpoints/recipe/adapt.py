"""A LoRA adapter for the base model, on Python's documentation -> checkpoints/adapter/.

What: PEFT LoRA, rank 32 on all seven linears; a sequence is prompt + completion + </s>, and only
the completion (with its </s>) is learned.

Why: this is the adapter that the examples run at other ranks, so it is made as users make theirs:
by PEFT, in PEFT's own format, nothing special about it.

Trade-off: the text is small (a third of a million tokens), so the adapter overfits within a few
epochs.  The validation loss is taken after every epoch, the best adapter is kept, and training
stops when it has not improved for PATIENCE epochs.

    python checkpoints/recipe/adapt.py --base checkpoints/base --output checkpoints/adapter
    python checkpoints/recipe/adapt.py --base /tmp/base --output /tmp/adapter \
        --device cpu --minutes 0.3 --limit 64 --epochs 2                      # smoke run
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATIENCE = 3
WARMUP_STEPS = 50
BASE_NAME = "checkpoints/base"  # recorded in adapter_config.json
SAMPLE_PROMPTS = ["str.split(sep=None, maxsplit=-1)\n", "List comprehensions\n"]
SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Example:
    """Token ids of one document and how many of them are prompt."""

    ids: list[int]
    prompt_tokens: int


def read_rows(path: Path, limit: int | None) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"expected documents at {path}, found none; run extract.py first")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Prompt and completion are tokenised apart, as at inference; cut at max_tokens."""
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        examples.append(Example([*prompt, *completion][:max_tokens], len(prompt)))
    return [example for example in examples if len(example.ids) > example.prompt_tokens]


def collate(examples: list[Example], pad_id: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask, labels (-100 outside completions): [rows, tokens] each."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        mask[row, :end] = 1
        labels[row, example.prompt_tokens : end] = ids[row, example.prompt_tokens : end]
    return ids.to(device), mask.to(device), labels.to(device)


def batches(examples: list[Example], batch: int, generator: torch.Generator | None) -> Iterator[list[Example]]:
    """Batches of documents of similar length; their order is random when a generator is given."""
    if generator is None:
        order = list(range(len(examples)))
    else:
        order = torch.randperm(len(examples), generator=generator).tolist()
    # Sorted within runs of 8 batches: little padding, still random.
    runs = [order[i : i + 8 * batch] for i in range(0, len(order), 8 * batch)]
    groups: list[list[int]] = []
    for run in runs:
        run.sort(key=lambda index: len(examples[index].ids))
        groups += [run[i : i + batch] for i in range(0, len(run), batch)]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        yield [examples[index] for index in group]


def completion_loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Summed negative log-likelihood, in nats, of the completion tokens."""
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@dataclass(frozen=True)
class Trainer:
    """What every step and every evaluation of one run shares."""

    pad_id: int
    device: str
    batch: int

    def autocast(self) -> torch.autocast | nullcontext:
        on_gpu = self.device.startswith("cuda")
        return torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else nullcontext()

    def batch_loss(self, model: torch.nn.Module, group: list[Example]) -> tuple[Tensor, int]:
        """Summed loss of a batch and the number of tokens it is over."""
        with self.autocast():
            loss = completion_loss(model, collate(group, self.pad_id, self.device))
        return loss, sum(len(example.ids) - example.prompt_tokens for example in group)

    @torch.no_grad()
    def mean_loss(self, model: torch.nn.Module, examples: list[Example]) -> float:
        """Nats per completion token."""
        model.eval()
        parts = [self.batch_loss(model, group) for group in batches(examples, self.batch, None)]
        model.train()
        return sum(float(loss) for loss, _ in parts) / sum(tokens for _, tokens in parts)


def train(
    model: PeftModel,
    trainer: Trainer,
    train_set: list[Example],
    validation: list[Example],
    args: argparse.Namespace,
) -> tuple[float, int]:
    """Trains, leaving the best adapter by validation loss in the model; returns loss and epoch."""
    start = time.perf_counter()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=args.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed)
    total_steps = args.epochs * math.ceil(len(train_set) / args.batch)
    best_loss, best_epoch, step = math.inf, 0, 0
    best = {name: p.detach().clone() for name, p in weights.items()}
    for epoch in range(1, args.epochs + 1):
        summed, counted = 0.0, 0
        for group in batches(train_set, args.batch, generator):
            elapsed = (time.perf_counter() - start) / (60 * args.minutes)
            # The rate falls to zero with the epochs, or with the time limit if that comes first.
            left = max(0.0, 1 - max(step / total_steps, elapsed))
            for settings in optimizer.param_groups:
                settings["lr"] = args.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * left
            if left == 0:
                break
            loss, tokens = trainer.batch_loss(model, group)
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            summed, counted, step = summed + loss.item(), counted + tokens, step + 1
        validation_loss = trainer.mean_loss(model, validation)
        print(
            f"epoch {epoch} | train {summed / max(1, counted):.4f} | "
            f"validation {validation_loss:.4f} | {time.perf_counter() - start:.0f} s"
        )
        if validation_loss < best_loss:
            best_loss, best_epoch = validation_loss, epoch
            best = {name: p.detach().clone() for name, p in weights.items()}
        elif epoch - best_epoch >= PATIENCE:
            break
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"time limit of {args.minutes} minutes reached in epoch {epoch}")
            break
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(best[name])
    return best_loss, best_epoch


def print_samples(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], device: str) -> None:
    """Greedy and sampled completions, for reading; all prompts in one left-padded batch."""
    model.eval()
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(device)
    sampled = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}
    for name, settings in (("greedy", {"do_sample": False}), ("t=0.7", sampled)):
        ids = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, **settings)
        completions = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"--- {prompt.rstrip()} [{name}]\n{text}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("checkpoints/base"))
    parser.add_argument("--text", type=Path, default=Path("checkpoints/text"))
    parser.add_argument("--output", type=Path, default=Path("checkpoints/adapter"))
    parser.add_argument("--minutes", type=float, default=3.0, help="limit on training time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--batch", type=int, default=32, help="documents a step")
    parser.add_argument("--epochs", type=int, default=12, help="at most")
    parser.add_argument("--max-tokens", type=int, default=512, help="longer documents are cut")
    parser.add_argument("--limit", type=int, help="documents of each split, for smoke runs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    train_rows = read_rows(args.text / "train.jsonl.xz", args.limit)
    validation_rows = read_rows(args.text / "validation.jsonl.xz", args.limit)
    train_set = encode(train_rows, tokenizer, args.max_tokens)
    validation = encode(validation_rows, tokenizer, args.max_tokens)
    trainer = Trainer(tokenizer.pad_token_id, args.device, args.batch)
    base_loss = trainer.mean_loss(base, validation)
    print(
        f"{len(train_set)} training documents, {sum(len(e.ids) for e in train_set):,} tokens; "
        f"{len(validation)} validation documents; base model {base_loss:.4f} nats a token"
    )

    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    best_loss, best_epoch = train(model, trainer, train_set, validation, args)

    # What is measured and sampled below is what is saved: the adapter rounded to bf16.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(args.output)
    # PEFT's template of a model card holds nothing; checkpoints/README.md says what there is.
    (args.output / "README.md").unlink(missing_ok=True)

    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    adapted = PeftModel.from_pretrained(base, args.output).to(args.device)
    saved_loss = trainer.mean_loss(adapted, validation)
    prompts = [row["prompt"] for row in validation_rows[:: max(1, len(validation_rows) // 6)]]
    print_samples(adapted, tokenizer, [*prompts[:6], *SAMPLE_PROMPTS], args.device)
    print(f"validation perplexity {math.exp(base_loss):.2f} -> {math.exp(saved_loss):.2f}")
    summary = {
        "trainable_parameters": trainable,
        "best_epoch": best_epoch,
        "best_loss_nats": round(best_loss, 4),
        "base_loss_nats": round(base_loss, 4),
        "saved_loss_nats": round(saved_loss, 4),
        "learning_rate": args.learning_rate,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
