"""What tests of whole fits have in common."""

import json
from pathlib import Path

POLICIES = ("fixed", "percentile", "learned", "random", "capped", "oracle")
RUNGS = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8]
SHORT = {
    "amounts.train_documents": 4, "amounts.validation_documents": 2, "amounts.test_documents": 3, "amounts.epochs": 1,
    "amounts.rounds": 0,
}  # fmt: skip


def summary_of(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())
