"""The demo's images: four-digit numbers made of scikit-learn's scanned handwritten digits; no network is needed.

1797 real scans of 8x8 grey levels, 1197 to train on and 600 to test on. Four of them side by side, upscaled to 16x64,
make a number to read: with 2x2 patches a vision transformer sees 8x32 patches, one for each scanned pixel, and a class
token, 257 tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu_fx.extras import need

SCAN_SIZE = 8
CELL_SIZE = 16
NUMBER_DIGITS = 4
TEST_SCANS = 600
TEST_ARRANGEMENTS = 4
SPLIT_SEED = 0


@dataclass(frozen=True)
class Scans:
    """One side of the split.

    Attributes:
        images: float32 `[n, 1, 16, 16]`, 0 (paper) to 1 (ink), upscaled bilinearly from 8x8.
        labels: int64 `[n]`, 0 to 9.
        ids: int64 `[n]`, the rows of scikit-learn's data set that these are.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Numbers:
    """Four-digit numbers.

    Attributes:
        images: float32 `[n, 1, 16, 64]`, 0 to 1.
        labels: int64 `[n, 4]`, the digits from left to right.
    """

    images: Tensor
    labels: Tensor


def load_scans() -> tuple[Scans, Scans]:
    """The training and the test scans: a fixed split, with the same share of every digit on both sides.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets = need("sklearn.datasets", "scikit-learn")
    selection = need("sklearn.model_selection", "scikit-learn")
    rows, digits = datasets.load_digits(return_X_y=True)
    scans = torch.from_numpy(rows).float().reshape(-1, 1, SCAN_SIZE, SCAN_SIZE) / 16
    images = F.interpolate(scans, size=(CELL_SIZE, CELL_SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits).long()
    train_ids, test_ids = selection.train_test_split(
        range(len(labels)), test_size=TEST_SCANS, stratify=digits, random_state=SPLIT_SEED
    )
    train, test = (
        Scans(images[chosen], labels[chosen], chosen) for chosen in (torch.tensor(train_ids), torch.tensor(test_ids))
    )
    return train, test


def make_numbers(images: Tensor, labels: Tensor) -> Numbers:
    """Cells `[4 * n, 1, 16, 16]` and their labels, in order, become n numbers; what is left over is dropped."""
    count = len(labels) // NUMBER_DIGITS
    used = count * NUMBER_DIGITS
    cells = images[:used].reshape(count, NUMBER_DIGITS, CELL_SIZE, CELL_SIZE)
    strips = cells.permute(0, 2, 1, 3).reshape(count, 1, CELL_SIZE, NUMBER_DIGITS * CELL_SIZE)
    return Numbers(strips, labels[:used].reshape(count, NUMBER_DIGITS))


def load_test_numbers() -> Numbers:
    """The 600 numbers to test on: every test scan stands in four of them, in a fixed random arrangement.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    _, test = load_scans()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.cat([torch.randperm(len(test.labels), generator=generator) for _ in range(TEST_ARRANGEMENTS)])
    return make_numbers(test.images[order], test.labels[order])
