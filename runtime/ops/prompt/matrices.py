"""What tokens of prompts multiply with: the directions that rows read, as matrices in the model's dtype.

A prompt runs at one rung, so a pass reads few sets of factors, and of each many tokens make use: they are read out of
the store once a site (`dense`), and everybody multiplies matrices on tensor cores. What a token's update weighs is its
own.

Shape legend: T tokens of a pass, S sets of factors, R directions at most, D inputs, N_i outputs of a member, M modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed import Reads


@dataclass(frozen=True)
class Factors:
    """What S sets have at one site, of linears that share their input. A set's record says how many directions its rung
    reads of a member, ENDS + 3 of `packed`; what lies behind those means nothing."""

    reads: Reads
    """Of S sets instead of rows: records [S, M, 32]"""
    site: int
    """Number of the first member's module"""
    a: Tensor
    """[S, members, R, D] in the model's dtype"""
    b: Tensor
    """[S, blocks, R, Q]: blocks of Q columns of each member's outputs, one member's behind another's, the last block of
    a member filled up; scales of both halves are in it"""

    @property
    def columns(self) -> int:
        """Q"""
        return self.b.shape[3]


@dataclass(frozen=True)
class Added:
    """What adapters add at a site: B'u."""

    u: Tensor
    """[T, members, R] in the model's dtype: weight * A'x of every token; 0 behind the directions that its row reads,
    arbitrary where a token has no factors"""
    factors: Factors
