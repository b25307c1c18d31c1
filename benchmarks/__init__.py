"""What the project costs, measured: each command states the physical limit first and is gated on correctness.

    python -m benchmarks.decode    the engine's milliseconds a step, beside the bytes that no version can avoid reading
    python -m benchmarks.record_trace the rungs that a policy chooses on real text, which `decode` replays
    python -m benchmarks.plot      its figure
    python -m benchmarks.kernels   the same of each kernel of a step alone
    python -m benchmarks.reference the same of the reference path, beside PEFT's
    python -m benchmarks.ladder    factoring an adapter, against the dense SVD
    python -m benchmarks.kv        what compressed KV pages save, and what they cost in perplexity
    python -m benchmarks.agreement the engine and the reference path, fed the same tokens
    python -m benchmarks.controller what signals, chunk length and objective are worth
    python -m benchmarks.memory    what a long generation holds beside its KV cache

Every command but the two that make files for others (`record_trace`, `plot`) prints a table for people, writes its
record under `benchmarks/results/`, and ends with that record as one line of JSON. Not installed with the package: run
it from the repository.
"""
