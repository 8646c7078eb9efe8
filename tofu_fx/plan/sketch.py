"""How wide hidden states are made narrow before tokens are compared by them (``match="sketch"``).

Comparing N tokens of C channels costs N^2 C, as much as a part of the attention that it is to save. A count sketch
(Charikar, Chen, Farach-Colton, 2002) keeps a cosine similarity s but for a deviation of about (1 - s^2) / sqrt(width),
which is small for the like tokens that are looked for. Measured: docs/dense.md.
"""

from __future__ import annotations

#: the most numbers that a token's sketch has
WIDTH = 128


def folds(channels: int) -> int:
    """How many channels each number of the sketch sums: a divisor of all, so large that at most `WIDTH` are left.

    1, nothing is folded, where that would leave less than half of `WIDTH`: too few to distinguish tokens.
    """
    fold = next(n for n in range(-(-channels // WIDTH), channels + 1) if channels % n == 0)
    return fold if channels // fold >= WIDTH // 2 else 1
