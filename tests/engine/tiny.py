"""Models of the LLaMA family, ladders and a policy, as small as tests of the engine in Triton's interpreter need."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from policy import Fingerprints, KnobCurve, LearnedPolicy, PolicyCheckpoint, Settings, SignalSettings
from runtime import Ladder
from runtime.engine.model import model_of
from runtime.fingerprint import model_fingerprint
from tests.ops.ladders import random_adapter
from tests.runtime.reference import handmade_ladder, seeded_model

VOCABULARY = 40
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
BUDGETS = (0.3, 0.6, 0.9)


def model(kind: str = "llama", layers: int = 1, device: torch.device | None = None, **options) -> PreTrainedModel:
    """A random model in float32, whose logits differ clearly from token to token, without an end-of-sequence token.

    The padding token is never the best one: where it is generated the paths differ in what they count.
    """
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128, initializer_range=0.4,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    made = seeded_model(config)
    with torch.no_grad():
        made.lm_head.weight[0] = 0
    return made.to(device or "cpu")


def ladder(of: PreTrainedModel, seed: int = 0) -> Ladder:
    """A ladder of every linear, whose rungs differ in everything that a rung may."""
    own = handmade_ladder(random_adapter(model_of(of, 1).modules(), 8, seed), seed)
    scales = torch.linspace(0.8, 1.2, len(own.rungs) - 1).roll(seed).tolist()
    return replace(own, scales=(*scales, 1.0))


def checkpoint(of: PreTrainedModel, own: Ladder, **settings) -> PolicyCheckpoint:
    """A learned policy for all ladders of the model, which does not choose the same for long."""
    cost = own.rung_bytes().float() / own.rung_bytes()[-1].float()
    with torch.random.fork_rng():
        torch.manual_seed(18)
        policy = LearnedPolicy(own.rungs, hidden=8, cost=cost)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.8)
            policy.damage_unit.fill_(0.05)
    prints = Fingerprints(model=model_fingerprint(of), adapter=own.adapter, ladder=own.fingerprint, shared=True)
    signals = SignalSettings(novelty_window_tokens=8, recent_pages=1)
    chosen = Settings(block_tokens=4, prompt_tokens=16, signals=signals, **settings)
    return PolicyCheckpoint(policy, chosen, KnobCurve(BUDGETS, (-1.5, -2.5, -4.0)), tuple(cost.tolist()), prints, 0.6)


def prompts(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of random prompts of these lengths, padded on the left."""
    columns, counts = max(lengths), torch.tensor(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), columns), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(columns) >= columns - counts[:, None]).long()
    return ids * mask, mask
