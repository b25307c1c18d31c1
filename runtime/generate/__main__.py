"""`python -m runtime.generate`: stream a completion, then say what it cost."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import TextStreamer

from policy.limits import Limit, Maybe, Number, Whole
from policy.rungs import RUNG
from policy.settings import MOST_TOKENS
from runtime.command import one_line_errors
from runtime.generate import generate
from runtime.loading import DTYPES, load_tokenizer, quiet_libraries

# Sampling divides float32 logits by the temperature: below a millionth they would overflow, and no draw be possible.
LIMITS: Mapping[str, Limit] = {
    "max-new-tokens": Whole(1, MOST_TOKENS),
    "rung": Maybe(RUNG),
    "resident-rung": Maybe(RUNG),
    "temperature": Maybe(Number(1e-6, 1e6)),
    "top-k": Maybe(Whole(0, 2**31 - 1)),
    "top-p": Maybe(Number(0, 1)),
    "min-p": Maybe(Number(0, 1)),
    "repetition-penalty": Maybe(Number(1e-3, 1e3)),
    "seed": Whole(0, 2**32 - 1),
}


class TimedStreamer(TextStreamer):
    """Prints text as it comes and remembers when every token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def ms_per_token(self) -> float | None:
        """Mean milliseconds between new tokens, the prefill left out; None for fewer than two."""
        new = self.times[1:]  # the first call brings the prompt
        return 1000 * (new[-1] - new[0]) / (len(new) - 1) if len(new) > 1 else None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m runtime.generate",
        description="Complete a prompt with a LoRA adapter at the ranks a policy chooses.",
    )
    p.add_argument("--model", required=True, help="folder or hub id of the base model")
    p.add_argument("--adapter", required=True, help="PEFT LoRA folder, hub id or saved ladder")
    p.add_argument("--policy", help="policy folder; without one every token gets the full adapter")
    p.add_argument("--prompt", required=True)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--budget", type=float, help="mean adapter cost relative to the top rung, 0 to 1 (1: full adapter)")
    p.add_argument("--latency-budget-ms", type=float, help="milliseconds per token, where the policy has a table")
    p.add_argument("--rung", type=float, help="serve one fixed rung (instead of a policy)")
    p.add_argument("--resident-rung", type=float, help="keep no more of the adapter in memory than this rung reads")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="auto")
    p.add_argument("--do-sample", action="store_true", help="sample instead of greedy decoding")
    p.add_argument("--temperature", type=float, help="with --do-sample")
    p.add_argument("--top-k", type=int, help="with --do-sample: how many tokens may be drawn; 0: all")
    p.add_argument("--top-p", type=float, help="with --do-sample: the mass of the tokens that may be drawn")
    p.add_argument("--min-p", type=float, help="with --do-sample: the least share of the most probable token's mass")
    p.add_argument("--repetition-penalty", type=float)
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument(
        "--fast", action=argparse.BooleanOptionalAction,
        help="insist on the engine, or never use it (default: on a GPU, where it covers what is asked for)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="end with one line of JSON, of which --fast leaves out chunks")
    return p


def _say(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line: where in the code it was given is not for the user to read."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def main() -> None:
    args = parser().parse_args()
    quiet_libraries()
    with one_line_errors(), warnings.catch_warnings():
        warnings.showwarning = _say
        for name, limit in LIMITS.items():
            limit.take(name, getattr(args, name.replace("-", "_")))
        drawn = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        for name, value in drawn.items():
            if value is not None and not args.do_sample:
                flag = name.replace("_", "-")
                raise ValueError(f"{flag}: expected --do-sample with it, got {value} alone; add it")
        transformers.set_seed(args.seed)
        tokenizer = load_tokenizer(args.model)
        streamer = TimedStreamer(tokenizer)
        optional = drawn | {"repetition_penalty": args.repetition_penalty}
        out = generate(
            args.model, args.adapter, args.prompt, policy=args.policy, budget=args.budget,
            latency_budget_ms=args.latency_budget_ms, rung=args.rung, resident_rung=args.resident_rung,
            tokenizer=tokenizer, dtype=args.dtype, return_trace=args.json and not args.fast, fast=args.fast,
            streamer=streamer, max_new_tokens=args.max_new_tokens, do_sample=args.do_sample,
            **{name: value for name, value in optional.items() if value is not None},
        )  # fmt: skip
        print(f"path: {out.path}", file=sys.stderr)
        if args.json:
            sys.stdout.flush()
            print(
                json.dumps(
                    {
                        "text": out.texts[0],
                        "path": out.path,
                        "tokens": out.tokens[0],
                        "ms_per_token": streamer.ms_per_token(),
                        "mean_rank": _number(out.mean_rank),
                        "adapter_bytes": _number(out.adapter_bytes),
                        "adapter_share": _number(out.adapter_share),
                        "kv_bytes": out.kv_bytes,
                        "kv_bytes_full": out.kv_bytes_full,
                        "kv_bytes_allocated": out.kv_bytes_allocated,
                        "chunks": None if out.trace is None else [chunk.to_dict() for chunk in out.trace[0]],
                    }
                )
            )


if __name__ == "__main__":
    main()
