"""The gate and its cross-fade equal their definition, computed one rung at a time, on every shape of rank table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import FADES, ChunkSettings
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.ladder import Ladder
from runtime.ladder.adapter import Adapter, LoraFactors
from runtime.ladder.formats import BITS
from runtime.reference.adaptive import activate
from runtime.reference.gate import AdaptedLinear, Gate
from tests.runtime.reference import PositionPolicy, definition_hooks, rung_by_rung, weights_of

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random_ladder(ranks: list[list[int]], seed: int) -> Ladder:
    """`ranks` [M][J] non-decreasing, the last of each is the module's full rank."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for m, column in enumerate(ranks):
        full = max(column[-1], 1)
        draw = [torch.randn(*shape, generator=generator) / 4 for shape in ((full, 6 + m), (9, full))]
        modules[f"m{m}"] = LoraFactors(*draw, 1.0)
    ladder = build_ladder(Adapter(None, None, modules))
    edges = torch.tensor(ranks).T[..., None].repeat(1, 1, len(BITS))
    return Ladder("test", tuple(range(len(ranks[0]))), ladder.modules, edges, "none")


def zeros(x):
    """A frozen layer that puts out nothing."""
    return torch.zeros(*x.shape[:-1], 9, dtype=x.dtype)


def width(directions):
    """How many directions are read; none of a module without any."""
    return 0 if directions is None else directions.shape[-1]


columns = st.integers(1, 4).flatmap(
    lambda rungs: st.lists(
        st.lists(st.integers(0, 7), min_size=rungs, max_size=rungs).map(sorted), min_size=1, max_size=4
    )
)


@given(columns, st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_gated_update_is_the_weighted_sum_of_rungs(ranks, rows, tokens, seed):
    ladder = random_ladder(ranks, seed)
    generator = torch.Generator().manual_seed(seed)
    rungs = len(ladder.rungs)
    active = int(torch.randint(rungs, (), generator=generator))
    weights = torch.rand(rows, tokens, rungs, generator=generator)
    weights[..., active + 1 :] = 0
    gate = Gate(ladder, CPU)
    gate.set(weights, active)
    for m, (name, factors) in enumerate(ladder.modules.items()):
        x = torch.randn(rows, tokens, factors.a.shape[1], generator=generator)
        got = AdaptedLinear(zeros, gate, gate.column[name], factors.a, factors.b)(x)
        torch.testing.assert_close(got.double(), rung_by_rung(ladder, name, x, weights), **CLOSE)
        # no more directions than the active rung has: what is not needed is not computed
        assert width(gate.directions(gate.column[name], x)) == ranks[m][active]


@given(columns, st.integers(0, 1000))
def test_one_hot_weights_gate_exactly_a_prefix(ranks, seed):
    ladder = random_ladder(ranks, seed)
    gate = Gate(ladder, CPU)
    for j in range(len(ladder.rungs)):
        weights = torch.nn.functional.one_hot(torch.tensor([[j]]), len(ladder.rungs)) * 1.125
        gate.set(weights, len(ladder.rungs) - 1)
        for m, name in enumerate(ladder.modules):
            expected = (torch.arange(ranks[m][-1]) < ranks[m][j]) * 1.125
            found = gate.directions(gate.column[name], torch.empty(0))
            assert width(found) == ranks[m][-1]
            assert found is None or torch.equal(found[0, 0], expected)


def test_modules_of_equal_ranks_share_their_gate(llama_adapter):
    gate = Gate(build_ladder(load_adapter(llama_adapter)), CPU)
    assert set(gate.column.values()) == {0}


def test_input_flattened_by_the_model_is_gated_token_by_token():
    ladder = random_ladder([[1, 3]], seed=0)
    gate = Gate(ladder, CPU)
    weights = torch.rand(2, 5, 2)
    gate.set(weights, 1)
    factors = ladder.modules["m0"]
    adapted = AdaptedLinear(zeros, gate, 0, factors.a, factors.b)
    x = torch.randn(2, 5, 6)
    expected = adapted(x)
    assert torch.equal(adapted(x.view(10, 6)), expected.view(10, 9))
    # and where all tokens of a row have one gate
    gate.set(weights[:, :1], 1)
    expected = adapted(x)
    assert torch.equal(adapted(x.view(10, 6)), expected.view(10, 9))
    torch.testing.assert_close(expected.double(), rung_by_rung(ladder, "m0", x, weights[:, :1].expand(-1, 5, -1)))


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
def test_a_layer_of_another_dtype_is_updated_in_its_own(inner):
    """Some models keep a few layers in float32; what the layer puts out stays what it is."""
    ladder = random_ladder([[1, 3]], seed=0)
    factors, gate, x = ladder.modules["m0"], Gate(ladder, CPU), torch.randn(2, 5, 6)
    weights = torch.rand(2, 5, 2)
    stored = torch.bfloat16 if inner == torch.float32 else torch.float32
    adapted = AdaptedLinear(zeros, gate, 0, factors.a.to(stored), factors.b.to(stored))
    for active in (1, 0, 1):  # fewer directions in between
        used = weights.clone()
        used[..., active + 1 :] = 0
        gate.set(used, active)
        found = adapted(x.to(inner))
        assert found.dtype == inner
        expected = rung_by_rung(ladder, "m0", x, used)
        torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.05)


CHUNKS = {
    "as long as the fade": lambda fade: ChunkSettings(fade, fade),
    "hardly longer": lambda fade: ChunkSettings(fade, fade + 3),
    "longer than any fade": lambda fade: ChunkSettings(17, 17),
}


@pytest.mark.parametrize("fade", FADES)
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("varied", [False, True], ids=["uniform table", "table by module"])
def test_forward_with_fades_equals_the_definition(
    fade, chunk, varied, llama_adapter, varied_ladder, make_plan, tiny_llama_factory
):
    rungs = (0, 1, 3, 5, 8)
    ladder = varied_ladder(llama_adapter, rungs) if varied else build_ladder(load_adapter(llama_adapter), rungs)
    plan = make_plan(
        ladder, PositionPolicy, torch.tensor([0.0, 7.0]), chunk=chunk(fade), fade_tokens=fade, block_tokens=5
    )
    tokens = torch.randint(3, 256, (2, 121), generator=torch.Generator().manual_seed(fade))
    model = tiny_llama_factory()
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        logits = model(tokens).logits
        record = run.last.stream.columns()
        weights = weights_of(record, plan.settings, len(rungs))
        # the pass that measures training targets, without cache and blocks, gives the same
        gated = run.gated(tokens, torch.ones_like(tokens, dtype=torch.bool), weights.float())
        torch.testing.assert_close(gated, logits, **CLOSE)
    assert record["rung"].unique().numel() == len(rungs), "the case is to visit every rung"
    with definition_hooks(model, ladder, weights), torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, **CLOSE)
