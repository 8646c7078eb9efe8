"""The denoiser of `examples/diffusion.py`: diffusers' own UNet2DConditionModel, small, on 32x32 pixels, ten classes.

It is laid out as Stable Diffusion's: convolutions with transformer blocks between them, whose self-attention sees
every pixel (1024 tokens at 32x32, 256 at 16x16) and whose cross-attention reads the "prompt", here two learnt tokens
of the class. An eleventh class stands for none, which classifier-free guidance needs. Its weights,
`denoiser.safetensors`, are what `train_diffusion.py` wrote; nothing in the model knows of tofu.

The pictures are CIFAR-10's, which are not part of this repository. Without them the scripts use scikit-learn's scans of
digits, enlarged from 8x8: enough to train a model that draws digits, and to see everything run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_model import CLASSES, FILES, ROOT, load_cifar
from torch import Tensor, nn

from tofu_fx.extras import need

WEIGHTS = ROOT / "examples" / "denoiser.safetensors"
SOURCES = ("cifar", "digits")

SIZE = 32
NULL = len(CLASSES)  # the label of "no class given"
PROMPT_TOKENS = 2
ARCHITECTURE: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    # The number of heads, by diffusers' naming: 32 channels each.
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}

TRAIN_TIMESTEPS = 1000
# Where the held-out loss is taken: each picture at each of them.
TIMESTEPS = (60, 185, 310, 435, 560, 685, 810, 935)
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
DIGITS_TEST = 297  # of the 1797 scans


class Denoiser(nn.Module):
    """Noisy pictures `[B, 3, H, W]`, timesteps `[B]` and labels `[B]` -> the predicted velocity `[B, 3, H, W]`."""

    def __init__(self, unet: nn.Module, prompts: nn.Embedding) -> None:
        super().__init__()
        self.unet = unet
        self.prompts = prompts

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """What the schedule calls v: the noise less the picture, each in its share."""
        prompt = self.prompts(labels).unflatten(1, (PROMPT_TOKENS, -1))
        velocity: Tensor = self.unet(x, timesteps, prompt, return_dict=False)[0]
        return velocity


def build_model() -> Denoiser:
    """The denoiser with random weights: those of `torch.manual_seed`.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    unet = need("diffusers").UNet2DConditionModel(**ARCHITECTURE)
    return Denoiser(unet, nn.Embedding(NULL + 1, PROMPT_TOKENS * ARCHITECTURE["cross_attention_dim"]))


def load_model(path: Path = WEIGHTS) -> Denoiser:
    """The trained denoiser in float32, in eval mode.

    Raises:
        FileNotFoundError: there is no such file; the message says what to do.
        ValueError: the file holds other weights than expected.
        MissingExtraError: diffusers or safetensors is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the denoiser is not at {path}: write it with train_diffusion.py --output")
    model = build_model()
    weights: dict[str, Tensor] = need("safetensors.torch").load_file(str(path))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
        raise ValueError(f"{path} is not what train_diffusion.py writes: wrong weights {', '.join(wrong[:4])}")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def save_model(model: Denoiser, path: Path, facts: dict[str, object]) -> None:
    """Write the weights in float16 with `facts` in the metadata, as JSON strings: a header maps strings to strings."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    need("safetensors.torch").save_file(weights, str(path), metadata=metadata)


def read_facts(path: Path = WEIGHTS) -> dict[str, Any]:
    """The metadata of trained weights: `data`, `held_out_loss`, `steps`, `seed`, `torch` and others."""
    with need("safetensors").safe_open(str(path), framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def default_source() -> str:
    """ "cifar" where its files are, else "digits"."""
    return "cifar" if all(path.is_file() for path in FILES.values()) else "digits"


def load_pictures(source: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` pictures, float32 `[n, 3, 32, 32]` from -1 to 1, and their labels, int64 `[n]`.

    Args:
        source: "cifar" (50 000 to train, 5000 to test) or "digits" (1500 and 297).
        split: "train" or "test".
        count: all of them if not given.

    Raises:
        FileNotFoundError: CIFAR-10 is not there.
        ValueError: there are fewer than `count`, or there is no such source.
        MissingExtraError: Pillow or scikit-learn is not installed.
    """
    if source == "cifar":
        pixels, labels = load_cifar(split, count)
        return pixels.float() / 127.5 - 1, labels
    if source != "digits":
        raise ValueError(f"no pictures called {source!r}: {' or '.join(SOURCES)}")
    scans = need("sklearn.datasets", "scikit-learn").load_digits()
    chosen = slice(-DIGITS_TEST, None) if split == "test" else slice(-DIGITS_TEST)
    images = torch.from_numpy(scans.images[chosen]).float()[:, None] / 8 - 1
    labels = torch.from_numpy(scans.target[chosen]).long()
    if count is not None and not 1 <= count <= len(labels):
        raise ValueError(f"there are {len(labels)} digits to {split}, {count} were asked for")
    images = F.interpolate(images[:count], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous(), labels[:count]


@functools.cache
def noise_schedule() -> Any:
    """diffusers' DDPMScheduler: how much noise each timestep has, and what the model predicts of it."""
    return need("diffusers").DDPMScheduler(**SCHEDULE)


def velocity_loss(model: nn.Module, images: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of the predicted velocity: about 1 for a model that knows nothing."""
    schedule = noise_schedule()
    noisy = schedule.add_noise(images, noise, timesteps)
    wanted = schedule.get_velocity(images, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, labels).float(), wanted)


@torch.no_grad()
def denoising_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch: int = 32
) -> float:
    """The loss over all pictures, each at each of `TIMESTEPS`: for comparisons, with a generator of the same seed."""
    total = 0.0
    for timestep in TIMESTEPS:
        for part, named in zip(images.split(batch), labels.split(batch), strict=True):
            noise = torch.randn(part.shape, generator=generator)
            timesteps = torch.full((len(part),), timestep)
            total += len(part) * float(velocity_loss(model, part, named, timesteps, noise))
    return total / (len(images) * len(TIMESTEPS))


@torch.no_grad()
def sample(
    model: nn.Module, labels: Sequence[int] | Tensor, steps: int = 25, guidance: float = 2.0, seed: int = 0
) -> Tensor:
    """A picture for each label, float32 `[n, 3, 32, 32]` from -1 to 1, by DDIM: the same for the same seed.

    Args:
        model: the denoiser, or a compiled one. It is called `steps` times with `2 n` pictures, whatever the guidance.
        labels: 0 to 9 for the classes, `NULL` for none.
        steps: from pure noise to the picture, 1 to `TRAIN_TIMESTEPS`.
        guidance: how far from what is predicted without a class; 1 takes the prediction with it.
        seed: of the noise that the pictures start from. Picture `i` starts from the same noise in a larger batch.

    Raises:
        ValueError: an argument is out of range.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if labels.ndim != 1 or not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) <= NULL:
        raise ValueError(f"labels must be a list of numbers from 0 to {NULL}, got {labels.tolist()}")
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise ValueError(f"steps must be from 1 to {TRAIN_TIMESTEPS}, got {steps}")
    schedule = need("diffusers").DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=True)
    schedule.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randn(3, SIZE, SIZE, generator=generator) for _ in labels])
    asked = torch.cat([torch.full_like(labels, NULL), labels])
    for timestep in schedule.timesteps.tolist():
        without, given = model(torch.cat([x, x]), torch.full_like(asked, timestep), asked).chunk(2)
        x = schedule.step(without + guidance * (given - without), timestep, x).prev_sample
    return x.clamp(-1, 1)
