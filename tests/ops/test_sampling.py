"""The kernels that choose tokens against plain PyTorch, and plain PyTorch against transformers' own processors."""

from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl
from transformers.generation import logits_process as hf

from runtime.control import signals
from runtime.engine.lanes import over_rows
from runtime.ops.reference import sampling as reference
from runtime.ops.reference.sampling import Generated, Sampling, SamplingRows
from runtime.ops.sampling import SamplingScratch, _gumbel, sample, uniforms

WARM = Sampling(temperature=0.8)
SETTINGS = {
    "greedy": Sampling(),
    "greedy, penalty": Sampling(penalty=1.5),
    "greedy, filters off": Sampling(top_k=2, top_p=0.1, min_p=0.9),
    "temperature": WARM,
    "hot": Sampling(temperature=100.0),
    "cold": Sampling(temperature=1e-6),
    "reward": replace(WARM, penalty=0.7),
    "top-k 1": replace(WARM, top_k=1),
    "top-k": replace(WARM, top_k=4),
    "top-k of more than there are": replace(WARM, top_k=2**31 - 1),
    "top-p": replace(WARM, top_p=0.7),
    "top-p 0": replace(WARM, top_p=0.0),
    "min-p": replace(WARM, min_p=0.3),
    "min-p 1": replace(WARM, min_p=1.0),
    "top-p, then min-p": replace(WARM, top_p=0.7, min_p=0.3),
    "all": Sampling(temperature=1.7, top_k=12, top_p=0.8, min_p=0.05, penalty=1.3, seed=2**63 - 1),
}
FORMULAS = {"top_k": hf.TopKLogitsWarper, "top_p": hf.TopPLogitsWarper, "min_p": hf.MinPLogitsWarper}
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def made_logits(rows: int, vocabulary: int, device: torch.device, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """[B, V] float32, a part of wider rows that are NaN elsewhere."""
    wide = torch.full((rows, vocabulary + 3), torch.nan, device=device)
    own = spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return wide[:, :vocabulary].copy_(own)


def made_rows(device: torch.device, *settings: Sampling) -> SamplingRows:
    rows = SamplingRows.of(len(settings), device)
    for row, setting in enumerate(settings):
        rows.set(row, setting)
    return rows


def made_generated(rows: int, vocabulary: int, device: torch.device, capacity: int = 9) -> Generated:
    """Rows of different lengths with a third of the vocabulary, what is only written poisoned."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    generated = Generated.of(rows, vocabulary, capacity, torch.tensor([], dtype=torch.int64, device=device))
    generated.seen.copy_(2 * (torch.rand(rows, vocabulary, generator=generator) < 1 / 3))
    generated.count.copy_(torch.arange(rows) % capacity)
    generated.log.fill_(-7)
    generated.tokens.fill_(-7)
    return generated


def cloned(generated: Generated) -> Generated:
    return Generated(**{field.name: getattr(generated, field.name).clone() for field in fields(generated)})


def step(logits: torch.Tensor, rows: SamplingRows, generated: Generated) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and surprisal, with all that the kernels must write themselves poisoned."""
    entropy, surprisal = torch.full((2, len(logits)), torch.nan, device=logits.device)
    scratch = SamplingScratch.of(*logits.shape, logits.device)
    for name in ("found", "scaled", "noisy"):
        getattr(scratch, name).fill_(torch.nan)
    scratch.winner.fill_(-(2**30))
    sample(logits, rows, generated, entropy, surprisal, scratch)
    return entropy, surprisal


def check_step(logits: torch.Tensor, rows: SamplingRows, generated: Generated) -> None:
    """One step of the kernels on `generated` equals one of plain PyTorch, tokens and books exactly."""
    expected, before = cloned(generated), cloned(generated)
    noise = uniforms(rows.seed, generated.count, logits.shape[1])
    entropy, surprisal = torch.empty(2, len(logits), device=logits.device)
    reference.sample(logits, rows, expected, noise, entropy, surprisal)
    got_entropy, got_surprisal = step(logits, rows, generated)
    for field in fields(Generated):
        assert torch.equal(getattr(generated, field.name), getattr(expected, field.name)), field.name
    chosen = torch.where(before.ended != 0, -1, generated.tokens)
    exact = logits.double().log_softmax(-1).clamp(min=torch.finfo(torch.float32).min)
    live = chosen >= 0
    check_error(got_entropy, entropy, signals.next_token_entropy(exact))
    check_error(got_surprisal[live], surprisal[live], signals.surprisal(exact, chosen)[live])


def check_error(got: torch.Tensor, torch_float32: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice PyTorch's own error, or four roundings of numbers up to 1."""
    allowed = max(2 * (torch_float32 - exact).abs().max().item(), 2.0**-22) if len(got) else 0.0
    assert ((got - exact).abs() <= allowed).all(), (got, exact)


def by_transformers(logits: torch.Tensor, seen: torch.Tensor, setting: Sampling) -> torch.Tensor:
    """One row [V] through transformers' processors, in the order of `GenerationMixin._get_logits_processor`."""
    ids = seen.nonzero()[:, 0][None]
    scores = hf.RepetitionPenaltyLogitsProcessor(setting.penalty)(ids, logits[None])
    if setting.temperature > 0:
        scores = hf.TemperatureLogitsWarper(setting.temperature)(ids, scores)
        for name, formula in FORMULAS.items():
            value = getattr(setting, name)
            scores = formula(value)(ids, scores) if value != OFF[name] else scores
    return scores[0]


@pytest.mark.parametrize("vocabulary", [2, 5, 63, 1000])
def test_the_reference_is_what_transformers_does(vocabulary, device):
    settings = list(SETTINGS.values())
    logits = made_logits(len(settings), vocabulary, device)
    logits[1:, 1] = -torch.inf
    seen = made_generated(*logits.shape, device).seen
    got = reference.process(logits, seen, made_rows(device, *settings))
    for row, setting in enumerate(settings):
        expected = by_transformers(logits[row], seen[row], setting)
        assert torch.equal(got[row].isinf(), expected.isinf()), setting
        torch.testing.assert_close(got[row], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("vocabulary", [2, 5, 63, 100, 1000, 5000])
def test_rows_of_one_batch_differ(vocabulary, rows, device):
    settings = [SETTINGS[name] for name in ("all", "greedy, penalty", "top-p")[:rows]]
    generated = made_generated(rows, vocabulary, device)
    check_step(made_logits(rows, vocabulary, device), made_rows(device, *settings), generated)


@pytest.mark.parametrize("content", ["spread", "ties", "ruled out"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter(name, content, device):
    logits = made_logits(5, 63, device, spread=0.7)
    if content == "ties":
        # 0.0 and -0.0 among them, which are equal
        logits.copy_((2 * logits).round())
    if content == "ruled out":
        logits[:, ::3] = -torch.inf
    rows = made_rows(device, *[replace(SETTINGS[name], seed=row) for row in range(5)])
    check_step(logits, rows, made_generated(5, 63, device))


def test_of_equal_logits_greedy_takes_the_first(device):
    logits = made_logits(2, 5000, device)
    logits[:, [4500, 3000, 2999]] = 50.0
    generated = made_generated(2, 5000, device)
    generated.seen.zero_()
    check_step(logits, SamplingRows.of(2, device), generated)
    assert generated.tokens.tolist() == [2999, 2999]


@pytest.mark.parametrize("name", ["top-k", "top-p", "all"])
def test_thresholds_are_found_far_below_the_largest_logit(name, device):
    logits = made_logits(6, 100, device)
    logits[:3] -= 1000
    logits[3:] *= 1e-20
    logits[::3, :99] -= 50
    logits[2::3, 3:] = -torch.inf
    rows = made_rows(device, *[replace(SETTINGS[name], seed=row) for row in range(6)])
    check_step(logits, rows, made_generated(6, 100, device))


@pytest.mark.parametrize("name", ["top-k 1", "top-k", "top-p"])
def test_thresholds_tell_neighbouring_numbers_apart(name, device):
    setting = replace(SETTINGS[name], temperature=1.0)
    logits = 1 + 2.0**-23 * torch.stack([torch.randperm(11, device=device) for _ in range(6)])
    rows = made_rows(device, *[replace(setting, seed=row) for row in range(6)])
    check_step(logits, rows, made_generated(6, 11, device))


def test_many_steps_with_what_they_leave_behind(device):
    settings = [replace(SETTINGS[name], penalty=1.9) for name in ("greedy", "temperature", "top-p")]
    generated = made_generated(3, 63, device)
    for index in range(4):
        check_step(made_logits(3, 63, device, seed=index, spread=0.5), made_rows(device, *settings), generated)


def test_a_row_draws_the_same_wherever_it_is(device):
    settings = [replace(SETTINGS[name], seed=7) for name in ("temperature", "top-k", "all")]
    logits, generated = made_logits(3, 63, device), made_generated(3, 63, device)
    together, again = cloned(generated), cloned(generated)
    step(logits, made_rows(device, *settings), together)
    step(logits, made_rows(device, *settings), again)
    assert torch.equal(together.tokens, again.tokens)
    for row, setting in enumerate(settings):
        own = {f.name: getattr(generated, f.name) for f in fields(Generated)}
        alone = Generated(**{name: x if name == "ends" else x[row : row + 1].clone() for name, x in own.items()})
        step(logits[row : row + 1], made_rows(device, setting), alone)
        assert alone.tokens.item() == together.tokens[row].item()


def test_every_seed_position_and_token_has_a_number_of_its_own(device):
    seeds = torch.tensor([0, 0, 1, 2**32, 2**62], device=device)
    counts = torch.tensor([0, 1, 0, 0, 2**20], dtype=torch.int32, device=device)
    numbers = uniforms(seeds, counts, 3000)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    # 15000 of 2**24 numbers or more: about 7 pairs are equal
    assert len(numbers.unique()) > 14_950
    # a standard error is 0.0053 in each row
    assert ((numbers.mean(1) - 0.5).abs() < 0.02).all()
    assert torch.equal(uniforms(seeds[3:], counts[3:], 100), numbers[3:, :100])


DRAWN = torch.tensor([0.5, -0.5, 1.0, 0.1, -2.0])


def check_frequencies(tokens: torch.Tensor, setting: Sampling) -> None:
    expected = len(tokens) * by_transformers(DRAWN, torch.zeros(5), setting).softmax(-1)
    counted = tokens.cpu().bincount(minlength=5)
    kept = expected > 0
    assert (counted[~kept] == 0).all()
    # chi-square of at most 4 degrees of freedom is above 18.5 once in 1000 times
    assert ((counted - expected)[kept] ** 2 / expected[kept]).sum() < 18.5


def test_draws_follow_the_distribution(device):
    setting = Sampling(temperature=1.3, seed=3)
    generated = made_generated(80, 5, device)
    generated.count.copy_(torch.arange(80))
    step(DRAWN.to(device).repeat(80, 1), made_rows(device, *[setting] * 80), generated)
    check_frequencies(generated.tokens, setting)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.25}])
def test_many_draws_of_the_reference_follow_the_distribution(filters, device):
    setting, draws = Sampling(temperature=1.3, **filters), 10_000
    row = made_rows(device, setting)
    noise = uniforms(row.seed, row.top_k * 0, 5 * draws).view(draws, 5)
    scores = reference.process(DRAWN.to(device)[None], torch.zeros(1, 5, device=device), row)
    check_frequencies((scores + reference.gumbel(noise)).argmax(-1), setting)


def test_rows_end_and_go_on_with_their_pad(device):
    logits = made_logits(4, 63, device)
    logits[:, 40] = torch.tensor([50.0, -50.0, 50.0, 50.0])
    generated = made_generated(4, 63, device)
    generated = replace(generated, ends=torch.tensor([3, 40], device=device))
    # a pad that is no token must not be marked either
    generated.pad.copy_(torch.tensor([60, 61, 62, 10**6]))
    generated.ended[3] = 1
    rows = SamplingRows.of(4, device)
    check_step(logits, rows, generated)
    assert generated.ended.tolist() == [1, 0, 1, 1]
    assert generated.tokens[[0, 2, 3]].tolist() == [40, 40, 10**6]
    check_step(logits, rows, generated)
    assert generated.tokens[[0, 2, 3]].tolist() == [60, 62, 10**6]


def test_tokens_that_are_given_are_taken(device):
    """Rows: two tokens to go, the last one, none, none from the start, and one that has ended."""
    settings = [SETTINGS[name] for name in ("greedy", "all", "top-k", "greedy, penalty", "temperature")]
    logits, rows = made_logits(5, 63, device), made_rows(device, *settings)
    logits[0, 50] = -torch.inf
    made = made_generated(5, 63, device)
    made.count.fill_(2)
    made.ended[4] = 1
    free, noise = cloned(made), uniforms(rows.seed, made.count, 63)
    entropy, unforced = step(logits, rows, free)
    made.given.copy_(torch.tensor([4, 3, 2, 0, 9]))
    made.log[0, 2], made.log[1, 2], made.log[4, 2] = 50, 62, 61
    made.seen[0, 50] = 0
    for ends in ([], [50]):
        taken = replace(cloned(made), ends=torch.tensor(ends, dtype=torch.int64, device=device))
        again = cloned(taken)
        check_step(logits, rows, taken)
        assert taken.tokens[:2].tolist() == [50, 62]
        assert torch.equal(taken.tokens[2:], free.tokens[2:])
        assert taken.seen[0, 50]
        assert taken.log[0, :4].tolist() == [-7, -7, 50, -7]
        assert taken.ended.tolist() == [len(ends), 0, 0, 0, 1]
        found, surprisal = step(logits, rows, again)
        assert torch.equal(found, entropy)
        assert surprisal[0] == 1
        assert torch.equal(surprisal[2:], unforced[2:])
        _, by_reference = signals_out = torch.empty(2, 5, device=device)
        reference.sample(logits, rows, replace(cloned(made), ends=taken.ends), noise, *signals_out)
        assert (by_reference[4] - unforced[4]).abs() < 1e-5


def test_the_last_token_that_a_log_holds_may_be_given(device):
    made = made_generated(2, 5, device, capacity=3)
    made.count.fill_(2)
    made.given.fill_(3)
    made.log[:, 2] = torch.tensor([4, 1])
    logits = made_logits(2, 5, device)
    check_step(logits, SamplingRows.of(2, device), made)
    assert made.tokens.tolist() == [4, 1]
    check_step(logits, SamplingRows.of(2, device), made)
    assert made.tokens.tolist() == logits.argmax(-1).tolist()


def test_a_row_that_was_interrupted_goes_the_same_way(device):
    """Over tokens that are given whatever the logits are: what follows is drawn as if nothing had happened."""
    rows = made_rows(device, *[replace(SETTINGS["all"], seed=row) for row in range(3)])
    steps = [made_logits(3, 63, device, seed=index, spread=0.5) for index in range(6)]
    first = made_generated(3, 63, device)
    first.count.zero_()
    again = cloned(first)
    for logits in steps:
        step(logits, rows, first)
    again.log[:, :4] = first.log[:, :4]
    again.given.copy_(torch.tensor([4, 2, 0]))
    for index, logits in enumerate(steps):
        for row, given in enumerate((4, 2, 0)):
            if index < given:
                logits[row] = torch.nan
        step(logits, rows, again)
    again.given.zero_()
    for field in fields(Generated):
        assert torch.equal(getattr(again, field.name), getattr(first, field.name)), field.name


def one_row(record, row):
    """A batch of this row alone, in the same memory."""
    own = over_rows(lambda tensor: tensor[row : row + 1], record)
    return replace(own, ends=record.ends) if isinstance(record, Generated) else own


def test_a_row_of_a_batch_alone(device):
    settings = [SETTINGS[name] for name in ("all", "greedy, penalty", "top-p", "temperature", "min-p")]
    logits, rows = made_logits(5, 63, device), made_rows(device, *settings)
    before = replace(made_generated(5, 63, device), ends=torch.tensor([3], device=device))
    before.given[3], before.log[3, 3] = 4, 3
    together = cloned(before)
    found = torch.stack(step(logits, rows, together))
    for row in range(5):
        own, other = cloned(before), torch.arange(5) != row
        scratch = SamplingScratch.of(5, 63, device)
        for part in fields(scratch):
            getattr(scratch, part.name).fill_(-5)
        signals_out = torch.full((2, 5), torch.nan, device=device)
        alone = signals_out[:, row : row + 1]
        sample(logits[row : row + 1], one_row(rows, row), one_row(own, row), *alone, one_row(scratch, row))
        assert torch.equal(signals_out[:, row], found[:, row])
        assert signals_out[:, other].isnan().all()
        assert torch.equal(own.ends, before.ends)
        for part in fields(Generated):
            after, kept, both = (getattr(made, part.name) for made in (own, before, together))
            if part.name != "ends":
                assert torch.equal(after[row], both[row]), part.name
                assert torch.equal(after[other], kept[other]), part.name
        for part in fields(scratch):
            assert (getattr(scratch, part.name)[other] == -5).all(), part.name
        by_reference = cloned(before)
        noise = uniforms(rows.seed, by_reference.count, 63)[row : row + 1]
        reference.sample(
            logits[row : row + 1], one_row(rows, row), one_row(by_reference, row), noise,
            *torch.empty(2, 1, device=device),
        )  # fmt: skip
        for part in fields(Generated):
            assert torch.equal(getattr(by_reference, part.name), getattr(own, part.name)), part.name


def test_nothing_is_written_beyond_the_log(device):
    logits, generated = made_logits(3, 5, device), made_generated(3, 5, device, capacity=4)
    guarded = torch.full((20,), -7, device=device)
    generated = replace(generated, log=guarded[:12].view(3, 4))
    generated.count.copy_(torch.tensor([3, 4, 1000]))
    for _ in range(2):
        step(logits, SamplingRows.of(3, device), generated)
    assert guarded[3] == logits[0].argmax()
    assert (guarded.cpu() != -7).nonzero()[:, 0].tolist() == [3]
    assert generated.count.tolist() == [5, 6, 1002]


@pytest.mark.parametrize("spread", [0.0, 1.0, 300.0])
def test_signals_are_those_of_the_controller(spread, device):
    logits = made_logits(4, 3000, device, spread=spread)
    logits[1, :2500] = -torch.inf
    logits[2] -= 1e4
    logits[3, 1:] = -torch.inf
    generated = made_generated(4, 3000, device)
    rows = made_rows(device, *[replace(WARM, temperature=3.0, penalty=1.8, seed=row) for row in range(4)])
    check_step(logits, rows, generated)


@pytest.mark.parametrize("name", ["greedy", "temperature", "all"])
def test_of_logits_that_are_no_numbers_comes_a_token(name, device):
    logits, generated = made_logits(3, 63, device), made_generated(3, 63, device)
    logits[0], logits[1] = torch.nan, -torch.inf
    found = step(logits, made_rows(device, *[SETTINGS[name]] * 2, SETTINGS["greedy"]), generated)
    assert ((generated.tokens >= 0) & (generated.tokens < 63)).all()
    assert generated.tokens[2] == logits[2].argmax()
    assert torch.stack(found).isfinite().all()


def test_only_rows_that_filter_are_stored(device):
    settings = [SETTINGS[name] for name in ("greedy, filters off", "temperature", "min-p")]
    scratch = SamplingScratch.of(3, 63, device)
    scratch.scaled.fill_(torch.nan)
    signals_out = torch.empty(2, 3, device=device)
    rows, generated = made_rows(device, *settings), made_generated(3, 63, device)
    sample(made_logits(3, 63, device), rows, generated, *signals_out, scratch)
    assert scratch.scaled.isnan().all(1).tolist() == [True, True, False]


@triton.jit
def _noise(uniform, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, _gumbel(tl.load(uniform + at)))


def test_noise_is_exact_where_it_is_large(device):
    uniform = torch.logspace(-10, 0, 1024, device=device).clamp(max=1 - 2.0**-24)
    uniform[0] = 0
    out = torch.full_like(uniform, torch.nan)
    _noise[(1,)](uniform, out, N=1024)
    exact = -(-(-uniform.double().clamp(min=2.0**-32)).log1p()).log()
    # where 0.01 takes over from the series, a rounding of 1 - u is 2**-24 / 0.01 of u
    assert ((out - exact).abs() < 1e-5).all()
    assert ((out - exact).abs() < 4e-6)[uniform < 0.01].all()
    torch.testing.assert_close(reference.gumbel(uniform), exact.float(), rtol=1e-6, atol=1e-6)


def test_a_row_is_set_and_no_other(device):
    rows = SamplingRows.of(3, device)
    rows.set(1, SETTINGS["all"])
    for field in fields(rows):
        values = getattr(rows, field.name)
        assert values[1].item() == pytest.approx(getattr(SETTINGS["all"], field.name))
        assert values[[0, 2]].tolist() == [getattr(Sampling(), field.name)] * 2


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "a number in [0, 1e+06]"),
        ("temperature", 1e-9, "0, or 1e-06 at least"),
        ("temperature", float("nan"), "a number in"),
        ("top_k", -1, "a whole number in [0, 2147483647]"),
        ("top_k", 2.0, "a whole number"),
        ("top_p", 1.1, "a number in [0, 1]"),
        ("min_p", -0.1, "a number in [0, 1]"),
        ("penalty", 0.0, "a number in [1e-06, 1e+06]"),
        ("seed", 2**63, "a whole number in"),
    ],
)
def test_what_is_out_of_limits_is_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"^sampling.{name}: expected .*got") as refusal:
        Sampling(**{name: value})
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
