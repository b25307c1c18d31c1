"""The gate and its cross-fade equal their definition, computed direction by direction, on every shape of table."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import FADES, ChunkSettings
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.ladder import Directions, Ladder
from runtime.ladder.formats import BITS, encode, wide_rows
from runtime.ops.reference.lora import direction_gate
from runtime.reference import gate as gate_module
from runtime.reference.adaptive import activate
from runtime.reference.gate import KEPT_LAYOUTS, AdaptedLinear, Gate
from tests.runtime.reference import PositionPolicy, by_definition, definition_hooks, handmade_ladder, weights_of

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RANK = 6


@st.composite
def ladders(draw):
    """Any table: two to six rungs in one to three banks, each bank in few bits or in 16, one to four modules."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    modules, below = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    bank_of = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=below, max_size=below).map(sorted))).unique(
        return_inverse=True
    )[1]
    last = int(bank_of[-1]) + 1
    coded = draw(st.lists(st.booleans(), min_size=last, max_size=last))
    edges = torch.zeros(below + 1, modules, len(BITS), dtype=torch.long)
    for bank in range(last):
        for m in range(modules):
            mine = (bank_of == bank).nonzero()[:, 0].tolist()
            ends = torch.zeros(len(BITS), dtype=torch.long)
            for j in mine:
                # Ends fall neither along formats nor along the rungs of a bank; a wide bank has one format.
                more = torch.randint(0, RANK + 1, (len(BITS),), generator=generator).sort().values
                more = more * torch.tensor([0, 1, 1, 1]) if coded[bank] else more[-1].expand(len(BITS))
                edges[j, m] = ends = torch.maximum(ends, more)
    edges[-1] = RANK
    banks = []
    for bank in range(last + 1):
        write = encode if bank < last and coded[bank] else wide_rows
        banks.append(
            {
                f"m{m}": Directions(*(write(torch.randn(RANK, width, generator=generator) / 4) for width in (6 + m, 9)))
                for m in range(modules)
            }
        )
    scales = (*(0.8 + 0.4 * torch.rand(below, generator=generator)).tolist(), 1.0)
    return Ladder("mixed", tuple(range(below + 1)), tuple(banks), (*bank_of.tolist(), last), edges, scales, "none")


def random_weights(ladder, rows, tokens, seed, several):
    """[B, T, J]: of every token some rungs, or one."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, tokens, len(ladder.rungs), generator=generator)
    if several:
        return weights * (torch.rand(weights.shape, generator=generator) < 0.5)
    one = torch.randint(len(ladder.rungs), (rows, tokens), generator=generator)
    return weights * torch.nn.functional.one_hot(one, len(ladder.rungs))


def active_in(weights):
    return [j for j in range(weights.shape[-1]) if bool((weights[..., j] > 0).any())]


def zeros(x):
    """A frozen layer that puts out nothing."""
    return torch.zeros(*x.shape[:-1], 9, dtype=x.dtype)


def adapted(ladder, gate, name):
    return AdaptedLinear(
        zeros, gate, gate.column[name], {number: bank[name] for number, bank in enumerate(ladder.banks)}
    )


@given(ladders(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_gated_update_equals_the_definition(ladder, rows, tokens, seed, several):
    weights = random_weights(ladder, rows, tokens, seed, several)
    gate = Gate(ladder, CPU)
    gate.set(weights, active_in(weights), fades=several)
    ranges = ladder.ranges(active_in(weights))
    for m, name in enumerate(ladder.modules):
        x = torch.randn(rows, tokens, 6 + m, generator=torch.Generator().manual_seed(seed))
        got = adapted(ladder, gate, name)(x)
        torch.testing.assert_close(got.double(), by_definition(ladder, name, x, weights), **CLOSE)
        # no more directions than the active rungs read: what is not needed is not computed
        read = gate.read(gate.column[name], x)
        assert (() if read is None else read[0]) == tuple(ranges[m])
        assert (0 if read is None else read[1].shape[-1]) == sum(map(len, ranges[m]))


@given(ladders())
def test_one_rung_reads_its_own_directions_and_nothing_else(ladder):
    gate, top = Gate(ladder, CPU), len(ladder.rungs) - 1
    for j in range(top + 1):
        weights = torch.nn.functional.one_hot(torch.tensor([[j]]), top + 1) * 1.125
        for active in ([j], [*range(top + 1)]):  # alone, and where other tokens of the pass run at all the others
            gate.set(weights, active)
            for m, name in enumerate(ladder.modules):
                read = gate.read(gate.column[name], torch.empty(0))
                found = [] if read is None else read[1][0, 0].tolist()
                ranges = () if read is None else read[0]
                bits = ladder.bits()[j, m]
                expected = [
                    1.125 * ladder.scales[j] * (r.bank == ladder.bank_of[j] and int(bits[k]) == r.bits)
                    for r in ranges
                    for k in range(r.start, r.stop)
                ]
                assert found == pytest.approx(expected, rel=1e-6)
                assert sum(value > 0 for value in found) == int((bits > 0).sum())


@given(ladders(), st.integers(0, 1000))
def test_without_a_second_rung_of_a_bank_a_gate_is_one_product(ladder, seed):
    """What the plain pass computes is what the definition's op does."""
    weights = random_weights(ladder, 2, 3, seed, several=False)
    gate, bank_of = Gate(ladder, CPU), torch.tensor(ladder.bank_of)
    active = active_in(weights)
    gate.set(weights, active, fades=False)
    layout = gate._made(tuple(active))
    reads = layout.cells if layout.reads is None else layout.reads
    full = direction_gate(weights * torch.tensor(ladder.scales), layout.cells, reads, bank_of)
    for name in ladder.modules:
        read, column = gate.read(gate.column[name], torch.empty(0)), layout.columns[gate.column[name]]
        assert read is None or torch.equal(read[1], full[..., column])


