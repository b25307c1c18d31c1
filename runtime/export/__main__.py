"""`python -m runtime.export`: write a rung, or what a fixed policy serves, as a PEFT adapter."""

from __future__ import annotations

import argparse

from runtime.command import one_line_errors
from runtime.export import export_rung, served_rung
from runtime.ladder import open_ladder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runtime.export", description="Write a rung as a PEFT adapter.")
    parser.add_argument("--adapter", required=True, help="PEFT LoRA folder, hub id or saved ladder")
    parser.add_argument("--rung", type=int, help="rank to write (instead of a policy)")
    parser.add_argument("--policy", help="folder of a fixed policy: its rung and scale are written")
    parser.add_argument("--budget", type=float, help="with --policy: mean adapter cost, 0 to 1 (default: the policy's)")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--scale", type=float, help="multiplies the update (default: 1, or the policy's)")
    parser.add_argument("--uniform", action="store_true", help="one rank for all modules, padded with zeros")
    args = parser.parse_args()
    with one_line_errors():
        if (args.rung is None) == (args.policy is None):
            got = "neither" if args.rung is None else "both"
            raise ValueError(f"rung: expected --rung or --policy, got {got}; give one of them")
        if args.policy is None:
            if args.budget is not None:
                raise ValueError(
                    f"budget: expected --policy with it, got {args.budget} alone; add it, or leave this out"
                )
            ladder = open_ladder(args.adapter)
            rung, scale = args.rung, 1.0 if args.scale is None else args.scale
            if rung not in ladder.rungs:
                ladder = ladder.with_rungs([rung])
        else:
            if args.scale is not None:
                raise ValueError(f"scale: expected the policy's own, got --scale {args.scale}; leave it out")
            ladder, rung, scale = served_rung(args.policy, args.adapter, args.budget)
        path = export_rung(ladder, rung, args.output, base_model=ladder.base_model, scale=scale, uniform=args.uniform)
        print(f"rung {rung} written to {path}" + (f" at scale {scale:.4g}" if scale != 1 else ""))


if __name__ == "__main__":
    main()
