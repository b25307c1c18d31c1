"""Rounding as its definitions say, group after group."""

import math

import torch


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def naive_groups(row, group=128):
    count = math.ceil(len(row) / group)
    return [torch.stack(part) for part in split_evenly(list(row), count)]


def split_evenly(values, count):
    """The first groups are one longer where the length is no multiple of their number."""
    short, longer = divmod(len(values), count)
    parts = []
    for number in range(count):
        length = short + (number < longer)
        parts.append(values[:length])
        values = values[length:]
    return parts


def naive_rows(rows, one_group, group=128):
    return torch.stack([torch.cat([one_group(part) for part in naive_groups(row, group)]) for row in rows])


def naive_symmetric(bits):
    def one_group(part):
        scale = bf16(part.abs().max() / (2 ** (bits - 1) - 1))
        return torch.stack([torch.round(x / scale) * scale for x in part])

    return one_group


def naive_ranged(bits, scale_of=bf16):
    top = 2**bits - 1

    def one_group(part):
        scale = scale_of((part.max() - part.min()) / top)
        zero = (-part.min() / scale).round().clamp(0, top)
        return (((part / scale).round() + zero).clamp(0, top) - zero) * scale

    return one_group


def naive_signs(part):
    return torch.where(part < 0, -1.0, 1.0) * bf16(part.abs().mean())
