"""What a long generation holds beside its KV cache: host and device memory must stay flat.

A tiny random LLaMA generates `--tokens` tokens under a percentile policy with the default KV pages. At even steps the
process's resident memory and, on a GPU, the allocated device memory are read, the KV cache's own bytes beside them.
The floor is what cannot but grow: ids, mask and positions of transformers' loop, up to 24 bytes a token.

    python -m benchmarks.memory --tokens 100000
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from policy import ChunkSettings, Operating, PercentilePolicy, Settings
from policy.limits import Whole
from policy.settings import MOST_TOKENS
from runtime import AdaptiveRun, build_ladder, load_adapter
from runtime.command import one_line_errors
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate

from .printing import default_device, device_slug, finish, header, parse, result_path
from .shapes import write_adapter

PROMPT_TOKENS = 32
SAMPLES = 10
PAGE_BYTES = 4096
"""Of `/proc/self/statm`, on Linux."""


def resident_bytes() -> int:
    """What the process holds of the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Watch(StoppingCriteria):
    """Notes at every `every` tokens what is held; never stops anything."""

    def __init__(self, run: AdaptiveRun, every: int) -> None:
        self.run, self.every = run, every
        self.rows: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if input_ids.shape[1] % self.every == 0:
            gc.collect()
            cache = self.run.last
            assert cache is not None, "generate made one"
            device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            self.rows.append(
                {
                    "tokens": input_ids.shape[1],
                    "resident_mb": resident_bytes() / 1e6,
                    "device_mb": device / 1e6,
                    "kv_mb": cache.kv_bytes_allocated() / 1e6,
                    "seconds": time.perf_counter() - self.started,
                }
            )
            print("  ".join(f"{name} {value:,.1f}" for name, value in self.rows[-1].items()), flush=True)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    # At least two samples lie beyond the prompt.
    return parse(parser, {"tokens": Whole(2 * PROMPT_TOKENS, MOST_TOKENS)})


def main() -> None:
    with one_line_errors():
        measure(arguments())


def measure(args: argparse.Namespace) -> None:
    device = default_device()
    path = result_path(args.output, f"memory-{device_slug(device)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2 * args.tokens, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(model, 8, Path(folder))
        ladder = build_ladder(load_adapter(folder), (2, 4, 8))
    policy = PercentilePolicy(ladder.rungs, "entropy", spread=2.0)
    settings = Settings(prompt_tokens=PROMPT_TOKENS, chunk=ChunkSettings(1, 16))
    plan = RunPlan((ladder,), policy, settings, Operating.at(1.0, 1, settings.kv))
    with activate(model, plan) as run:
        watch = Watch(run, args.tokens // SAMPLES)
        ids = torch.randint(3, 64, (1, PROMPT_TOKENS), device=device)
        options = {"do_sample": True, "pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, max_new_tokens=args.tokens - PROMPT_TOKENS, stopping_criteria=[watch], **options)
    first, last = watch.rows[0], watch.rows[-1]
    kind = "device_mb" if torch.cuda.is_available() else "resident_mb"
    beside = {row["tokens"]: row[kind] - row["kv_mb"] for row in watch.rows}
    growth = (beside[last["tokens"]] - beside[first["tokens"]]) * 1e6 / (last["tokens"] - first["tokens"])
    print(f"beside the KV cache: {growth:.1f} bytes a token ({kind.removesuffix('_mb')})")
    record = header("memory", device) | {"rows": watch.rows, "bytes_a_token_beside_kv": growth}
    finish(record, path)


if __name__ == "__main__":
    main()
