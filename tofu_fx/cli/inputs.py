"""Where inputs come from: a folder of pictures, an .npz file, or a random generator."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tofu_fx.cli.command import CommandError, note, positive
from tofu_fx.cli.forms import ImageForm, Loaded, TokenForm, find_form
from tofu_fx.demo.extra import need

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SOURCES = """\
--inputs is one of:
  FOLDER     pictures (also in folders inside); resized, cropped and normalised as the model wants them
  FILE.npz   an array `images` (or the first array): uint8 [N, H, W, C] is treated like pictures, float [N, C, H, W] is
             taken as it is; or `jpeg` (the bytes of all files) and `offset` ([N + 1], where each begins);
             or `input_ids` [N, length] for models of text
  nothing    random noise, or random token ids: good for speed, of little meaning for quality
"""
FORMS = "uint8 [N, H, W, C], float [N, C, H, W], `jpeg` with `offset`, or integer `input_ids` [N, length]"
USER = "--inputs"


def add_input_arguments(parser: argparse.ArgumentParser, samples: int) -> None:
    """--inputs, and how many of them."""
    parser.add_argument("--inputs", type=Path, metavar="PATH", help="a folder of pictures or an .npz file; see below")
    parser.add_argument("--samples", type=positive, default=samples, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--length", type=positive, metavar="N", help="ids in a random text (at most 128)")


def read_inputs(args: argparse.Namespace, loaded: Loaded) -> Tensor | dict[str, Tensor]:
    """The inputs as `tofu_fx.calibrate` takes them: a tensor ``[samples, ...]``, or a dict of one.

    Which ones of several are taken is random, by ``args.seed``: files often lie in the order of their classes.

    Raises:
        CommandError: a path that holds no inputs, or inputs of another form than the model's.
        MissingExtraError: pillow or numpy is not installed.
    """
    form = find_form(loaded, args.image_size, args.length)
    generator = torch.Generator().manual_seed(args.seed)
    if args.inputs is None:
        found = _random(form, args.samples, generator)
    elif args.inputs.is_dir():
        found = _folder(args.inputs, _image_form(form, args.inputs), args.samples, generator)
    elif args.inputs.is_file():
        found = _npz(args.inputs, form, args.samples, generator)
    else:
        raise CommandError(f"--inputs {args.inputs}: no such folder or file; expected a folder of pictures or an .npz")
    if len(found) < args.samples:
        note(f"--inputs {args.inputs}: {len(found)} samples are all there are")
    found = found.to(loaded.device, loaded.dtype if found.is_floating_point() else None)
    return {loaded.keyword: found} if loaded.keyword else found


def warn_of_chance(args: argparse.Namespace, loaded: Loaded) -> None:
    """Say what of a measurement of quality means little: that of random inputs or weights."""
    if args.inputs is None:
        note(
            "warning: the inputs are random noise; linearity and errors measured on it say little about real inputs. "
            "Pass some with --inputs"
        )
    if not loaded.trained:
        note(
            f"warning: {loaded.name} has random weights; what is measured of its outputs says little about trained "
            "ones. Pass --pretrained or --weights"
        )


def _random(form: ImageForm | TokenForm, samples: int, generator: torch.Generator) -> Tensor:
    if isinstance(form, TokenForm):
        return torch.randint(form.vocabulary, (samples, form.length), generator=generator)
    return torch.randn(samples, form.channels, *form.size, generator=generator)


def _chosen(path: Path, count: int, samples: int, generator: torch.Generator) -> list[int]:
    if count < 1:
        raise CommandError(f"--inputs {path}: there is not one sample in it")
    chosen: list[int] = torch.randperm(count, generator=generator)[:samples].tolist()
    return chosen


def _image_form(form: ImageForm | TokenForm, path: Path) -> ImageForm:
    if isinstance(form, TokenForm):
        raise CommandError(
            f"--inputs {path}: the model takes token ids, not pictures; expected an .npz with `input_ids`"
        )
    return form


def _folder(folder: Path, form: ImageForm, samples: int, generator: torch.Generator) -> Tensor:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise CommandError(f"--inputs {folder}: no pictures in it; expected files that end in {', '.join(PICTURES)}")
    chosen = [paths[place] for place in _chosen(folder, len(paths), samples, generator)]
    return _pictures(chosen, [str(path) for path in chosen], form)


def _npz(path: Path, form: ImageForm | TokenForm, samples: int, generator: torch.Generator) -> Tensor:
    numpy = need("numpy", user=USER)
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # not a zip file, a damaged one, objects instead of numbers
        raise CommandError(
            f"--inputs {path}: not an .npz file of numbers ({error}); expected one, or a folder"
        ) from error
    if not arrays:
        raise CommandError(f"--inputs {path}: no array in it; expected {FORMS}")
    if isinstance(form, TokenForm):
        return _ids(path, arrays, form, samples, generator)
    if "jpeg" in arrays and "offset" in arrays:
        data, offset = arrays["jpeg"].tobytes(), arrays["offset"].tolist()
        chosen = _chosen(path, len(offset) - 1, samples, generator)
        files = [io.BytesIO(data[offset[place] : offset[place + 1]]) for place in chosen]
        return _pictures(files, [f"{path}, picture {place}" for place in chosen], form)
    name = "images" if "images" in arrays else next(iter(arrays))
    array = arrays[name]
    chosen = _chosen(path, len(array), samples, generator) if array.ndim else []
    if array.dtype == numpy.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3, 4))):
        image = need("PIL.Image", "pillow", user=USER)
        files = [
            image.fromarray(array[place].squeeze(-1) if array.shape[-1] == 1 else array[place]) for place in chosen
        ]
        return _pictures(files, [f"{path}, picture {place}" for place in chosen], form)
    expected = (form.channels, *form.size)
    if array.dtype.kind == "f" and array.shape[1:] == expected:
        return torch.from_numpy(array[chosen]).float()
    shape = ", ".join(map(str, expected))
    raise CommandError(
        f"--inputs {path}: its array {name!r} is {array.dtype} {list(array.shape)}; expected uint8 [N, H, W, C], float "
        f"[N, {shape}] as the model wants it, or `jpeg` and `offset`"
    )


def _ids(path: Path, arrays: dict[str, Any], form: TokenForm, samples: int, generator: torch.Generator) -> Tensor:
    name = "input_ids" if "input_ids" in arrays else next(iter(arrays))
    array = arrays[name]
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise CommandError(
            f"--inputs {path}: its array {name!r} is {array.dtype} {list(array.shape)}; the model takes token ids: "
            "expected integers `input_ids` [N, length]"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < form.vocabulary:
        raise CommandError(f"--inputs {path}: {name!r} holds ids outside 0 to {form.vocabulary - 1}, the vocabulary")
    return torch.from_numpy(array[_chosen(path, len(array), samples, generator)].astype("int64"))


def _pictures(files: Sequence[Any], names: Sequence[str], form: ImageForm) -> Tensor:
    """Pictures (paths, open files or PIL images) as the model wants them: ``[N, channels, *size]``."""
    if form.guessed:
        note("the model does not say how its pictures are normalised: ImageNet's mean and deviation are taken")
    image = need("PIL.Image", "pillow", user=USER)
    tensors = []
    for file, name in zip(files, names, strict=True):
        try:
            picture = file if isinstance(file, image.Image) else image.open(file)
            tensors.append(_prepare(picture.convert("L" if form.channels == 1 else "RGB"), form, image.Resampling))
        except OSError as error:
            raise CommandError(f"--inputs: {name} cannot be read as a picture: {error}") from error
    return torch.stack(tensors)


def _prepare(picture: Any, form: ImageForm, resampling: Any) -> Tensor:
    """The middle of the picture: the shorter side becomes the model's over ``crop``, the rest is cut off."""
    height, width = form.size
    scale = max(width / picture.width, height / picture.height) / form.crop
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    filters: dict[str, Callable[..., Any]] = {"bilinear": resampling.BILINEAR, "nearest": resampling.NEAREST}
    picture = picture.resize(resized, filters.get(form.interpolation, resampling.BICUBIC))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(height, width, form.channels)
    mean, std = torch.tensor(form.mean), torch.tensor(form.std)
    return ((values.float() / 255 - mean) / std).permute(2, 0, 1).contiguous()
