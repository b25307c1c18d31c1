"""How 16 tokens of one layer's keys and values are written in fewer bits, and read back.

Symmetric rounding with one bf16 scale per group. Keys share a scale per channel of a page, because a few key channels
are large for every token and would spend the levels of all others; values have no such channels and share a scale per
token, so that one token's outlier costs no neighbour (KIVI, arXiv 2402.02750). With 16 tokens a page and 64 channels a
head, int8 takes 9 bits a key value and 8.25 bits a value, int4 5 and 4.25. Codes are symmetric (no zero point) so that
an attention kernel can apply the scales outside its inner product.

Pure functions without state; `runtime.kv.pool` owns the memory. Shapes: H KV heads, N pages, T tokens of a page
(16, or `sparse_keep`), D channels. The page axis is always the second one, so that gathering pages yields
[H, N * T, D], which is a batch of rows [B, H, S, D] after a transpose that copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ..packing import pack, unpack

FORMATS = ("none", "full", "int8", "int4", "sparse", "dropped")
"""What a page can be, in the order of the codes of a page table; `none` is a page that does not exist (yet)."""

NONE, FULL, INT8, INT4, SPARSE, DROPPED = range(len(FORMATS))
STORED = (FULL, INT8, INT4, SPARSE)
"""Formats that own memory."""

CODE_MAX = {INT8: 127, INT4: 7, SPARSE: 127}
Parts = dict[str, Tensor]


def group_scale(x: Tensor, dim: int, code_max: int) -> Tensor:
    """The smallest bf16 scale s with |x| <= s * code_max over `dim`; 0 for an all-zero group. `dim` is reduced.

    Rounding up makes clamping unnecessary. code_max * s has at most 7 + 8 significant bits, so the comparison below is
    exact in fp32, and the next bf16 number up is the next bit pattern (scales are never negative).
    """
    largest = x.float().abs().amax(dim)
    scale = (largest / code_max).to(torch.bfloat16)
    short = scale.float() * code_max < largest
    return torch.where(short, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)


def quantise(x: Tensor, dim: int, code_max: int) -> tuple[Tensor, Tensor]:
    """Integer codes in [-code_max, code_max], int8, in the shape of `x`, and their bf16 scale without axis `dim`."""
    # The scale is rounded to bf16 before the codes are chosen, so its rounding is no source of error. |x| / s is at
    # most code_max, and rounding to fp32 is monotone, so no code leaves its range and nothing is clamped. The nearest
    # integer is off by at most 1/2, the fp32 division by at most code_max * 2**-24 more:
    #     |x - s * code| <= s * (1/2 + 2**-17),  with  s <= (1 + 2**-7) * max|x| / code_max  (s a normal number).
    # Reading back into a narrow dtype then rounds once, by at most u * |s * code| (u = 2**-8 for bf16, 2**-11 fp16).
    scale = group_scale(x, dim, code_max)
    divisor = torch.where(scale == 0, 1, scale).float().unsqueeze(dim)
    return torch.round(x.float() / divisor).to(torch.int8), scale


def dequantise(codes: Tensor, scale: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """codes * scale in `dtype`, rounded once: a product of two bf16 numbers is formed in fp32 anyway."""
    return (codes.to(dtype) * scale.unsqueeze(dim)).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes in [-7, 7] per byte: [..., T, D] int8 -> [..., T/2, D] uint8, token t below token t + T/2.

    Packing along tokens works for every head size, odd ones too.
    """
    return pack(codes + 8, 4, dim=-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: [..., T/2, D] uint8 -> [..., T, D] int8."""
    return unpack(packed, 4, 2 * packed.shape[-2], dim=-2).to(torch.int8) - 8


def keep_heaviest(mass: Tensor, keep: int) -> Tensor:
    """Slots of the `keep` largest entries of each row, ascending; among equals the later slot. [N, T] -> [N, keep]."""
    order = mass.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (mass.shape[-1] - 1 - order[:, :keep]).sort(dim=-1).values


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory with arbitrary content: whoever asks for it must write before reading."""
    return torch.empty(shape, dtype=dtype, device=device)


def blank_pages(code: int, pages: int, keys: Tensor, values: Tensor, sparse_keep: int) -> Parts:
    """Unwritten storage for `pages` pages of one layer; keys, values [B, H, T, D] give heads, channels, dtype, device.

    Keys and values may differ in channels and dtype. The tensors of a format are read by `decode`.
    """
    parts: Parts = {}
    for name, x in (("keys", keys), ("values", values)):
        heads, width, device = x.shape[1], x.shape[3], x.device
        if code == FULL:
            parts[name] = blank((heads, pages, PAGE_TOKENS, width), x.dtype, device)
            continue
        tokens = sparse_keep if code == SPARSE else PAGE_TOKENS
        rows, dtype = (tokens // 2, torch.uint8) if code == INT4 else (tokens, torch.int8)
        group = width if name == "keys" else tokens
        parts[name] = blank((heads, pages, rows, width), dtype, device)
        parts[f"{name}_scale"] = blank((heads, pages, group), torch.bfloat16, device)
    return parts


def encode(code: int, keys: Tensor, values: Tensor, kept: Tensor | None = None) -> Parts:
    """Full pages in format `code`: keys, values [H, N, 16, D] -> tensors as in `blank_pages`.

    `kept` [N, keep] names the slots that a sparse page keeps; the others do not count for its scales either.
    """
    if code == FULL:
        return {"keys": keys, "values": values}
    if code == SPARSE:
        assert kept is not None, "a sparse page needs the slots it keeps"
        keys, values = (x.gather(2, _along_channels(kept, x)) for x in (keys, values))
    key_codes, key_scale = quantise(keys, -2, CODE_MAX[code])
    value_codes, value_scale = quantise(values, -1, CODE_MAX[code])
    if code == INT4:
        key_codes, value_codes = pack_int4(key_codes), pack_int4(value_codes)
    return {"keys": key_codes, "keys_scale": key_scale, "values": value_codes, "values_scale": value_scale}


def decode(
    code: int, parts: Parts, dtypes: tuple[torch.dtype, torch.dtype], kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse of `encode` up to its rounding: keys, values [H, N, 16, D] in `dtypes`; slots not kept are zeros."""
    if code == FULL:
        return parts["keys"], parts["values"]
    key_codes, value_codes = parts["keys"], parts["values"]
    if code == INT4:
        key_codes, value_codes = unpack_int4(key_codes), unpack_int4(value_codes)
    keys = dequantise(key_codes, parts["keys_scale"], -2, dtypes[0])
    values = dequantise(value_codes, parts["values_scale"], -1, dtypes[1])
    if code == SPARSE:
        assert kept is not None, "a sparse page needs the slots it keeps"
        keys, values = _spread(keys, kept), _spread(values, kept)
    return keys, values


def _along_channels(kept: Tensor, like: Tensor) -> Tensor:
    heads, pages, _, width = like.shape
    return kept.long()[None, :, :, None].expand(heads, pages, kept.shape[1], width)


def _spread(tokens: Tensor, kept: Tensor) -> Tensor:
    heads, pages, _, width = tokens.shape
    page = tokens.new_zeros((heads, pages, PAGE_TOKENS, width))
    return page.scatter_(2, _along_channels(kept, tokens), tokens)
