"""The demo's trained model: a plain timm VisionTransformer whose weights lie beside this file.

Nothing here is special to tofu: the class is timm's own, and the weights come from `examples/train_digits.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tofu_fx.demo.data import CELL_SIZE, NUMBER_DIGITS
from tofu_fx.extras import need

WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")

ARCHITECTURE: dict[str, Any] = {
    "img_size": [CELL_SIZE, NUMBER_DIGITS * CELL_SIZE],
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": NUMBER_DIGITS * 10,
    "embed_dim": 160,
    "depth": 4,
    "num_heads": 5,
}


def patch_grid() -> tuple[int, int]:
    """Rows and columns of patches that the model sees."""
    height, width = ARCHITECTURE["img_size"]
    return height // ARCHITECTURE["patch_size"], width // ARCHITECTURE["patch_size"]


def build_model(**overrides: Any) -> nn.Module:
    """An untrained model: `timm.models.VisionTransformer(**ARCHITECTURE)`, with `overrides` on top.

    Raises:
        MissingExtraError: timm is not installed.
    """
    model: nn.Module = need("timm.models").VisionTransformer(**{**ARCHITECTURE, **overrides})
    return model


def read_digits(logits: Tensor) -> Tensor:
    """Logits `[n, 40]`, ten for each place of the number, to the digits read, int64 `[n, 4]`."""
    return logits.reshape(len(logits), NUMBER_DIGITS, 10).argmax(-1)


def save_model(model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Write the weights as float16 safetensors, with the architecture and `facts` in the metadata as JSON strings."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    # A safetensors header maps strings to strings.
    metadata = {key: json.dumps(value) for key, value in {"architecture": ARCHITECTURE, **facts}.items()}
    need("safetensors.torch").save_file(weights, str(path), metadata=metadata)


def read_facts(path: Path = WEIGHTS) -> dict[str, Any]:
    """The metadata of a weights file: `architecture`, `test_accuracy`, `script` and how the training went."""
    with need("safetensors").safe_open(str(path), framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def load_model(path: Path = WEIGHTS) -> nn.Module:
    """The trained model in float32, in eval mode, built as the file's own metadata says.

    Raises:
        MissingExtraError: timm or safetensors is not installed.
    """
    model = build_model(**read_facts(path)["architecture"])
    weights: dict[str, torch.Tensor] = need("safetensors.torch").load_file(str(path))
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
