"""`python -m runtime.export`: write a rung as a PEFT adapter."""

from __future__ import annotations

import argparse

from runtime.adapter import load_adapter
from runtime.command import one_line_errors
from runtime.export import export_rung
from runtime.ladder import build_ladder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runtime.export", description="Write a rung as a PEFT adapter.")
    parser.add_argument("--adapter", required=True, help="PEFT LoRA folder or hub id")
    parser.add_argument("--rung", required=True, type=int, help="rank to write")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the update")
    parser.add_argument("--uniform", action="store_true", help="one rank for all modules, padded with zeros")
    args = parser.parse_args()
    with one_line_errors():
        adapter = load_adapter(args.adapter)
        ladder = build_ladder(adapter, sorted({args.rung, adapter.rank}))
        path = export_rung(
            ladder, args.rung, args.output, base_model=adapter.base_model, scale=args.scale, uniform=args.uniform
        )
        print(f"rung {args.rung} written to {path}")


if __name__ == "__main__":
    main()
