"""The CIFAR-10 classifier of `examples/train_cifar.py`, and its pictures.

A DINOv2 ViT-S/14 (timm's `vit_small_patch14_dinov2`) and a linear head on its class token and its mean patch. The
backbone's weights are those of the saliency model, which is not part of this repository; what the training added to
them, a product of two narrow matrices for each linear layer of a block, and the head are in `cifar_head.safetensors`.
A loaded model has the products added to its weights: it is timm's own class, and nothing in it knows of tofu.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from saliency_model import MODEL, ROOT, normalise, resample_positions
from torch import Tensor, nn

from tofu_fx.extras import need

HEAD = ROOT / "examples" / "cifar_head.safetensors"
DATA = ROOT.parent / "shared" / "data"
FILES = {"train": DATA / "cifar10_train.npz", "test": DATA / "cifar10_test.npz"}

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 196
PATCH = 14
# The linear layers of a block, each of which is adapted.
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class CifarModel(nn.Module):
    """Normalised pictures `[B, 3, 196, 196]` -> logits `[B, 10]`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        width = 2 * cast(int, backbone.num_features)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures to logits."""
        tokens = self.backbone.forward_features(x)
        return self.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))


def read_backbone(path: Path = MODEL) -> dict[str, Tensor]:
    """The backbone's weights in float32, the position table `[1, 1 + 37 * 37, 384]` as it was trained.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
        MissingExtraError: safetensors is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the backbone is not at {path}: pass its place with --backbone")
    weights: dict[str, Tensor] = need("safetensors.torch").load_file(str(path))
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
    if "pos_embed" not in weights:
        raise ValueError(f"{path} is not the saliency model: it has no backbone.pos_embed")
    return weights


def build_backbone(path: Path = MODEL, size: int = SIZE) -> nn.Module:
    """The backbone for pictures of `size` pixels a side, as it is without CIFAR.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
        MissingExtraError: timm or safetensors is not installed.
    """
    weights = read_backbone(path)
    weights["pos_embed"] = resample_positions(weights["pos_embed"], size // PATCH)
    backbone: nn.Module = need("timm").create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    backbone.load_state_dict(weights)
    return backbone


def load_model(backbone: Path = MODEL, head: Path = HEAD) -> CifarModel:
    """The trained model in float32, in eval mode.

    Args:
        backbone: the saliency model, whose backbone this one starts from.
        head: what `train_cifar.py` wrote.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
        ValueError: a file holds other weights than expected.
        MissingExtraError: timm or safetensors is not installed.
    """
    if not head.is_file():
        raise FileNotFoundError(f"the trained head is not at {head}: write it with train_cifar.py --output")
    model = CifarModel(build_backbone(backbone))
    trained: dict[str, Tensor] = need("safetensors.torch").load_file(str(head))
    trained = {name: value.float() for name, value in trained.items()}
    layers = [f"backbone.blocks.{i}.{name}" for i in range(len(model.backbone.blocks)) for name in LINEAR]
    expected = {f"head.{name}" for name in model.head.state_dict()}
    expected |= {f"{layer}.{part}" for layer in layers for part in ("down", "up")}
    if wrong := sorted(expected ^ set(trained)):
        raise ValueError(f"{head} is not what train_cifar.py writes: missing or unknown weights {', '.join(wrong[:4])}")
    with torch.no_grad():
        for layer in layers:
            model.get_submodule(layer).weight += trained[f"{layer}.up"] @ trained[f"{layer}.down"]
    model.head.load_state_dict({name: trained[f"head.{name}"] for name in model.head.state_dict()})
    return model.eval()


def read_facts(path: Path = HEAD) -> dict[str, Any]:
    """The metadata of a trained head: `test_accuracy`, `test_images`, `train_images`, `seed`, `torch` and others."""
    with need("safetensors").safe_open(str(path), framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def load_cifar(split: str, count: int | None = None, path: Path | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` pictures, uint8 `[n, 3, 32, 32]`, and their labels, int64 `[n]`.

    The files are sorted by class. Here the classes take turns, so that any `count` has as many of each, give or take
    one, and a smaller count is the start of a larger one.

    Args:
        split: "train" (50 000 pictures) or "test" (5000, the first half of CIFAR-10's in each class).
        count: all of them if not given.
        path: the file, if it is not where `FILES` says.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
        ValueError: there are fewer than `count`.
    """
    path = path or FILES[split]
    if not path.is_file():
        raise FileNotFoundError(f"the CIFAR-10 {split} pictures are not at {path}: pass their place with --{split}")
    image, numpy = need("PIL.Image", "pillow"), need("numpy")
    with numpy.load(path) as file:
        jpeg, offset, label = file["jpeg"], file["offset"], file["label"]
    if count is not None and not 1 <= count <= len(label):
        raise ValueError(f"{path} has {len(label)} pictures, {count} were asked for")
    place = numpy.empty(len(label), dtype=numpy.int64)  # of each picture among those of its class
    for name in numpy.unique(label):
        place[label == name] = numpy.arange((label == name).sum())
    order = numpy.lexsort((label, place))[:count]
    pictures = [image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB") for i in order]
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(label[order].astype(numpy.int64))


def prepare(images: Tensor, size: int = SIZE) -> Tensor:
    """Pictures uint8 `[n, 3, 32, 32]` -> what the model takes, float32 `[n, 3, size, size]`: enlarged, normalised."""
    large = F.interpolate(images.float() / 255, size=(size, size), mode="bicubic", align_corners=False)
    return normalise(large.clamp(0, 1))
