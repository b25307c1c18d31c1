"""Page formats by plain loops in fp64 and Python, as the reference for the tests, and a driver that feeds a cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy.operating import KVRows
from policy.settings import PAGE_TOKENS, KVSettings
from runtime.kv import FORMATS
from runtime.reference.pages import PagedCache

CODE_MAX = {"int8": 127, "int4": 7, "sparse": 127}
# Every finite non-negative bf16 number, ascending.
BF16 = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double()


def naive_scale(largest: float, code_max: int) -> float:
    """The first bf16 number that is large enough."""
    return BF16[int((BF16 * code_max >= largest).nonzero()[0])].item()


def naive_group(group: Tensor, code_max: int, dtype: torch.dtype) -> Tensor:
    """What a group that shares a scale reads back as."""
    scale = naive_scale(group.double().abs().max().item(), code_max)
    if scale == 0:
        return torch.zeros(group.shape, dtype=dtype)
    # fp32 division, as specified; Python's round() also rounds halves to even
    codes = [round(quotient) for quotient in (group.float() / torch.tensor(scale, dtype=torch.float32)).tolist()]
    assert max(map(abs, codes)) <= code_max
    return torch.tensor([code * scale for code in codes], dtype=torch.float64).to(dtype)


def naive_page(name: str, keys: Tensor, values: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """One page, [H, 16, D] each, after a round trip through the format."""
    if name == "full":
        return keys, values
    out_keys, out_values = torch.zeros_like(keys), torch.zeros_like(values)
    if name == "dropped":
        return out_keys, out_values
    slots = kept if name == "sparse" else list(range(PAGE_TOKENS))
    for head in range(keys.shape[0]):
        for channel in range(keys.shape[2]):
            group = keys[head, slots, channel]
            out_keys[head, slots, channel] = naive_group(group, CODE_MAX[name], keys.dtype)
        for slot in slots:
            out_values[head, slot] = naive_group(values[head, slot], CODE_MAX[name], values.dtype)
    return out_keys, out_values


def naive_kept(mass: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(mass)), key=lambda slot: (mass[slot], slot), reverse=True)[:keep])


@dataclass
class Feed:
    """Feeds random states to a cache and remembers all of them, to say what the cache must return."""

    kv: KVSettings | list[KVSettings]
    """Of every row, or one for all of them."""
    rows: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    shapes: tuple[tuple[int, int, int], ...] = ((1, 8, 8), (2, 5, 7))
    """Per layer: KV heads, key channels, value channels."""
    seed: int = 0
    cache: PagedCache = field(init=False)

    def __post_init__(self) -> None:
        self.by_row = self.kv if isinstance(self.kv, list) else [self.kv] * self.rows
        self.cache = PagedCache(KVRows.of(self.by_row))
        self.rng = torch.Generator().manual_seed(self.seed)
        self.states = [
            [
                (torch.zeros(h, 0, dk, dtype=self.dtype), torch.zeros(h, 0, dv, dtype=self.dtype))
                for _ in range(self.rows)
            ]
            for h, dk, dv in self.shapes
        ]
        self.complexity = torch.zeros(self.rows, 0)
        self.mass = torch.zeros(self.rows, 0)
        self.pages: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    @property
    def lengths(self) -> list[int]:
        return [keys.shape[1] for keys, _ in self.states[0]]

    def random(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.rng)
        # a large channel and a large token, as trained models have them
        return (x * torch.where(torch.rand(shape, generator=self.rng) < 0.05, 20, 1)).to(self.dtype)

    def append(self, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
        """One pass with `counts` new tokens per row, left-padded: what each layer's update returned."""
        width = max(counts)
        positions = torch.full((self.rows, width), -1)
        for row, (count, length) in enumerate(zip(counts, self.lengths, strict=True)):
            positions[row, width - count :] = torch.arange(length, length + count)
        self.cache.begin(positions.to(self.device))
        self.positions = positions
        returned = []
        for layer, (heads, key_width, value_width) in enumerate(self.shapes):
            keys, values = (
                self.random(self.rows, heads, width, key_width),
                self.random(self.rows, heads, width, value_width),
            )
            for row, count in enumerate(counts):
                old = self.states[layer][row]
                new = keys[row, :, width - count :], values[row, :, width - count :]
                self.states[layer][row] = torch.cat((old[0], new[0]), 1), torch.cat((old[1], new[1]), 1)
            # padding must never get in
            keys[(positions < 0)[:, None, :, None].expand_as(keys)] = torch.nan
            values[(positions < 0)[:, None, :, None].expand_as(values)] = torch.nan
            out = self.cache.update(keys.to(self.device), values.to(self.device), layer, cache_position=None)
            returned.append((out[0].cpu(), out[1].cpu()))
        return returned

    def settle(self) -> None:
        """Random attention mass and complexity for all tokens so far, then `settle`."""
        slots = self.cache.visible().shape[1]
        more = slots - self.complexity.shape[1]
        fresh = torch.rand(self.rows, more, generator=self.rng)
        self.complexity = torch.cat((self.complexity, fresh.round() * 0.8 + 0.1), 1)
        # few distinct values, so that ties occur
        mass = torch.randint(0, 4, (self.rows, slots), generator=self.rng).float()
        self.mass = torch.nn.functional.pad(self.mass, (0, slots - self.mass.shape[1])) + mass
        self.cache.add_attention_mass(mass.to(self.device))
        before = self.cache.page_formats()
        fresh = self.complexity.gather(1, self.positions.clamp(min=0))
        self.cache.settle(fresh.to(self.device), self.positions.to(self.device))
        self.frozen_mass = getattr(self, "frozen_mass", {})
        for row, page in (before != self.cache.page_formats()).nonzero().tolist():
            at = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            self.frozen_mass[row, page] = self.mass[row, at].tolist()

    def kept(self, row: int, page: int) -> list[int]:
        return naive_kept(self.frozen_mass[row, page], self.by_row[row].sparse_keep)

    def expected(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the layer's update must return: [B, H, S, D] keys and values, by the page formats before this pass."""
        formats = self.cache.page_formats()
        heads, key_width, value_width = self.shapes[layer]
        slots = formats.shape[1] * PAGE_TOKENS
        keys = torch.zeros(self.rows, heads, slots, key_width, dtype=self.dtype)
        values = torch.zeros(self.rows, heads, slots, value_width, dtype=self.dtype)
        for row, length in enumerate(self.lengths):
            for page, code in enumerate(formats[row].tolist()):
                name, start = FORMATS[code], page * PAGE_TOKENS
                end = min(length, start + PAGE_TOKENS)
                if name == "none":
                    continue
                if name == "full":
                    keys[row, :, start:end] = self.states[layer][row][0][:, start:end]
                    values[row, :, start:end] = self.states[layer][row][1][:, start:end]
                    continue
                if (layer, row, page) not in self.pages:
                    kept = self.kept(row, page) if name == "sparse" else []
                    pair = (x[:, start:end] for x in self.states[layer][row])
                    self.pages[layer, row, page] = naive_page(name, *pair, kept)
                keys[row, :, start:end], values[row, :, start:end] = self.pages[layer, row, page]
        return keys, values

    def expected_visible(self) -> Tensor:
        formats = self.cache.page_formats()
        visible = torch.zeros(self.rows, formats.shape[1] * PAGE_TOKENS, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            for slot in range(length):
                page = slot // PAGE_TOKENS
                name = FORMATS[formats[row, page]]
                kept = name != "sparse" or slot % PAGE_TOKENS in self.kept(row, page)
                visible[row, slot] = name != "dropped" and kept
        return visible

    def check(self, returned: list[tuple[Tensor, Tensor]]) -> None:
        """Bit for bit: what was returned is what the loops say."""
        assert torch.equal(self.cache.visible().cpu(), self.expected_visible())
        for layer, (keys, values) in enumerate(returned):
            expected = self.expected(layer)
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
