"""What a rung reads is what its table says, in the bytes that it says, of whatever kind the ladder is."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import build_ladder, load_adapter
from runtime.ladder import Adapter, Directions, Range
from runtime.ladder.formats import BITS, row_bytes, wide_rows
from tests.runtime.coded import coded_ladder, two_bank_ladder
from tests.runtime.test_ladder import dense, random_factors

MODULES = {"wide": (100, 40, 12), "narrow": (9, 31, 6), "deep": (64, 64, 12)}


@pytest.fixture(scope="module")
def adapter():
    modules = {name: random_factors(*shape, seed=i) for i, (name, shape) in enumerate(MODULES.items())}
    return Adapter(None, "base", modules)


@pytest.fixture(scope="module", params=["svd", "coded", "two banks"])
def ladder(request, adapter):
    build = {"svd": lambda own: build_ladder(own, (0, 2, 5)), "coded": coded_ladder, "two banks": two_bank_ladder}
    return build[request.param](adapter)


def definition(ladder, name, rung):
    """The dense update of a rung: every direction that it reads, alone, at the bits that the table of bits says."""
    own, bits = ladder.banks[ladder.bank_of[rung]][name], ladder.bits()[rung, list(ladder.modules).index(name)]
    total = torch.zeros(own.b.width, own.a.width, dtype=torch.float64)
    for k, precision in enumerate(bits.tolist()):
        if precision:
            a, b = own.read(k, k + 1, precision, torch.float64)
            total += ladder.scales[rung] * b.T @ a
    return total


def test_an_update_is_the_sum_over_the_directions_of_its_rung(ladder):
    for j, name in [(j, name) for j in range(len(ladder.rungs)) for name in ladder.modules]:
        a, b = ladder.update(name, j, torch.float64)
        assert len(a) == len(b) == int(ladder.rank_table[j, list(ladder.modules).index(name)])
        torch.testing.assert_close(b.T @ a, definition(ladder, name, j), atol=1e-12, rtol=1e-9)


def test_an_update_without_directions_has_the_widths(adapter):
    ladder = coded_ladder(adapter).with_rungs((0, 2))
    a, b = ladder.update("narrow", 0, torch.bfloat16)
    assert (a.shape, b.shape, a.dtype) == ((0, 9), (0, 31), torch.bfloat16)


def test_lost_energy_is_that_of_the_dense_difference(ladder, adapter):
    whole = sum(float(dense(own).square().sum()) for own in adapter.modules.values())
    for j, lost in enumerate(ladder.lost_energy().tolist()):
        missing = sum(
            float((dense(f) - definition(ladder, name, j)).square().sum()) for name, f in adapter.modules.items()
        )
        assert lost == pytest.approx(missing / whole, rel=1e-4, abs=1e-12)


def test_ranges_of_one_rung_are_its_own(ladder):
    for j in range(len(ladder.rungs)):
        for m, ranges in enumerate(ladder.ranges([j])):
            ends = ladder.edges[j, m].tolist()
            wanted = zip(BITS, [0, *ends[:-1]], ends, strict=True)
            assert ranges == [Range(ladder.bank_of[j], bits, a, b) for bits, a, b in wanted if b > a]
            assert sum(map(len, ranges)) == int(ladder.rank_table[j, m])


@given(st.data())
def test_ranges_cover_what_any_active_rung_reads_at_its_format(ladder, data):
    active = data.draw(st.sets(st.integers(0, len(ladder.rungs) - 1), max_size=4))
    bits = ladder.bits()
    for m, ranges in enumerate(ladder.ranges(sorted(active))):
        assert len({(r.bank, r.bits) for r in ranges}) == len(ranges), "one range of a bank and a format"
        read = {(r.bank, r.bits, k) for r in ranges for k in range(r.start, r.stop)}
        needed = {
            (ladder.bank_of[j], precision, k)
            for j in active
            for k, precision in enumerate(bits[j, m].tolist())
            if precision
        }
        assert needed <= read
        for r in ranges:
            ends = {k for bank, precision, k in needed if (bank, precision) == (r.bank, r.bits)}
            assert (r.start, r.stop) == (min(ends), max(ends) + 1), "no more than from the first to the last of them"


def test_bytes_are_those_of_all_directions(ladder):
    bits, nbytes = ladder.bits(), ladder.rung_bytes()
    for j in range(len(ladder.rungs)):
        total = 0
        for m, own in enumerate(ladder.modules.values()):
            read = [precision for precision in bits[j, m].tolist() if precision]
            total += sum(row_bytes(own.a.width, p) + row_bytes(own.b.width, p) for p in read)
        assert int(nbytes[j]) == total
        elements = sum(i + o for i, o, _ in MODULES.values())
        assert float(ladder.mean_rank()[j]) == pytest.approx(total / (2 * elements), rel=1e-6)


def test_memory_of_a_nested_ladder_is_what_its_highest_rung_reads(adapter):
    """One bank: lower rungs read parts of what the higher one reads. The scales of other formats come on top."""
    ladder = coded_ladder(adapter)
    for j, rung in enumerate(ladder.rungs[:-1]):
        held = ladder.up_to(rung)
        others = 0
        for own in held.banks[0].values():
            for rows in (own.a, own.b):
                others += sum(2 * count for bits, count in rows.counts().items() if bits != 16)
        read = int(ladder.rank_table[j].sum()) * 2 * 2
        assert held.resident_bytes() - others == int(ladder.rung_bytes()[j]) - read
        assert others <= 3 * read
        assert not any(own.nbytes for own in held.modules.values()), "nothing of the exact adapter"
    assert ladder.up_to(ladder.rungs[-1]) is ladder
    svd = build_ladder(adapter, (0, 2, 5))
    assert [svd.up_to(rung).resident_bytes() for rung in (0, 2, 5)] == svd.rung_bytes()[:3].tolist()


def test_less_in_memory_reads_the_same_and_is_the_same_ladder(ladder):
    for j, rung in enumerate(ladder.rungs[:-1]):
        held = ladder.up_to(rung)
        assert (held.resident, held.highest, held.rungs) == (j, j, ladder.rungs)
        assert held.fingerprint == ladder.fingerprint
        assert held.up_to(rung) is held
        assert held.up_to(ladder.rungs[0]).fingerprint == ladder.fingerprint
        assert torch.equal(held.rung_bytes(), ladder.rung_bytes())
        for name in ladder.modules:
            for lower in range(j + 1):
                for own, whole in zip(held.update(name, lower), ladder.update(name, lower), strict=True):
                    assert torch.equal(own, whole)
        above = ladder.rungs[j + 1]
        message = rf"rung: expected at most the resident rung {rung}, got {above}; .*resident_rung"
        with pytest.raises(ValueError, match=message):
            held.update("deep", j + 1)
        with pytest.raises(ValueError, match=message):
            held.up_to(above)
        with pytest.raises(ValueError, match=message):
            held.require_resident(j + 1)
        with pytest.raises(ValueError, match=rf"rung: expected at most the resident rung {rung}, got 12; "):
            held.lost_energy()
        assert held.with_rungs(ladder.rungs) is held
        with pytest.raises(
            ValueError, match=r"rungs: expected .*, those of a ladder of which not all is in memory, got"
        ):
            held.with_rungs((1, 2, 3))


def test_what_is_left_out_of_memory_is_freed(adapter):
    ladder = coded_ladder(adapter)
    held = ladder.up_to(1)
    before = {x.untyped_storage().data_ptr() for b in ladder.banks for d in b.values() for x in d.a.parts().values()}
    after = {x.untyped_storage().data_ptr() for b in held.banks for d in b.values() for x in d.a.parts().values()}
    assert not (before & after) - {0}


@pytest.mark.parametrize("rungs", [(), (1,), (0.5, 2), (0, 2), (0,), (0, 0.5, 1, 2, 4), (4, 12)])
@pytest.mark.parametrize("build", [coded_ladder, two_bank_ladder])
def test_a_coded_ladder_has_the_rungs_it_was_built_with_and_none_at_all(rungs, build, adapter):
    ladder = build(adapter)
    ladder = replace(ladder, quality=tuple({"rung": rung, "kl": 1 / (1 + rung)} for rung in ladder.rungs))
    found = ladder.with_rungs(rungs)
    assert found.rungs == tuple(sorted({*rungs, 12}))
    for j, rung in enumerate(found.rungs):
        if rung == 0:
            assert (float(found.rung_bytes()[j]), found.scales[j]) == (0, 1)
            continue
        i = ladder.rung_index(rung)
        assert torch.equal(found.edges[j], ladder.edges[i])
        assert (found.bank_of[j], found.scales[j]) == (ladder.bank_of[i], ladder.scales[i])
        assert 0 in found.rungs or found.quality[j] == ladder.quality[i]
    if 0 in rungs:
        assert found.quality == (), "nobody measured the base model alone"
    assert found.with_rungs((0,)).rungs == (0, 12)


@pytest.mark.parametrize("rungs", [(3,), (0.75, 2)])
def test_a_coded_ladder_has_no_other_rung(rungs, adapter):
    with pytest.raises(ValueError, match=r"rung: expected one of \(0\.5, 1, 2, 4, 12\), got .*; build the ladder with"):
        coded_ladder(adapter).with_rungs(rungs)


def test_an_svd_rung_keeps_its_scale(adapter):
    ladder = replace(build_ladder(adapter, (2, 5)), scales=(1.2, 1.1, 1.0))
    assert ladder.with_rungs((3, 5)).scales == (1.0, 1.1, 1.0)


def test_the_fingerprint_of_svd_is_over_its_table_and_its_adapter_alone(adapter):
    """The formula that policies were saved with: it may not change."""
    ladder = build_ladder(adapter, (0, 2, 5))
    identity = {"kind": "svd", "rungs": [0, 2, 5, 12], "edges": ladder.edges.tolist(), "adapter": ladder.adapter}
    expected = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    assert ladder.fingerprint == expected
    turned = {
        name: Directions(*(wide_rows(-half) for half in own.read(0, own.counts()[0], 16)))
        for name, own in ladder.banks[0].items()
    }
    assert replace(ladder, banks=(turned, ladder.banks[1])).fingerprint == expected, "signs are the machine's"
    assert replace(ladder, scales=(1.0, 1.1, 1.0, 1.0)).fingerprint != expected


def rescaled(bank):
    """The bank with the scales of one factor at another length, its codes as they were."""
    own = bank["deep"].a
    return {**bank, "deep": replace(bank["deep"], a=replace(own, scales=tuple(2 * s for s in own.scales)))}


CHANGES = {
    "kind": lambda own: {"kind": "distilled"},
    "rungs": lambda own: {"rungs": (0.5, 1, 2.5, 4, 12)},
    "edges": lambda own: {"edges": torch.cat([0 * own.edges[:1], own.edges[1:]])},
    "scales": lambda own: {"scales": (1.5, *own.scales[1:])},
    "adapter": lambda own: {"adapter": "another"},
    "the scales of a factor": lambda own: {"banks": (rescaled(own.banks[0]), own.banks[1])},
    "what is written": lambda own: {
        "banks": ({n: Directions(d.b, d.b) if n == "deep" else d for n, d in own.banks[0].items()}, own.banks[1])
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_of_a_coded_ladder_is_over_all_that_makes_its_numbers(change, adapter):
    ladder = coded_ladder(adapter)
    assert coded_ladder(adapter).fingerprint == ladder.fingerprint
    assert replace(ladder, **change(ladder)).fingerprint != ladder.fingerprint
    assert replace(ladder, quality=(), base_model="another").fingerprint == ladder.fingerprint


def test_the_fingerprint_of_a_ranked_ladder_is_over_its_16_bit_directions(adapter):
    ladder = replace(build_ladder(adapter, (2, 5)), kind="ranked")
    own = ladder.banks[0]["deep"]
    other = {**ladder.banks[0], "deep": replace(own, a=wide_rows(-own.a.wide))}
    assert replace(ladder, banks=(other, ladder.banks[1])).fingerprint != ladder.fingerprint


def test_a_whole_rung_has_one_name(adapter):
    ladder = coded_ladder(adapter)
    again = replace(ladder, rungs=[0.5, 1.0, 2.0, 4.0, 12.0])
    assert (again.rungs, again.fingerprint) == (ladder.rungs, ladder.fingerprint)
    assert str(again.rungs) == "(0.5, 1, 2, 4, 12)"


def without(own, name):
    return {"banks": ({n: d for n, d in own.banks[0].items() if n != name}, own.banks[1])}


WRONG = {
    "another kind": (lambda own: {"kind": "mixd"}, "kind: expected one of svd, ranked, mixed, distilled, got 'mixd'"),
    "rungs that fall": (lambda own: {"rungs": (1, 0.5, 2, 4, 12)}, "rungs: expected .* strictly ascending"),
    "rungs that are none": (lambda own: {"rungs": (0.5, 1, 2, math.nan, 12)}, r"rungs\[3\]: expected a rank"),
    "a bank too few": (lambda own: {"bank_of": (0, 0, 0, 1)}, "bank_of: expected a bank for each of 5 rungs"),
    "a bank that is none": (lambda own: {"bank_of": (0, 0, 0, 2, 1)}, "bank_of: expected .* got .* of 2; "),
    "a rung beside the top": (lambda own: {"bank_of": (0, 0, 0, 1, 1)}, "bank_of: .* the last for the top alone"),
    "a top elsewhere": (lambda own: {"bank_of": (0, 0, 0, 1, 0)}, "bank_of: expected .* the last for the top alone"),
    "a scale too few": (lambda own: {"scales": own.scales[1:]}, "scales: expected a positive one for each of 5 rungs"),
    "a scale of the top": (lambda own: {"scales": (*own.scales[:-1], 1.1)}, "scales: expected .*, 1 at the top, got"),
    "a scale that is none": (lambda own: {"scales": (math.nan, *own.scales[1:])}, "scales: expected a positive one"),
    "a scale of 0": (lambda own: {"scales": (0.0, *own.scales[1:])}, "scales: expected a positive one"),
    "quality of some": (lambda own: {"quality": ({},)}, "quality: expected that of all 5 rungs or of none, got 1"),
    "a resident rung beyond": (lambda own: {"resident": 5}, "resident: expected the index of one of 5 rungs"),
    "the top as a resident rung": (lambda own: {"resident": 4}, "resident: expected .* not the top's, got 4"),
    "a resident rung below": (lambda own: {"resident": -1}, "resident: expected .*, got -1"),
    "a part without the whole's sample": (lambda own: {"resident": 1}, "whole: expected a sample of the directions"),
    "edges of another shape": (
        lambda own: {"edges": own.edges[..., :3]},
        r"edges: expected \(5, 3, 4\) torch.int64, \[J, M, F\], got \(5, 3, 3\)",
    ),
    "edges of another type": (lambda own: {"edges": own.edges.int()}, r"edges: expected .*, got .* torch.int32"),
    "edges below 0": (lambda own: {"edges": own.edges - 20}, "edges: expected counts that do not fall over formats"),
    "edges that fall over formats": (lambda own: {"edges": own.edges.flip(2)}, "edges: .* do not fall over"),
    "edges that fall over rungs": (
        lambda own: {"edges": own.edges[[1, 0, 2, 3, 4]]},
        "edges: expected none to fall from rung to rung",
    ),
    "edges beyond the directions": (
        lambda own: {"edges": own.edges + torch.tensor([0, 0, 0, 1])},
        r"edges: expected at most the directions that module \w+ has in bank 0, .*, got",
    ),
    "16 bits of what has fewer": (
        lambda own: {"edges": torch.cat([own.edges[:3], own.edges[4:], own.edges[4:]])},
        r"edges: expected at most the directions that module wide has in bank 0, \[0, 12, 12, 12\] .*, got \[12, ",
    ),
    "a module too few": (lambda own: without(own, "deep"), "banks: expected the 3 modules .* got others in bank 0"),
    "modules in another order": (
        lambda own: {"banks": (dict(reversed(own.banks[0].items())), own.banks[1])},
        "banks: expected the 3 modules of the adapter in its order",
    ),
    "a module of another width": (
        lambda own: {"banks": ({**own.banks[0], "narrow": own.banks[0]["deep"]}, own.banks[1])},
        "banks: expected .* widths, got others in bank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_ladder_that_contradicts_itself_is_refused_in_one_line(change, message, adapter):
    ladder = coded_ladder(adapter)
    with pytest.raises(ValueError, match=message) as error:
        replace(ladder, **change(ladder))
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value)


def test_rungs_that_are_not_in_memory_are_held_to_the_same(adapter):
    held = coded_ladder(adapter).up_to(0.5)
    with pytest.raises(ValueError, match="edges: expected none to fall from rung to rung"):
        replace(held, edges=held.edges[[0, 1, 3, 2, 4]])


def test_a_bank_of_16_and_of_fewer_bits_is_held_to_both(adapter):
    """Some directions at 16 bits, then some at 8: counts are checked format by format."""
    ladder = coded_ladder(adapter)
    bank = {
        name: Directions(*(replace(rows, wide=torch.ones(2, rows.width)) for rows in (own.a, own.b)))
        for name, own in ladder.banks[0].items()
    }
    edges = ladder.edges.clone()
    edges[:, :, 0] = edges[:, :, 0].clamp_min(2).minimum(edges[:, :, 1])
    edges[-1] = ladder.edges[-1]
    both = replace(ladder, banks=(bank, ladder.banks[1]), edges=edges)
    assert {r.bits for r in both.ranges([3])[0]} == {16, 8}
    held = both.up_to(4)
    assert [len(own.a.wide) for own in held.banks[0].values()] == edges[3, :, 0].tolist()
    with pytest.raises(ValueError, match="edges: expected at most the directions that module"):
        replace(both, edges=both.edges + torch.tensor([0, 0, 3, 3]))


def test_the_pack_of_a_test_adapter_is_a_real_one(llama_adapter):
    ladder = coded_ladder(load_adapter(llama_adapter))
    assert ladder.lost_energy().diff().max() < 0