def test_a_fade_reads_every_direction_at_the_finest_bits_and_both_ends_are_exact():
    """One module, four directions. Rung 0 reads 2, 2, -, -; rung 1 reads 8, 4, 2, -; rung 2 is exact."""
    edges = torch.tensor([[0, 0, 0, 2], [0, 1, 2, 3], [4, 4, 4, 4]])[:, None]
    rows = {"m": Directions(encode(torch.randn(4, 6)), encode(torch.randn(4, 9)))}
    exact = {"m": Directions(wide_rows(torch.randn(4, 6)), wide_rows(torch.randn(4, 9)))}
    ladder = Ladder("mixed", (1, 2, 4), (rows, exact), (0, 0, 1), edges, (1.5, 1.25, 1.0), "none")
    gate = Gate(ladder, CPU)
    weights = torch.tensor([[[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]])
    gate.set(weights, (0, 1, 2))
    ranges, found = gate.read(0, torch.empty(0))
    assert [(r.bank, r.bits, r.start, r.stop) for r in ranges] == [
        (0, 8, 0, 1), (0, 4, 1, 2), (0, 2, 0, 3), (1, 16, 0, 4),
    ]  # fmt: skip
    both = 0.75 * 1.5 + 0.25 * 1.25
    assert found[0].tolist() == [
        # 8: k=0; 4: k=1; 2: k=0, 1, 2; exact: k=0, 1, 2, 3
        [0, 0, 1.5, 1.5, 0, 0, 0, 0, 0],
        [both, both, 0, 0, 0.25 * 1.25, 0, 0, 0, 0],
        [1.25, 1.25, 0, 0, 1.25, 0, 0, 0, 0],
        [0.625, 0.625, 0, 0, 0.625, 0.5, 0.5, 0.5, 0.5],
        [0, 0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_modules_of_equal_edges_share_their_gate(llama_adapter):
    adapter = load_adapter(llama_adapter)
    assert set(Gate(build_ladder(adapter), CPU).column.values()) == {0}
    assert set(Gate(handmade_ladder(adapter), CPU).column.values()) == {0, 1, 2, 3}


def test_the_gates_of_all_modules_are_one_product(llama_adapter, monkeypatch):
    """However many tables there are, and none where the weights stay what they are."""
    ladder, made = handmade_ladder(load_adapter(llama_adapter)), []
    monkeypatch.setattr(gate_module, "direction_gate", lambda *tables: made.append(1) or direction_gate(*tables))
    gate = Gate(ladder, CPU)
    gate.set(torch.rand(2, 3, len(ladder.rungs)), range(len(ladder.rungs)))
    for _ in range(2):
        for name in ladder.modules:
            gate.read(gate.column[name], torch.empty(0))
    assert len(made) == 1


def test_tables_are_kept_for_the_latest_sets_of_rungs(llama_adapter):
    ladder = handmade_ladder(load_adapter(llama_adapter))
    gate, weights = Gate(ladder, CPU), torch.rand(1, 1, len(ladder.rungs))
    sets = [tuple(j for j in range(6) if number >> j & 1) for number in range(64)]
    for active in [*sets, *sets]:
        gate.set(weights, active)
    assert len(gate._layouts) == min(KEPT_LAYOUTS, len(sets))


def test_input_flattened_by_the_model_is_gated_token_by_token(llama_adapter):
    ladder = handmade_ladder(load_adapter(llama_adapter))
    name = next(name for name, own in ladder.modules.items() if own.b.width == 64)
    linear = AdaptedLinear(
        lambda x: torch.zeros(*x.shape[:-1], 64),
        gate := Gate(ladder, CPU),
        gate.column[name],
        {number: bank[name] for number, bank in enumerate(ladder.banks)},
    )
    weights = torch.rand(2, 5, len(ladder.rungs))
    gate.set(weights, range(len(ladder.rungs)))
    x = torch.randn(2, 5, ladder.modules[name].a.width)
    expected = linear(x)
    assert torch.equal(linear(x.view(10, -1)), expected.view(10, -1))
    # and where all tokens of a row have one gate
    gate.set(weights[:, :1], range(len(ladder.rungs)))
    expected = linear(x)
    assert torch.equal(linear(x.view(10, -1)), expected.view(10, -1))
    torch.testing.assert_close(
        expected.double(), by_definition(ladder, name, x, weights[:, :1].expand(-1, 5, -1)), **CLOSE
    )


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
@given(ladder=ladders())
def test_a_layer_of_another_dtype_is_updated_in_its_own(inner, ladder):
    """Some models keep a few layers in float32; what the layer puts out stays what it is."""
    gate, x = Gate(ladder, CPU), torch.randn(2, 5, 6)
    weights, linear = torch.rand(2, 5, len(ladder.rungs)), adapted(ladder, gate, "m0")
    for last in range(len(ladder.rungs)):  # other directions every time
        used = weights.clone()
        used[..., last + 1 :] = 0
        gate.set(used, range(last + 1))
        found, expected = linear(x.to(inner)), by_definition(ladder, "m0", x, used)
        assert found.dtype == inner
        read = gate.read(gate.column["m0"], found)
        if read is None:
            assert not found.any()
            continue
        # Roundings of a term: x, a, gate, the product with it, b and the whole, and those of the two sums it is in.
        (a, b), gates = (half.double().abs() for half in linear.decoded), read[1].double()
        most = (x.double().abs() @ a.T * gates) @ b
        roundings = 6 + a.shape[1] + len(a)
        assert ((found.double() - expected).abs() <= roundings * torch.finfo(inner).eps / 2 * most).all()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def decoded_bytes(linear):
    """Memory that an adapted linear holds beside the stored directions, whole storages counted."""
    stored = {
        part.untyped_storage().data_ptr()
        for own in linear.directions.values()
        for half in (own.a, own.b)
        for part in half.parts().values()
    }
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(vars(linear))}
    return sum(size for pointer, size in held.items() if pointer not in stored)


@given(ladders(), st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=5))
def test_what_is_decoded_is_no_more_than_the_active_rungs_read(ladder, passes):
    """The rows of the latest pass alone; and nothing where one range of 16 bits is read, which needs no copy."""
    gate = Gate(ladder, CPU)
    linear = adapted(ladder, gate, "m0")
    for asked in passes:
        active = sorted(j for j in asked if j < len(ladder.rungs))
        weights = torch.zeros(1, 1, len(ladder.rungs))
        weights[..., active] = 0.5
        gate.set(weights, active)
        linear(torch.randn(1, 1, 6))
        ranges = ladder.ranges(active)[0]
        if ranges:
            rows = sum(map(len, ranges))
            assert decoded_bytes(linear) == (0 if len(ranges) == 1 and ranges[0].bits == 16 else 4 * rows * (6 + 9))
            exact = max(active) == len(ladder.rungs) - 1
            # of every bank at most its directions at each of the formats in which two active rungs read them
            assert rows <= RANK * (exact + 3 * len({ladder.bank_of[j] for j in active}))


def test_a_range_of_a_bank_is_decoded_without_the_rest_of_it(llama_adapter):
    """Two directions of eight at 2 bits, and nothing of the others, not even behind a view."""
    ladder = handmade_ladder(load_adapter(llama_adapter))
    gate, name = Gate(ladder, CPU), list(ladder.modules)[1]
    linear = AdaptedLinear(
        lambda x: torch.zeros(*x.shape[:-1], ladder.modules[name].b.width), gate, gate.column[name],
        {number: bank[name] for number, bank in enumerate(ladder.banks)},
    )  # fmt: skip
    gate.set(torch.eye(6)[1].view(1, 1, 6), [1])
    linear(torch.randn(1, 1, ladder.modules[name].a.width))
    assert [(r.bits, len(r)) for r in gate.read(gate.column[name], torch.empty(0))[0]] == [(2, 2)]
    assert decoded_bytes(linear) == 4 * 2 * (ladder.modules[name].a.width + ladder.modules[name].b.width)


def test_passes_that_read_the_same_decode_once(llama_adapter):
    ladder = handmade_ladder(load_adapter(llama_adapter))
    gate, name = Gate(ladder, CPU), next(iter(ladder.modules))
    linear = AdaptedLinear(
        lambda x: torch.zeros(*x.shape[:-1], ladder.modules[name].b.width), gate, gate.column[name],
        {number: bank[name] for number, bank in enumerate(ladder.banks)},
    )  # fmt: skip
    x, weights, held = torch.randn(1, 1, ladder.modules[name].a.width), torch.rand(1, 1, len(ladder.rungs)), []
    for active in ([1], [1], [3], [1]):
        gate.set(weights, active)
        linear(x)
        held.append(linear.decoded[0])
    assert held[0] is held[1]
    assert all(a is not b for a, b in pairwise(held[1:]))
    assert torch.equal(held[0], held[3])


CHUNKS = {
    "as long as the fade": lambda fade: ChunkSettings(fade, fade),
    "hardly longer": lambda fade: ChunkSettings(fade, fade + 3),
    "longer than any fade": lambda fade: ChunkSettings(17, 17),
}


@pytest.mark.parametrize("fade", FADES)
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("kind", ["svd", "varied", "coded"])
def test_forward_with_fades_equals_the_definition(
    fade, chunk, kind, llama_adapter, varied_ladder, make_plan, tiny_llama_factory
):
    rungs = (0, 1, 3, 5, 8)
    ladder = {
        "svd": lambda: build_ladder(load_adapter(llama_adapter), rungs),
        "varied": lambda: varied_ladder(llama_adapter, rungs),
        "coded": lambda: handmade_ladder(load_adapter(llama_adapter)),
    }[kind]()
    plan = make_plan(
        ladder,
        lambda rungs: PositionPolicy(rungs, 1),
        torch.tensor([0.0, 3.0]),
        chunk=chunk(fade),
        fade_tokens=fade,
        block_tokens=5,
    )
    tokens = torch.randint(3, 256, (2, 121), generator=torch.Generator().manual_seed(fade))
    model = tiny_llama_factory()
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        logits = model(tokens).logits
        record = run.last.stream.columns()
        weights = weights_of(record, plan.settings, len(ladder.rungs))
        # the pass that measures training targets, without cache and blocks, gives the same
        gated = run.gated(tokens, torch.ones_like(tokens, dtype=torch.bool), weights.float())
        torch.testing.assert_close(gated, logits, **CLOSE)
    assert record["rung"].unique().numel() == len(ladder.rungs), "the case is to visit every rung"
    with definition_hooks(model, ladder, weights), torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, **CLOSE)
