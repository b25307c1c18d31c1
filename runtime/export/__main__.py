"""`python -m runtime.export`: write a rung, or what a fixed policy serves, as a PEFT adapter or packed."""

from __future__ import annotations

import argparse

from policy.rungs import RUNG, Rung
from runtime.command import one_line_errors
from runtime.export import export_packed, export_rung, folder_bytes, served_rung
from runtime.ladder import Ladder, open_ladder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.export", description="Write a rung as a PEFT adapter, or in the bits it has."
    )
    parser.add_argument("--adapter", required=True, help="PEFT LoRA folder, hub id or saved ladder")
    parser.add_argument("--rung", type=float, help="equivalent rank to write (instead of a policy)")
    parser.add_argument("--policy", help="folder of a fixed policy: its rung and scale are written")
    parser.add_argument("--budget", type=float, help="with --policy: mean adapter cost, 0 to 1 (default: the policy's)")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--scale", type=float, help="multiplies the update (default: 1, or the policy's)")
    parser.add_argument("--uniform", action="store_true", help="one rank for all modules, padded with zeros")
    parser.add_argument(
        "--packed", action="store_true", help="a ladder folder in its own bits: of one rung, or, without one, whole"
    )
    with one_line_errors():
        write(parser.parse_args())


def write(args: argparse.Namespace) -> None:
    """Write what the arguments ask for and say what it is and how large."""
    _check(args)
    ladder, rung, scale = _asked(args)
    if args.packed:
        path = export_packed(ladder, args.output, rung=rung, scale=scale)
    else:
        assert rung is not None, "arguments were checked"
        path = export_rung(ladder, rung, args.output, base_model=ladder.base_model, scale=scale, uniform=args.uniform)
    what = "ladder" if rung is None else f"rung {rung}"
    at = f" at scale {scale:.4g}" if scale != 1 else ""
    print(f"{what} written to {path}{at}")
    print(f"{folder_bytes(path):,} bytes; the exact adapter takes {int(ladder.rung_bytes()[-1]):,}")


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that contradict each other."""
    if args.rung is not None and args.policy is not None:
        raise ValueError("rung: expected --rung or --policy, got both; give one of them")
    if args.rung is None and args.policy is None and not args.packed:
        raise ValueError("rung: expected --rung or --policy, got neither; give one of them, or --packed for all rungs")
    if args.policy is None and args.budget is not None:
        raise ValueError(f"budget: expected --policy with it, got {args.budget} alone; add it, or leave this out")
    if args.policy is not None and args.scale is not None:
        raise ValueError(f"scale: expected the policy's own, got --scale {args.scale}; leave it out")
    if args.packed and args.uniform:
        raise ValueError("uniform: expected a PEFT adapter to pad, got --packed; leave one of them out")


def _asked(args: argparse.Namespace) -> tuple[Ladder, Rung | None, float]:
    """The ladder, the rung to write (None: all of them) and its scale."""
    if args.policy is not None:
        return served_rung(args.policy, args.adapter, args.budget)
    rung = None if args.rung is None else RUNG.take("--rung", args.rung)
    ladder = open_ladder(args.adapter)
    if rung is not None and rung not in ladder.rungs:
        ladder = ladder.with_rungs([rung])
    return ladder, rung, 1.0 if args.scale is None else args.scale


if __name__ == "__main__":
    main()
