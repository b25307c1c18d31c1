"""What `benchmarks.perplexity` compares: both paths are fed the same text, and agree on scores and pages."""

import pytest
import torch

from benchmarks.kv import no_adapter, plan
from benchmarks.perplexity import engine_scores, reference_scores, token_by_token
from policy.settings import KVSettings
from runtime.kv.formats import FORMATS, INT4, INT8
from tests.engine import tiny

INT8_PAGES, INT4_PAGES = FORMATS[INT8], FORMATS[INT4]


@pytest.fixture
def text():
    """A model whose tokens are more and less surprising, and two windows of 84 tokens."""
    model = tiny.model()
    torch.manual_seed(0)
    return model, torch.randint(3, tiny.VOCABULARY, (2, 84))


def test_both_paths_score_alike(text):
    """Behind a prompt, some of whose pages settle with it and others later."""
    (model, ids), prompt = text, 78
    kv = KVSettings(threshold=0.8, window_tokens=16)
    own = token_by_token(plan(no_adapter(model), 0, kv), prompt)
    engine, reference = (scores(model, own, ids, prompt) for scores in (engine_scores, reference_scores))
    torch.testing.assert_close(engine.nll, reference.nll, rtol=1e-5, atol=1e-6)
    assert engine.pages == reference.pages
    assert min(engine.pages[INT8_PAGES], engine.pages[INT4_PAGES]) > 0, "some of both, or nothing is shown"
    with torch.no_grad():
        logits = model(ids).logits[:, prompt - 1 : -1]
    whole = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, prompt:], reduction="none").mean(1)
    assert float((engine.nll - whole).abs().max()) > 1e-5, "pages in few bits, not all in float32"
    torch.testing.assert_close(engine.nll, whole.double(), rtol=0.05, atol=0)
