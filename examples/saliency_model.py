"""The saliency model and the photographs of `examples/saliency.py`.

A DINOv2 ViT-S/14 (timm's `vit_small_patch14_dinov2`) with a small convolutional head that turns its 16 x 16 patch
tokens into a map of where the eye goes. Nothing here knows of tofu: the backbone is timm's own class.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu_fx.extras import need

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT.parent / "shared" / "models" / "dinov2_small_saliency.safetensors"
PHOTOS = ROOT.parent / "shared" / "data" / "photos.tar"

SIZE = 224
PATCH = 14
GRID = SIZE // PATCH
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SaliencyHead(nn.Module):
    """Features `[B, 384, 16, 16]` -> logits `[B, 1, 128, 128]`: three doublings of the side, then one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(384, 256, 4, 2, 1, bias=True)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=True)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=True)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features to logits."""
        x = F.relu(self.bn1(self.upconv1(x)))
        x = F.relu(self.bn2(self.upconv2(x)))
        x = F.relu(self.bn3(self.upconv3(x)))
        return self.final_conv(x)


class SaliencyModel(nn.Module):
    """Normalised photographs `[B, 3, 224, 224]` -> saliency `[B, 1, 224, 224]`, 0 to 1."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = SaliencyHead()

    def forward(self, x: Tensor) -> Tensor:
        """Photographs to maps."""
        tokens = self.backbone.forward_features(x)[:, 1:]  # the class token has no place on the map
        features = tokens.transpose(1, 2).reshape(x.shape[0], -1, GRID, GRID)
        saliency = torch.sigmoid(self.decoder(features))
        return F.interpolate(saliency, size=x.shape[-2:], mode="bilinear", align_corners=False)


def load_model(path: Path = MODEL) -> SaliencyModel:
    """The trained model in float32, in eval mode.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
        MissingExtraError: timm or safetensors is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the saliency model is not at {path}: pass its place with --model")
    weights: dict[str, Tensor] = need("safetensors.torch").load_file(str(path))
    weights = {name: value.float() for name, value in weights.items()}
    weights["backbone.pos_embed"] = resample_positions(weights["backbone.pos_embed"], GRID)
    backbone = need("timm").create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0)
    model = SaliencyModel(backbone)
    # BatchNorm counts its training batches; the file leaves the counters out, and inference does not read them.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(f"{path} is not the saliency model: missing or unknown weights {', '.join(wrong[:4])}")
    return model.eval()


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """Position table `[1, 1 + S * S, C]`, class token first, to a grid of `grid` patches a side.

    Bicubic without antialiasing, as the model was trained; timm's own resampling antialiases.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    places = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], places.flatten(2).transpose(1, 2)], dim=1)


def load_photos(path: Path = PHOTOS, every: int = 1, limit: int | None = None) -> Tensor:
    """Every `every`-th photograph of a tar, the first included, at most `limit`: `[n, 3, 224, 224]`, 0 to 1, RGB.

    The whole photograph is squeezed to a square: saliency has no use for a crop.

    Raises:
        FileNotFoundError: there is no such file; the message says what to pass.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the photographs are not at {path}: pass their place with --photos")
    image, numpy = need("PIL.Image", "pillow"), need("numpy")
    photos = []
    with tarfile.open(path) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        for member in members[::every][:limit]:
            file = tar.extractfile(member)
            assert file is not None
            photo = image.open(io.BytesIO(file.read())).convert("RGB").resize((SIZE, SIZE), image.Resampling.BILINEAR)
            photos.append(torch.from_numpy(numpy.asarray(photo).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(photos)


def normalise(photos: Tensor) -> Tensor:
    """Photographs 0 to 1 -> what the model takes: ImageNet's mean 0 and deviation 1 in every channel."""
    return (photos - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
