"""What tests of saved policies share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.policy.checkpoints import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint().save(tmp_path / "policy")
    return tmp_path / "policy"
