"""Learn a rank policy, compare it with baselines that favour nobody, export what won.

`fit` is the command; it walks through `pipeline`: `documents`, `targets` (collected by `collect` into `shards`),
`samples`, `calibrate`, the Lightning `module`, `measure` on held-out documents, `compare`, `report`. `evaluate` is
perplexity through the adaptive forward.
"""
