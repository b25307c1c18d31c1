"""The paged cache as a `transformers.Cache`: what an attention layer writes to and reads from.

This is the plain-PyTorch reference for CPU and GPU. Full pages that lie in order (one sequence, nothing compressed) are
read where they are. Of any others every pass gathers all of a batch into dense keys and values of the model's dtype,
one gather per format and layer; a fused kernel would read the pages where they are. So it saves memory held between
passes, not bytes read in one, and during a layer's attention that layer's keys and values exist once more in full (the
price of running on any `AutoModelForCausalLM`).

One pass: `begin` (host: claim pages, say where everything goes) -> the model's forward, `update` in every layer ->
optionally `add_attention_mass` -> `settle` (pages that left the window get their format, freed memory is returned).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from policy.operating import KVRows
from policy.settings import PAGE_TOKENS

from ...kv import formats
from ...kv.formats import FULL, SPARSE
from .pool import PagePool, device_ids
from .table import PageTable


class PagedLayer(CacheLayerMixin):
    """The pools of one layer, one per format that it has pages in; page numbers come from the shared `PageTable`."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    like: tuple[Tensor, Tensor]
    """Empty tensors [1, H, 0, D] with the heads, channels, dtypes and device of the layer's keys and values."""

    def __init__(self, table: PageTable) -> None:
        super().__init__()
        self.table = table
        self.pools: dict[int, PagePool] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember the layer's shape, dtypes and device; pools follow when they are needed."""
        (_, heads, _, key_width), value_width = key_states.shape, value_states.shape[3]
        self.like = key_states.new_empty(1, heads, 0, key_width), value_states.new_empty(1, heads, 0, value_width)
        self.device = key_states.device
        self.is_initialized = True

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in the model's own dtype."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in self.like)

    def pool(self, code: int) -> PagePool:
        """The pool of one format, created on first need and grown to the capacity of its allocator."""
        capacity = self.table.allocators[code].capacity
        if code not in self.pools:
            parts = formats.blank_pages(code, capacity, *self.like, self.table.kv.sparse_keep)
            self.pools[code] = PagePool(parts)
        self.pools[code].grow(capacity)
        return self.pools[code]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write this pass's states [B, H, T, D] and return all of them, [B, H, S, D]; slots without a token are 0."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("PagedCache: expected a forward pass without gradients; wrap it in torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        made = self.table.passing(key_states.device)
        if (key_states.shape[0], key_states.shape[2]) != (made.batch, made.query_tokens):
            raise ValueError(
                f"PagedCache.update: expected states of {made.batch} rows and {made.query_tokens} tokens as announced "
                f"to begin(), got {key_states.shape[0]} and {key_states.shape[2]}; call begin() once before each pass"
            )
        pool = self.pool(FULL)
        if made.fresh is not None:
            pool.clear(made.fresh)
        # [B, H, T, D] -> [H, B * T, D], the order of made.slots
        tokens = {n: x.transpose(0, 1).flatten(1, 2) for n, x in (("keys", key_states), ("values", value_states))}
        if made.columns is not None:
            tokens = {name: x.index_select(1, made.columns) for name, x in tokens.items()}
        pool.write_tokens(made.slots, tokens)
        if made.dense:
            (read,) = made.reads
            pages = pool.read(read.source) if read.first is None else pool.view(read.first, len(read.source))
            keys, values = pages["keys"], pages["values"]
        else:
            keys, values = (_zero_pages(x, made.batch * made.pages) for x in (key_states, value_states))
            for read in made.reads:
                parts = self.pool(read.code).read(read.source)
                kept = self.table.kept_slots(read.source) if read.code == SPARSE else None
                decoded = formats.decode(read.code, parts, (keys.dtype, values.dtype), kept)
                keys.index_copy_(1, read.target, decoded[0])
                values.index_copy_(1, read.target, decoded[1])
        return _as_rows(keys, made.batch), _as_rows(values, made.batch)

    def convert(self, code: int, source: Tensor, target: Tensor) -> None:
        """Store the full pages `source` as pages `target` of format `code`."""
        source, target = device_ids(source, self.device), device_ids(target, self.device)
        pages = self.pools[FULL].read(source)
        kept = self.table.kept_slots(target) if code == SPARSE else None
        self.pool(code).write(target, formats.encode(code, pages["keys"], pages["values"], kept))

    def select(self, table: PageTable, sources: dict[int, Tensor]) -> PagedLayer:
        """A copy that holds exactly the pages `sources` of each format, in that order."""
        other = PagedLayer(table)
        if self.is_initialized:
            other.like, other.device, other.is_initialized = self.like, self.device, True
            for code, ids in sources.items():
                if code in self.pools:
                    other.pools[code] = PagePool(self.pools[code].read(device_ids(ids, self.device)))
        return other

    def get_seq_length(self) -> int:
        return max(self.table.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.table.slots, 0

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """Mixed-precision KV cache of 16-token pages, aligned in each row to its first real token.

    `kv` says of every row what may become of its pages; one row stands for all of them.
    """

    layers: list[PagedLayer]  # type: ignore[assignment]

    def __init__(self, kv: KVRows) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self.table = PageTable(kv)
        self.seen_columns = 0
        """Input columns processed so far, padding included; kept by the caller, reported by `get_seq_length`."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, those of the present pass included."""
        return self.table.lengths

    def begin(self, positions: Tensor, device: torch.device | None = None) -> None:
        """Announce the tokens of the coming pass and claim their pages, for all layers at once.

        positions: int64 [B, T], row-relative, consecutive and ascending in a row, -1 for padding. `device` is the
        model's, by default that of `positions`; positions on the host together with `device` avoid a sync. Raises
        ValueError when a row does not go on where it ended.
        """
        # "cuda" becomes "cuda:0", as tensors report it
        self.table.begin(positions, torch.empty(0, device=device or positions.device).device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's states [B, H, T, D] of this pass; returns its keys and values [B, H, S, D]."""
        while len(self.layers) <= layer_idx:
            self.layers.append(PagedLayer(self.table))
        return self.layers[layer_idx].update(key_states, value_states)

    def visible(self) -> Tensor:
        """bool [B, S]: the slot holds a live token; false where unwritten, dropped, or not kept by a sparse page."""
        return self.table.visible()

    def add_attention_mass(self, mass: Tensor) -> None:
        """Add the attention that each slot received in this pass, [B, S] (or fewer slots), for `sparse` pages."""
        self.table.add_mass(mass)

    @torch.no_grad()
    def settle(self, complexity: Tensor, positions: Tensor) -> None:
        """Take in the complexity of the pass just made, [B, T] at positions [B, T] (-1 = padding), and give every page
        that has left the window its format, once, from the mean complexity of its 16 tokens.

        Sink pages and the last `window_tokens` tokens of a row stay in the model's dtype.
        """
        if self.kv.is_full:
            return
        self.table.add_complexity(complexity, positions)
        freed = []
        for code, (rows, pages) in self.table.choose().items():
            if code == FULL:
                continue
            source, target = self.table.assign(code, rows, pages)
            freed.append(source)
            if target is not None:
                for layer in self._stored():
                    layer.convert(code, source, target)
        moves = self.table.release(torch.cat(freed)) if freed else None
        if moves is None:
            return
        capacity, sources, targets = moves
        for layer in self._stored():
            layer.pools[FULL].compact(capacity, device_ids(sources, layer.device), device_ids(targets, layer.device))

    def page_formats(self) -> Tensor:
        """int8 [B, P] on the host: each page's index into `FORMATS`; "none" beyond the end of a row."""
        return self.table.formats.clone()

    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the tokens held, each in its page's format, scales included.

        Of a page in the model's own dtype only the tokens in it count, so it never exceeds `kv_bytes_full`; the room
        around them is in `kv_bytes_allocated`.
        """
        paged = {code: allocator.used for code, allocator in self.table.allocators.items() if code != FULL}
        whole = sum(self.lengths) - PAGE_TOKENS * self.table.settled_away()
        total = 0
        for layer in self._stored():
            total += layer.token_bytes * whole
            total += sum(layer.pools[code].page_bytes * used for code, used in paged.items() if used)
        return total

    def kv_bytes_allocated(self) -> int:
        """Bytes of all tensors held: pools of all layers with slack and scales, page table and index tensors."""
        held = [part for layer in self.layers for pool in layer.pools.values() for part in pool.parts.values()]
        held += self.table.tensors()
        storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in held}
        return sum(storages.values())

    def kv_bytes_full(self) -> int:
        """Bytes that the same tokens take unpaged in the model's dtype, every row at its own length."""
        return sum(layer.token_bytes for layer in self._stored()) * sum(self.lengths)

    def select_rows(self, index: Tensor) -> PagedCache:
        """An independent copy with the rows `index`, int64 [rows], repeats allowed: branches share no memory."""
        # A sync on a GPU: the copy's page numbers are host data.
        table, sources = self.table.select([int(row) for row in index.tolist()])
        other = copy.copy(self)  # a subclass stays what it is
        other.table, other.kv = table, table.kv
        other.layers = [layer.select(table, sources) for layer in self.layers]
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.table.slots, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.layers, self.table, self.seen_columns = [], PageTable(self.kv), 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("PagedCache: cannot remove tokens, a converted page has no way back; start a new one")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("PagedCache: expected greedy search or sampling, got beam search; set num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("PagedCache: rows cannot be repeated in place; use the copy that select_rows returns")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("PagedCache: rows cannot be selected in place; use the copy that select_rows returns")

    def _stored(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if layer.is_initialized]


def _zero_pages(like: Tensor, pages: int) -> Tensor:
    return like.new_zeros(like.shape[1], pages, PAGE_TOKENS, like.shape[3])


def _as_rows(pages: Tensor, batch: int) -> Tensor:
    """[H, B * P, 16, D] -> [B, H, S, D], a view."""
    heads, _, _, width = pages.shape
    return pages.view(heads, batch, -1, width).transpose(0, 1)
