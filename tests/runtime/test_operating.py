"""What a request may spend is its own: rows of other budgets, rungs and adapters in one batch equal separate runs."""

import pytest
import torch
from transformers import set_seed

from policy import (
    FULL_KV,
    ChunkSettings,
    Fingerprints,
    KnobCurve,
    KVSettings,
    PercentilePolicy,
    PolicyCheckpoint,
    Settings,
)
from runtime import adaptive, build_ladder, generate, load_adapter
from runtime.control.record import Sums
from runtime.fingerprint import model_fingerprint
from runtime.kv import FORMATS
from runtime.ladder import svd_factors
from runtime.plan import plan_run
from tests.runtime.reference import row_of

NEW_TOKENS = 40
OPTIONS = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
BUDGETS = [0.25, 1.0, 0.5, 0.375, 0.75, 0.3]
DECIDED = ("positions", "opens", "rung", "active", "held_valid")


@pytest.fixture(scope="module")
def wide_adapter(make_peft_adapter, tiny_llama_factory, tmp_path_factory):
    """r=16, twice the rank of `llama_adapter`."""
    folder = tmp_path_factory.mktemp("adapters") / "wide"
    return make_peft_adapter(tiny_llama_factory, folder, r=16, alpha=32, seed=1)


@pytest.fixture
def shared(tiny_llama, llama_adapter):
    """A policy that every adapter of the model may use; KV pages are compressed below a budget of 1."""
    ladder = build_ladder(load_adapter(llama_adapter), (2, 4, 6, 8))
    kv = KVSettings("int8", "int4", threshold=0.6, window_tokens=16)
    prints = Fingerprints(
        model=model_fingerprint(tiny_llama), adapter=ladder.adapter, ladder=ladder.fingerprint, shared=True
    )
    return PolicyCheckpoint(
        PercentilePolicy(ladder.rungs, "complexity", torch.linspace(0.4, 0.9, 101), spread=2.0),
        Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(1, 5), kv=kv),
        KnobCurve((0.25, 0.5, 0.75, 1.0), (0.0, 1.0, 2.0, 3.0)),
        (0.25, 0.5, 0.75, 1.0),
        prints,
    )


@pytest.fixture
def prompts():
    """Six prompts of 31, 9, 17, 1, 24 and 12 tokens, padded on the left."""
    lengths = torch.tensor([31, 9, 17, 1, 24, 12])
    ids = torch.randint(3, 60, (6, 31), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(31) >= 31 - lengths[:, None]).long()
    return ids * mask, mask


def run_of(model, adapter, ids, mask, **asked):
    """New tokens, the record and the page formats of every row, and the mean ranks."""
    with adaptive(model, adapter, keep_record=True, **asked) as run:
        tokens = model.generate(ids, attention_mask=mask, **OPTIONS)[:, ids.shape[1] :]
        return tokens, run.last.stream.columns(), run.last.page_formats(), run.row_mean_rank()


def assert_rows_equal_separate_runs(model, adapters, ids, mask, lists, decided=DECIDED):
    """`lists` by name, one entry per row: the whole batch beside every row on its own."""
    tokens, record, formats, ranks = run_of(model, adapters, ids, mask, **lists)
    for row in range(len(ids)):
        own = {name: values[row] if isinstance(values, list) else values for name, values in lists.items()}
        prompt = ids[row][mask[row].bool()][None]
        alone = run_of(model, adapters[row], prompt, torch.ones_like(prompt), **own)
        assert torch.equal(tokens[row], alone[0][0]), f"tokens of row {row}"
        together, single = row_of(record, row), row_of(alone[1], 0)
        for name in decided:
            assert torch.equal(together[name], single[name]), f"{name} of row {row}"
        torch.testing.assert_close(together["scale"], single["scale"])
        assert torch.equal(formats[row, : alone[2].shape[1]], alone[2][0]), f"page formats of row {row}"
        assert ranks[row] == pytest.approx(alone[3][0])
    return record, formats, ranks


def test_six_budgets_and_two_adapters_in_one_batch_equal_six_runs(
    tiny_llama, llama_adapter, wide_adapter, shared, prompts
):
    adapters = [llama_adapter, wide_adapter, wide_adapter, llama_adapter, llama_adapter, wide_adapter]
    lists = {"policy": shared, "budget": BUDGETS}
    record, formats, ranks = assert_rows_equal_separate_runs(tiny_llama, adapters, *prompts, lists)
    assert record["rung"][record["real"]].unique().numel() == 4, "the policy visits every rung"
    assert ranks[1] == 16, "a budget of 1 is the exact adapter"
    names = [{FORMATS[code] for code in row} for row in formats.tolist()]
    assert names[1] <= {"full", "none"}, "and keeps its pages in full precision"
    assert all(names[row] & {"int8", "int4"} for row in (0, 2, 4)), "where others do not"


