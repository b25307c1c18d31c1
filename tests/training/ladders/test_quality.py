"""What a candidate loses, held against direct sums, a document at a time."""

import math

import pytest
import torch

from training.ladders import quality as stage
from training.ladders.build import pairs_of
from training.ladders.quality import Candidate, measure


def nothing(exact):
    return {name: (a[:0], b[:0]) for name, (a, b) in exact.items()}


@pytest.fixture(scope="module")
def candidates(exact, mixed):
    return [
        Candidate("exact", lambda: exact, 64.0),
        Candidate("none", lambda: nothing(exact)),
        Candidate("rung", pairs_of(mixed, 1), 4.0),
    ]


@pytest.fixture(scope="module")
def found(tiny_llama_factory, exact, candidates, split):
    return measure(tiny_llama_factory(), exact, candidates, split.test)


@torch.no_grad()
def direct(model, other, documents):
    """Of each document, alone and unpadded: sum of KL, sum of cross entropy of `other`, completion tokens."""
    found = []
    for own in documents:
        ids = torch.tensor([own["input_ids"]])
        log_p, log_q = (x(ids).logits[0].double().log_softmax(-1) for x in (model, other))
        kl = nll = 0.0
        positions = [t for t in range(ids.shape[1] - 1) if t + 1 >= own["prompt_tokens"]]
        for t in positions:
            kl += float((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
            nll -= float(log_q[t, ids[0, t + 1]])
        found.append((kl, nll, len(positions)))
    return torch.tensor(found, dtype=torch.float64).T


@pytest.fixture(scope="module")
def expected(tiny_llama_factory, source, merged, split):
    """Of no adapter at all."""
    return direct(merged(tiny_llama_factory(), source), tiny_llama_factory(), split.test)


def test_the_exact_adapter_loses_nothing(found, tiny_llama_factory, source, merged, split):
    assert (found[0].name, found[0].bytes) == ("exact", 64.0)
    assert found[0].kl < 1e-6
    model = merged(tiny_llama_factory(), source)
    _, nll, tokens = direct(model, model, split.test)
    assert found[0].perplexity == pytest.approx(math.exp(float(nll.sum() / tokens.sum())), rel=1e-4)


def test_no_adapter_loses_what_the_base_model_does(found, expected):
    kl, nll, tokens = expected
    assert found[1].name == "none"
    assert math.isnan(found[1].bytes)
    assert found[1].kl == pytest.approx(float(kl.sum() / tokens.sum()), rel=1e-3)
    assert found[1].kl > 0.1, "otherwise this says nothing"
    assert found[1].perplexity == pytest.approx(math.exp(float(nll.sum() / tokens.sum())), rel=1e-4)


def test_its_standard_error_is_that_of_a_ratio_over_documents(found, expected):
    kl, _, tokens = expected
    count, mean = len(kl), float(kl.sum() / tokens.sum())
    squares = sum(float(k - mean * n) ** 2 for k, n in zip(kl, tokens, strict=True))
    by_hand = math.sqrt(count / (count - 1) * squares) / float(tokens.sum())
    assert found[1].kl_se == pytest.approx(by_hand, rel=5e-3)
    # and near what leaving out a document at a time gives
    left = torch.stack([(kl.sum() - kl[i]) / (tokens.sum() - tokens[i]) for i in range(count)])
    jackknife = math.sqrt((count - 1) / count * float((left - left.mean()).square().sum()))
    assert found[1].kl_se == pytest.approx(jackknife, rel=0.1)


def test_a_single_document_has_no_standard_error(tiny_llama, exact, candidates, split):
    assert [own.kl_se for own in measure(tiny_llama, exact, candidates, split.test[:1])] == [None] * 3


@pytest.mark.parametrize("change", [{"TOKENS_PER_STEP": 1}, {"TOKENS_PER_STEP": 40}, {"LOGITS_BYTES": 4 * 256 * 60}])
def test_batches_and_groups_change_nothing(change, tiny_llama, exact, candidates, split, found, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(stage, name, value)
    for own, one in zip(measure(tiny_llama, exact, candidates, split.test), found, strict=True):
        assert (own.name, own.perplexity) == (one.name, pytest.approx(one.perplexity, rel=1e-5))
        assert own.kl == pytest.approx(one.kl, rel=1e-4, abs=1e-6)
        assert own.kl_se == pytest.approx(one.kl_se, rel=1e-3, abs=1e-6)


def test_the_mean_is_over_tokens_and_not_over_documents(tiny_llama, exact, candidates, split, found):
    single = [measure(tiny_llama, exact, candidates, [own])[1].kl for own in split.test]
    tokens = [len(own["input_ids"]) - max(own["prompt_tokens"], 1) for own in split.test]
    weighted = sum(kl * n for kl, n in zip(single, tokens, strict=True)) / sum(tokens)
    assert found[1].kl == pytest.approx(weighted, rel=1e-4)


def test_candidates_do_not_know_of_each_other(tiny_llama, exact, candidates, split, found):
    swapped = measure(tiny_llama, exact, candidates[::-1], split.test)
    for own, one in zip(swapped[::-1], found, strict=True):
        assert (own.name, own.kl, own.perplexity) == (one.name, one.kl, one.perplexity)


def test_a_candidate_is_decoded_once_a_group_and_the_model_left_alone(tiny_llama, exact, split, unchanged, monkeypatch):
    calls = []
    check = unchanged(tiny_llama)
    measure(tiny_llama, exact, [Candidate("one", lambda: calls.append(1) or exact)], split.test)
    check()
    assert len(calls) == 1
    # documents of 23 to 38 completion tokens, alone in a batch; a group holds four times this many
    monkeypatch.setattr(stage, "TOKENS_PER_STEP", 20)
    measure(tiny_llama, exact, [Candidate("one", lambda: calls.append(1) or exact)], split.test)
    assert len(calls) == 1 + 2
