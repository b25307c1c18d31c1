"""A policy to export, and tokens to compare logits on."""

import pytest
import torch

from policy import (
    FULL_KV,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    LearnedPolicy,
    PercentilePolicy,
    PolicyCheckpoint,
    RandomPolicy,
    Settings,
)
from runtime import build_ladder, load_adapter
from runtime.fingerprint import model_fingerprint
from tests.runtime.export.exported import COST, RUNGS, SCALES


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (2, 40), generator=generator)


@pytest.fixture
def fixed_policy(tiny_llama_factory, llama_adapter, tmp_path):
    """`fixed_policy(**fingerprints)`: the folder of a fixed policy of `llama_adapter` with a scale at every rung."""

    def make(kind=FixedPolicy, **prints):
        ladder = build_ladder(load_adapter(llama_adapter), RUNGS)
        own = Fingerprints(
            model=model_fingerprint(tiny_llama_factory()),
            adapter=ladder.adapter,
            ladder=ladder.fingerprint,
            shared=False,
        )
        policies = {
            FixedPolicy: lambda: FixedPolicy(RUNGS, torch.tensor(SCALES)),
            PercentilePolicy: lambda: PercentilePolicy(RUNGS, "entropy"),
            LearnedPolicy: lambda: LearnedPolicy(RUNGS),
            RandomPolicy: lambda: RandomPolicy(RUNGS, seed=0),
        }
        policy = policies[kind]()
        curve = None if kind is FixedPolicy else KnobCurve((0.25, 1.0), policy.knob_range())
        settings = Settings(block_tokens=8, kv=FULL_KV)
        PolicyCheckpoint(policy, settings, curve, COST, own | prints, 0.75).save(tmp_path / "policy")
        return tmp_path / "policy"

    return make