def test_fixed_rungs_by_row_equal_separate_runs(tiny_llama, llama_adapter, wide_adapter, prompts):
    adapters = [llama_adapter, wide_adapter, wide_adapter, llama_adapter, llama_adapter, wide_adapter]
    lists = {"rung": [0, 16, 3, 8, 2, 11]}
    # a run of its own has fewer rungs, so another index of the same rank
    ranks = assert_rows_equal_separate_runs(tiny_llama, adapters, *prompts, lists, ("positions", "opens"))[2]
    assert ranks == pytest.approx([0, 16, 3, 8, 2, 11])


def test_exact_adapters_by_row_generate_pefts_tokens(
    tiny_llama, llama_adapter, wide_adapter, prompts, peft_load, tiny_llama_factory
):
    adapters = [llama_adapter, wide_adapter] * 3
    tokens = run_of(tiny_llama, adapters, *prompts)[0]
    for number, folder in enumerate((llama_adapter, wide_adapter)):
        model = peft_load(tiny_llama_factory(), folder)
        expected = model.generate(input_ids=prompts[0], attention_mask=prompts[1], **OPTIONS)[:, 31:]
        assert torch.equal(tokens[number::2], expected[number::2])


def test_generate_takes_lists_and_copies_of_a_row_share_its_entry(tiny_llama, llama_adapter, shared, prompts):
    ids, mask = prompts[0][:2], prompts[1][:2]
    set_seed(0)
    out = generate(
        tiny_llama, llama_adapter, ids, attention_mask=mask, policy=shared, budget=[0.25, 1.0], return_trace=True,
        num_return_sequences=2, do_sample=True, pad_token_id=0, min_new_tokens=20, max_new_tokens=20,
    )  # fmt: skip
    assert [round(rank, 6) == 8 for rank in out.row_mean_rank] == [False, False, True, True]
    assert {chunk.rung for chunks in out.trace[2:] for chunk in chunks} == {8}
    assert max(chunk.rung for chunk in out.trace[0]) < 8


REFUSED = {
    "lists of different lengths": (["a", "a"], {"rung": [2, 4, 8]}, "2 of adapter, 3 of rung"),
    "an empty list": (["a"], {"budget": [], "policy": "p"}, "0 of budget"),
    "a budget beyond 1": (["a", "a"], {"budget": [0.5, 1.5], "policy": "p"}, "budget: expected a share"),
    "a budget without a policy": (["a", "a"], {"budget": [1.0, 0.5]}, "policy: expected one to spend"),
    "rung and budget": (["a", "a"], {"budget": [1.0, 1.0], "rung": [8, 8]}, "rung: expected a fixed rung alone"),
    "a rung that one adapter lacks": (["a", "a"], {"rung": [4, 9]}, "expected ranks up to the adapter's 8, got 9"),
}


