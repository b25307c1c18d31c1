"""What building a ladder costs: factoring an adapter, and writing its directions in few bits.

Factoring one module: two thin QRs and an r x r SVD against the dense SVD of the product. The limit is arithmetic. A
dense d x d SVD with vectors takes about 22 d^3 operations, two thin QRs with their Q formed 16 d r^2 (plus two thin
products, 4 d r^2, and lower-order terms): for d = 4096 and r = 64 the ratio is about 4,500, so the thin way has room to
be much more than the required 20 times faster even where it runs far below peak.

Writing all modules of a model: every direction in nested planes of 2, 4 and 8 bits, beside factoring the same modules.
The limit is memory: float32 in, a byte a value out. The unit of a row is tried at ten stretches, read back at three
formats each, so it is many passes over a row that stays in cache, and far from that limit; it is done once an adapter.

    python -m benchmarks.ladder
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from policy.limits import Whole
from runtime.command import one_line_errors
from runtime.ladder import svd_factors
from runtime.ladder.adapter import LoraFactors
from runtime.ladder.formats import CODED, ERRORS, STRETCHES, Rows, encode

from .printing import (
    copy_bandwidth,
    default_device,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    result_path,
    seconds,
    spread,
)
from .shapes import SHAPES

REQUIRED_SPEEDUP = 20.0
LARGEST_DIFFERENCE = 1e-4
LARGEST_ERRORS = {bits: 1.15 * error for bits, error in ERRORS.items()}
"""Squared error over energy of what is read: that of a normal row, as those of random factors nearly are."""
DENSE_SECONDS = 20.0
"""The dense SVD is repeated until it has taken this long: one run is enough where one run takes longer."""


def random_factors(d_in: int, d_out: int, rank: int, device: torch.device) -> LoraFactors:
    """A and B whose product has singular values falling about 50-fold, as those of trained adapters do."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(rank, d_in, generator=generator, device=device) / d_in**0.5
    b = torch.randn(d_out, rank, generator=generator, device=device) / d_out**0.5
    return LoraFactors(a, b * torch.logspace(0, -1.7, rank, device=device), 2.0)


def largest_difference(values: Tensor, reference: Tensor) -> float:
    """Largest relative difference of singular values [r] from the first r of `reference`."""
    expected = reference[: len(values)].double()
    return float(((values.double() - expected).abs() / expected).max())


def module_counts(shape: dict[str, int]) -> dict[tuple[int, int], int]:
    """How many of the seven linears of every layer have which d_in and d_out."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = [(hidden, hidden)] * 2 + [(hidden, heads)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return {own: shape["num_hidden_layers"] * layer.count(own) for own in layer}


def read_errors(rows: Tensor, coded: Rows) -> dict[int, float]:
    """Squared error over energy, at every format, of rows [R, D] that are coded."""
    energy = rows.square().sum()
    found = {bits: coded.read(0, len(rows), bits, torch.float32) for bits in CODED}
    return {bits: float((own - rows).square().sum() / energy) for bits, own in found.items()}


def factoring(d: int, rank: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of both ways for one module, their ratio, and how far their singular values lie apart."""
    factors = random_factors(d, d, rank, device)
    values = svd_factors(factors)[2]
    thin = [seconds(lambda: svd_factors(factors), device) for _ in range(repeats)]
    product = factors.scale * factors.b @ factors.a
    reference: list[Tensor] = []

    def dense_svd() -> None:
        reference[:] = [torch.linalg.svd(product, full_matrices=False).S]

    dense = [seconds(dense_svd, device)]
    while sum(dense) + dense[-1] < DENSE_SECONDS and len(dense) < repeats:
        dense.append(seconds(dense_svd, device))
    return {
        "thin_seconds": spread(thin), "dense_seconds": spread(dense),
        "speedup": spread(dense)["median"] / spread(thin)["median"],
        "largest_relative_difference": largest_difference(values, reference[0]),
    }  # fmt: skip


