"""The demo's images: scikit-learn's scanned handwritten digits, which come with the package and need no network.

1797 scans of 8x8 grey levels, 1200 to train on and 597 to test on, upscaled to 28x28 so that a vision transformer with
2x2 patches sees 14x14 patches and a class token: 197 tokens, as many as ViT-B/16 sees at 224x224.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu_fx.demo.extra import need

IMAGE_SIZE = 28
TEST_IMAGES = 597
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """One side of the split.

    Attributes:
        images: float32 `[n, 1, 28, 28]`, 0 (paper) to 1 (ink).
        labels: int64 `[n]`, 0 to 9.
        ids: int64 `[n]`, the rows of scikit-learn's data set that these are.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


def upscale(scans: Tensor) -> Tensor:
    """Bilinear: scans `[n, 8, 8]`, 0 to 16, become images `[n, 1, 28, 28]`, 0 to 1."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(scans.float()[:, None] / 16, size=size, mode="bilinear", align_corners=False)


def load_digits() -> tuple[Digits, Digits]:
    """The training and the test images: a fixed split, with the same share of every digit on both sides.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets = need("sklearn.datasets", "scikit-learn")
    selection = need("sklearn.model_selection", "scikit-learn")
    scans, labels = datasets.load_digits(return_X_y=True)
    images = upscale(torch.from_numpy(scans).reshape(-1, 8, 8))
    targets = torch.from_numpy(labels).long()
    train_ids, test_ids = selection.train_test_split(
        range(len(targets)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    train, test = (
        Digits(images[chosen], targets[chosen], chosen) for chosen in (torch.tensor(train_ids), torch.tensor(test_ids))
    )
    return train, test