@pytest.mark.parametrize(("adapters", "asked", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_lists_that_do_not_fit_are_refused_in_one_line(llama_adapter, shared, adapters, asked, message):
    asked = {name: shared if value == "p" else value for name, value in asked.items()}
    with pytest.raises(ValueError, match=message) as error:
        plan_run([llama_adapter for _ in adapters], **asked)
    assert "\n" not in str(error.value)


def test_a_batch_of_another_size_than_the_lists_is_refused(tiny_llama, llama_adapter, prompts):
    with (
        adaptive(tiny_llama, llama_adapter, rung=[2, 4, 8, 8]),
        pytest.raises(ValueError, match=r"expected 4 rows \(or a multiple\)"),
    ):
        tiny_llama(prompts[0])


def test_a_shared_policy_needs_whole_shares_of_the_rank(
    tiny_llama, shared, make_peft_adapter, tiny_llama_factory, tmp_path
):
    odd = make_peft_adapter(tiny_llama_factory, tmp_path / "odd", r=6)
    with pytest.raises(ValueError, match=r"expected whole ranks of an svd ladder, got \[1\.5, 4\.5\]; leave them out"):
        plan_run(odd, policy=shared, budget=0.5, model_fingerprint=model_fingerprint(tiny_llama))


def test_nothing_is_factored_twice(tiny_llama, llama_adapter, wide_adapter, prompts, monkeypatch):
    factored = []
    monkeypatch.setattr("runtime.ladder.factors.svd_factors", lambda x: factored.append(x) or svd_factors(x))
    plan_run([llama_adapter, wide_adapter, llama_adapter], rung=[2, 3, 5])
    assert len(factored) == 2 * len(load_adapter(llama_adapter).modules)


def test_the_callers_policy_stays_where_and_as_it_was(tiny_llama, llama_adapter, shared, prompts):
    shared.policy.train()
    before = {name: tensor.data_ptr() for name, tensor in shared.policy.state_dict().items()}
    with adaptive(tiny_llama, llama_adapter, policy=shared, budget=0.5) as run:
        tiny_llama(prompts[0])
        assert run.policy is not shared.policy
        assert not run.policy.training
    assert shared.policy.training
    assert {name: tensor.data_ptr() for name, tensor in shared.policy.state_dict().items()} == before


def test_what_a_stream_holds_does_not_grow_with_the_text(tiny_llama, llama_adapter, shared):
    """Every tensor beside the KV cache, found by walking through the stream, after 50 tokens and after 400."""

    def held(value, seen):
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if id(value) in seen or not (hasattr(value, "__dict__") or isinstance(value, list | tuple)):
            return 0
        seen.add(id(value))
        return sum(held(part, seen) for part in (vars(value).values() if hasattr(value, "__dict__") else value))

    sizes = []
    with adaptive(tiny_llama, llama_adapter, policy=shared, budget=0.5) as run:
        for length in (50, 400):
            ids = torch.randint(3, 256, (1, 8))
            tiny_llama.generate(ids, do_sample=True, pad_token_id=0, min_new_tokens=length, max_new_tokens=length)
            sizes.append(held(run.last.stream, set()))
            with pytest.raises(ValueError, match="keeps its record"):
                run.trace(0, 8)
    assert sizes[0] == sizes[1] > 0


def test_sums_leave_out_what_comes_after_a_row_has_ended():
    """Rows: ends with token 2; is stopped from outside and fed padding; goes on; its prompt holds the end token."""
    sums = Sums(4, 3, torch.device("cpu"))
    sums.expect([2], pad=0)
    prompt = torch.tensor([[5, 6], [5, 6], [5, 6], [2, 6]])
    whole = torch.ones(4, 2, dtype=torch.bool)
    sums.add(prompt, whole, ~whole, torch.zeros(4, 2, dtype=torch.long))
    generated = torch.tensor([[7, 2, 0, 0, 0], [7, 8, 0, 0, 0], [7, 8, 9, 7, 8], [7, 7, 7, 2, 0]])
    for t in range(5):
        here = torch.ones(4, 1, dtype=torch.bool)
        sums.add(generated[:, t, None], here, here, torch.full((4, 1), 1 + t % 2))
    # the end token and what padding follows went through the model for nothing
    assert sums.counts[:, 1].tolist() == [[0, 1, 0], [0, 1, 0], [0, 3, 2], [0, 2, 1]]
    assert sums.counts[:, 0].tolist() == [[2, 0, 0]] * 4


def test_mean_rank_counts_up_to_the_end_of_every_row(tiny_llama, llama_adapter, shared, prompts):
    """As the record has it: rows that end early are fed padding, which is not theirs."""
    ids, mask = prompts
    with adaptive(tiny_llama, llama_adapter, policy=shared, budget=0.5, keep_record=True) as run:
        free = tiny_llama.generate(ids, attention_mask=mask, **OPTIONS)
        stop = int(free[0, 31 + 12])
        out = tiny_llama.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=40, eos_token_id=stop
        )
        record, found = run.last.stream.columns(), run.row_mean_rank()
    ranks, ended = torch.tensor(run.plan.ladder.rungs).double(), 0
    for row in range(6):
        new = out[row, 31:].tolist()
        count = new.index(stop) + 1 if stop in new else len(new)
        ended += stop in new
        own, prompt = row_of(record, row), int(mask[row].sum())
        response = ranks[own["active"]][prompt : prompt + count - 1]
        assert found[row] == pytest.approx(float(response.mean()))
    assert 0 < ended < 6


def test_full_kv_is_the_default_of_a_fixed_rung(llama_adapter):
    plan = plan_run(llama_adapter, rung=[2, 8])
    assert plan.settings.kv == FULL_KV
    assert plan.operating.kv.is_full