def writing(shape: str, rank: int, device: torch.device) -> dict[str, Any]:
    """Seconds of factoring and of encoding all modules of a model, one after the other, and what is stored then.

    Modules of one shape get the same factors: what a value is changes neither time nor bytes.
    """
    counts = module_counts(SHAPES[shape])
    factored, encoded, values, nbytes = [], [], 0, 0
    errors = dict.fromkeys(CODED, 0.0)
    for (d_in, d_out), count in counts.items():
        factors = random_factors(d_in, d_out, min(rank, d_in, d_out), device)
        halves = svd_factors(factors)[:2]
        coded = [encode(half) for half in halves]  # warm, and what is held against the rows
        for half, rows in zip(halves, coded, strict=True):
            errors = {bits: max(errors[bits], own) for bits, own in read_errors(half, rows).items()}
        factored += [seconds(lambda f=factors: svd_factors(f), device) for _ in range(count)]  # type: ignore[misc]
        encoded += [seconds(lambda h=halves: [encode(x) for x in h], device) for _ in range(count)]  # type: ignore[misc]
        values += count * sum(half.numel() for half in halves)
        nbytes += count * sum(rows.nbytes for rows in coded)
    return {
        "shape": shape, "modules": sum(counts.values()), "values": values, "stored_bytes": nbytes,
        "adapter_bytes": 2 * values, "factoring_seconds": sum(factored), "encoding_seconds": sum(encoded),
        "factoring_seconds_per_module": spread(factored), "encoding_seconds_per_module": spread(encoded),
        "stretches": len(STRETCHES), "relative_errors": {str(bits): error for bits, error in errors.items()},
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description="What building a ladder costs.")
    parser.add_argument("--size", type=int, default=4096, help="d_in and d_out of the module that is factored")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20, help="runs of the thin factorisation")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b", help="the model whose modules are all written")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/ladder-DEVICE.json)")
    args = parse(parser, {"size": Whole(1, 2**16), "rank": Whole(1, 2**16), "repeats": Whole(1, 10**6)})
    Whole(1, args.size).take("--rank", args.rank)
    return args


def main() -> None:
    with one_line_errors():
        measure(arguments())


def measure(args: argparse.Namespace) -> None:
    device = default_device()
    path = result_path(args.output, f"ladder-{device_slug(device)}")
    d, r = args.size, args.rank
    operations = {"dense": 22 * d**3, "thin": 16 * d * r * r + 4 * d * r * r}
    print(f"module {d} x {d}, rank {r}, float32, {header('ladder', device)['device']}")
    print(f"limit: {operations['dense']:.2e} against {operations['thin']:.2e} operations, a ratio of", end=" ")
    print(f"{operations['dense'] / operations['thin']:,.0f}")
    found = factoring(d, r, args.repeats, device)
    rows = [
        [name, f"{1e3 * s['median']:.2f}", f"{1e3 * s['min']:.2f} - {1e3 * s['max']:.2f}", str(s["runs"])]
        for name, s in (("two thin QRs + small SVD", found["thin_seconds"]), ("dense SVD", found["dense_seconds"]))
    ]
    print_table(("way", "median ms", "range", "runs"), rows)
    print(f"{found['speedup']:,.0f} times faster (at least {REQUIRED_SPEEDUP:g})")
    print(f"singular values within {found['largest_relative_difference']:.1e} (at most {LARGEST_DIFFERENCE:g})")

    bandwidth = copy_bandwidth(device)
    written = writing(args.shape, r, device)
    limit = 5 * written["values"] / bandwidth
    print(f"\n{args.shape}: {written['modules']} modules, rank {r}, {written['values']:,} values of directions")
    print(f"limit: {1e3 * limit:.1f} ms for 4 bytes of every value in and 1 out at {bandwidth / 1e9:,.0f} GB/s")
    steps = [
        [name, f"{written[f'{name}_seconds']:.2f}", f"{1e3 * s['median']:.2f}", f"{1e3 * s['max']:.2f}"]
        for name in ("factoring", "encoding")
        for s in (written[f"{name}_seconds_per_module"],)
    ]
    print_table(("step", "all, s", "median ms a module", "slowest"), steps)
    print(f"{written['stored_bytes']:,} bytes in three planes beside {written['adapter_bytes']:,} at 16 bits")
    print(
        "squared error over energy at " + ", ".join(f"{b} bits {e:.2g}" for b, e in written["relative_errors"].items())
    )
    passed = (
        found["largest_relative_difference"] <= LARGEST_DIFFERENCE
        and found["speedup"] >= REQUIRED_SPEEDUP
        and all(written["relative_errors"][str(bits)] <= most for bits, most in LARGEST_ERRORS.items())
    )
    print("passed" if passed else "FAILED")
    record = header("ladder", device) | {"size": d, "rank": r, "dtype": "float32", "operations": operations} | found
    record |= {"writing": written | {"limit_seconds": limit, "copy_bandwidth": bandwidth}, "passed": passed}
    finish(record, path)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
