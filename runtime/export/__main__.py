"""`python -m runtime.export`: write a rung as a PEFT adapter."""

from __future__ import annotations

import argparse

from runtime.command import one_line_errors
from runtime.export import export_rung
from runtime.ladder import open_ladder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runtime.export", description="Write a rung as a PEFT adapter.")
    parser.add_argument("--adapter", required=True, help="PEFT LoRA folder, hub id or saved ladder")
    parser.add_argument("--rung", required=True, type=int, help="rank to write")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the update")
    parser.add_argument("--uniform", action="store_true", help="one rank for all modules, padded with zeros")
    args = parser.parse_args()
    with one_line_errors():
        ladder = open_ladder(args.adapter)
        if args.rung not in ladder.rungs:
            ladder = ladder.with_rungs([args.rung])
        path = export_rung(
            ladder, args.rung, args.output, base_model=ladder.base_model, scale=args.scale, uniform=args.uniform
        )
        print(f"rung {args.rung} written to {path}")


if __name__ == "__main__":
    main()
