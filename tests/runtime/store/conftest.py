"""Ladders of every kind, and folders they were saved in."""

from dataclasses import replace

import pytest

from runtime import build_ladder, load_adapter, save_ladder
from tests.runtime.coded import coded_ladder, narrow, two_bank_ladder
from tests.runtime.reference import drawn_tables


@pytest.fixture(scope="module")
def adapter(llama_adapter):
    return load_adapter(llama_adapter)


@pytest.fixture(scope="module")
def ladder(adapter):
    return build_ladder(adapter, (0, 2, 4, 8))


@pytest.fixture(scope="module")
def coded(adapter):
    return coded_ladder(adapter)


@pytest.fixture(params=["svd", "coded", "two banks", "bf16"])
def any_ladder(request, adapter, ladder, coded):
    if request.param == "bf16":
        return build_ladder(narrow(adapter), (2, 3))
    return {"svd": ladder, "coded": coded, "two banks": two_bank_ladder(adapter)}[request.param]


@pytest.fixture
def saved(ladder, tmp_path):
    return save_ladder(ladder, tmp_path / "ladder")


@pytest.fixture
def saved_coded(coded, tmp_path):
    return save_ladder(coded, tmp_path / "coded")


@pytest.fixture
def saved_tables(ladder, tmp_path):
    return save_ladder(replace(ladder, difficulty=drawn_tables(0)), tmp_path / "tables")
