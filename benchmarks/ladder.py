"""Factoring one module's adapter: two thin QRs and an r x r SVD against the dense SVD of the product.

The limit is arithmetic. A dense d x d SVD with vectors takes about 22 d^3 operations, two thin QRs with their Q formed
16 d r^2 (plus two thin products, 4 d r^2, and lower-order terms): for d = 4096 and r = 64 the ratio is about 4,500, so
the thin way has room to be much more than the required 20 times faster even where it runs far below peak.

    python -m benchmarks.ladder
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from policy.limits import Whole
from runtime.command import one_line_errors
from runtime.ladder import svd_factors
from runtime.ladder.adapter import LoraFactors

from .printing import default_device, device_slug, finish, header, parse, print_table, result_path, seconds, spread

REQUIRED_SPEEDUP = 20.0
LARGEST_DIFFERENCE = 1e-4
DENSE_SECONDS = 20.0
"""The dense SVD is repeated until it has taken this long: one run is enough where one run takes longer."""


def random_factors(size: int, rank: int, device: torch.device) -> LoraFactors:
    """A and B whose product has singular values falling about 50-fold, as those of trained adapters do."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(rank, size, generator=generator, device=device) / size**0.5
    b = torch.randn(size, rank, generator=generator, device=device) / size**0.5
    return LoraFactors(a, b * torch.logspace(0, -1.7, rank, device=device), 2.0)


def largest_difference(values: Tensor, reference: Tensor) -> float:
    """Largest relative difference of singular values [r] from the first r of `reference`."""
    expected = reference[: len(values)].double()
    return float(((values.double() - expected).abs() / expected).max())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description="Ladder against dense SVD.")
    parser.add_argument("--size", type=int, default=4096, help="d_in and d_out of the module")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20, help="runs of the thin factorisation")
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

    factors = random_factors(d, r, device)
    ladder = svd_factors(factors)
    thin = [seconds(lambda: svd_factors(factors), device) for _ in range(args.repeats)]
    product = factors.scale * factors.b @ factors.a
    reference: list[Tensor] = []

    def dense_svd() -> None:
        reference[:] = [torch.linalg.svd(product, full_matrices=False).S]

    dense = [seconds(dense_svd, device)]
    while sum(dense) + dense[-1] < DENSE_SECONDS and len(dense) < args.repeats:
        dense.append(seconds(dense_svd, device))

    difference = largest_difference(ladder.singular_values, reference[0])
    speedup = spread(dense)["median"] / spread(thin)["median"]
    passed = difference <= LARGEST_DIFFERENCE and speedup >= REQUIRED_SPEEDUP
    rows = [
        [name, f"{1e3 * s['median']:.2f}", f"{1e3 * s['min']:.2f} - {1e3 * s['max']:.2f}", str(s["runs"])]
        for name, s in (("two thin QRs + small SVD", spread(thin)), ("dense SVD", spread(dense)))
    ]
    print_table(("way", "median ms", "range", "runs"), rows)
    print(f"{speedup:,.0f} times faster (at least {REQUIRED_SPEEDUP:g})")
    print(f"singular values within {difference:.1e} (at most {LARGEST_DIFFERENCE:g})")
    print("passed" if passed else "FAILED")
    record = header("ladder", device) | {
        "size": d, "rank": r, "dtype": "float32", "operations": operations,
        "thin_seconds": spread(thin), "dense_seconds": spread(dense), "speedup": speedup,
        "largest_relative_difference": difference, "passed": passed,
    }  # fmt: skip
    finish(record, path)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
