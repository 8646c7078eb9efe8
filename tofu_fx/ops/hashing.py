"""Pseudo-random numbers without a state: integer arithmetic that wraps alike on every device."""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF


def scatter_bits(value: Tensor, seed: int) -> Tensor:
    """Hash int64 values, 32 bits of each, under a seed. A generator would have a state that others change."""
    return mix(value * 0x9E3779B1 + (seed & _MASK))


def mix(key: Tensor) -> Tensor:
    """Spread each bit of 32 over all of them, twice."""
    for multiplier in (0x7FEB352D, 0x846CA68B):
        key = key & _MASK
        key = (key ^ (key >> 16)) * multiplier
    key = key & _MASK
    return key ^ (key >> 16)
