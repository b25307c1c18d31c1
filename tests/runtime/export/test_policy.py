"""A policy is exported at the rung and scale that it serves a budget at."""

import pytest
import torch

from runtime import adaptive, build_ladder, export_policy, export_rung, load_adapter
from tests.runtime.export.exported import LOGITS, RUNGS, SCALES, peft_logits


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("budget", [None, 0.25, 0.5, 0.74, 1.0])
def test_an_exported_policy_gives_the_logits_that_it_serves(
    budget, uniform, fixed_policy, llama_adapter, peft_load, tiny_llama_factory, tokens, tmp_path
):
    folder = fixed_policy()
    exported = export_policy(folder, llama_adapter, tmp_path / "exported", budget=budget, uniform=uniform)
    expected = peft_logits(peft_load, tiny_llama_factory(), exported, tokens)
    model = tiny_llama_factory()
    with adaptive(model, llama_adapter, policy=folder, budget=budget):
        torch.testing.assert_close(model(tokens).logits, expected, **LOGITS)


@pytest.mark.parametrize(("budget", "index"), [(None, 2), (0.25, 0), (0.5, 1), (0.74, 1), (1.0, 3)])
def test_the_rung_and_scale_of_a_budget_are_written(budget, index, fixed_policy, llama_adapter, tmp_path):
    written = load_adapter(export_policy(fixed_policy(), llama_adapter, tmp_path / "exported", budget=budget))
    plain = load_adapter(
        export_rung(build_ladder(load_adapter(llama_adapter), RUNGS), RUNGS[index], tmp_path / "plain")
    )
    assert written.rank == RUNGS[index]
    for name, factors in plain.modules.items():
        other = written.modules[name]
        torch.testing.assert_close(other.b @ other.a, SCALES[index] * factors.b @ factors.a, atol=1e-7, rtol=1e-5)


def test_a_shared_policy_is_written_for_an_adapter_of_another_rank(
    fixed_policy, make_peft_adapter, tiny_llama_factory, tmp_path
):
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", r=16, seed=5)
    written = load_adapter(export_policy(fixed_policy(shared=True), other, tmp_path / "exported"))
    assert written.rank == 12, "the same share of 16 as 6 is of 8"
    with pytest.raises(ValueError, match="adapter: expected fingerprint"):
        export_policy(fixed_policy(), other, tmp_path / "again")
    same_rank = make_peft_adapter(tiny_llama_factory, tmp_path / "same rank", seed=6)
    with pytest.raises(ValueError, match=r"adapter: expected fingerprint .* load the adapter the policy was fitted to"):
        export_policy(fixed_policy(), same_rank, tmp_path / "again")
    assert not (tmp_path / "again").exists()
