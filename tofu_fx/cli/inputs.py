"""Where inputs come from: a folder of pictures, an .npz file, or a random generator."""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tofu_fx.cli.arrays import Arrays
from tofu_fx.cli.command import CommandError, note, positive
from tofu_fx.cli.forms import ImageForm, Loaded, TokenForm, find_form
from tofu_fx.extras import need
from tofu_fx.wording import refusal_of, shortened, shown

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
#: pixels of the longer side of a picture whose shorter side is the model's
MOST_PIXELS = 100_000


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
    else:
        refused = refusal_of(args.inputs)
        if refused:
            refused = "no such folder or file" if not args.inputs.exists() else refused
            raise CommandError(f"--inputs {args.inputs}: {refused}; expected a folder of pictures or an .npz")
        found = _npz(args.inputs, form, args.samples, generator)
    if len(found) < args.samples:
        note(f"--inputs {args.inputs}: {len(found)} samples are all there are")
    found = found.to(loaded.device, loaded.dtype if found.is_floating_point() else None)
    return {loaded.keyword: found} if loaded.keyword else found


@contextmanager
def named_refusals(args: argparse.Namespace) -> Iterator[None]:
    """Within it, the refusal of inputs by the model says where they come from."""
    from tofu_fx.calibration.refusals import RefusedInput

    try:
        yield
    except RefusedInput as error:
        where = "random inputs (no --inputs)" if args.inputs is None else f"--inputs {args.inputs}"
        raise CommandError(f"{where}: {error}") from error


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
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and not path.is_dir())
    if not paths:
        raise CommandError(f"--inputs {folder}: no pictures in it; expected files that end in {', '.join(PICTURES)}")
    chosen = [paths[place] for place in _chosen(folder, len(paths), samples, generator)]
    return _pictures(chosen, [str(path) for path in chosen], form)


def _npz(path: Path, form: ImageForm | TokenForm, samples: int, generator: torch.Generator) -> Tensor:
    arrays = Arrays(path)
    if not arrays.names:
        raise CommandError(f"--inputs {path}: no array in it; expected {FORMS}")
    if isinstance(form, TokenForm):
        return _ids(path, arrays, form, samples, generator)
    if "jpeg" in arrays.names and "offset" in arrays.names:
        return _jpegs(path, arrays["jpeg"], arrays["offset"], form, samples, generator)
    name = "images" if "images" in arrays.names else arrays.names[0]
    dtype, sizes = arrays.forms[name]
    channels = (form.channels, *form.size)
    pictures = dtype == "uint8" and (len(sizes) == 3 or (len(sizes) == 4 and sizes[-1] in (1, 3, 4)))
    if not pictures and not (dtype.kind == "f" and sizes[1:] == channels):
        shape = ", ".join(map(str, channels))
        raise CommandError(
            f"--inputs {path}: its array {shown(name)} is {dtype} {list(sizes)}; expected uint8 [N, H, W, C], float "
            f"[N, {shape}] as the model wants it, or `jpeg` and `offset`"
        )
    chosen = _chosen(path, sizes[0], samples, generator)
    if 0 in sizes:
        raise CommandError(f"--inputs {path}: the pictures of its array {shown(name)} {list(sizes)} have no pixel")
    array = arrays[name]
    if not pictures:
        return torch.from_numpy(array[chosen]).float()
    image = need("PIL.Image", "pillow", user=USER)
    grey = array.ndim == 4 and array.shape[-1] == 1
    files = [image.fromarray(array[place].squeeze(-1) if grey else array[place]) for place in chosen]
    return _pictures(files, [f"{path}, picture {place}" for place in chosen], form)


def _jpegs(path: Path, data: Any, offset: Any, form: ImageForm, samples: int, generator: torch.Generator) -> Tensor:
    """The pictures whose files stand one after another in ``data``, each from its ``offset`` to the next."""
    starts = offset.tolist() if offset.ndim == 1 and offset.dtype.kind in "iu" else []
    ordered = all(a <= b for a, b in itertools.pairwise(starts))
    if (
        data.ndim != 1
        or data.dtype != "uint8"
        or not starts
        or not ordered
        or not 0 <= starts[0] <= starts[-1] <= len(data)
    ):
        raise CommandError(
            f"--inputs {path}: `jpeg` is {data.dtype} {list(data.shape)} and `offset` {offset.dtype} "
            f"{list(offset.shape)}; expected uint8 [bytes], and rising integers [N + 1] from 0 to the number of bytes"
        )
    chosen = _chosen(path, len(starts) - 1, samples, generator)
    files = [io.BytesIO(data[starts[place] : starts[place + 1]].tobytes()) for place in chosen]
    return _pictures(files, [f"{path}, picture {place}" for place in chosen], form)


def _ids(path: Path, arrays: Arrays, form: TokenForm, samples: int, generator: torch.Generator) -> Tensor:
    name = "input_ids" if "input_ids" in arrays.names else arrays.names[0]
    dtype, sizes = arrays.forms[name]
    if len(sizes) != 2 or dtype.kind not in "iu" or (sizes[0] and not sizes[1]):
        raise CommandError(
            f"--inputs {path}: its array {shown(name)} is {dtype} {list(sizes)}; the model takes token ids: "
            "expected integers `input_ids` [N, length]"
        )
    array = arrays[name]
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < form.vocabulary:
        raise CommandError(
            f"--inputs {path}: {shown(name)} holds ids outside 0 to {form.vocabulary - 1}, the vocabulary"
        )
    return torch.from_numpy(array[_chosen(path, len(array), samples, generator)].astype("int64"))


def _pictures(files: Sequence[Any], names: Sequence[str], form: ImageForm) -> Tensor:
    """Pictures (paths, open files or PIL images) as the model wants them: ``[N, channels, *size]``."""
    if form.guessed:
        note("the model does not say how its pictures are normalised: ImageNet's mean and deviation are taken")
    image = need("PIL.Image", "pillow", user=USER)
    tensors = []
    for file, name in zip(files, names, strict=True):
        refused = refusal_of(file) if isinstance(file, Path) else ""
        if refused:
            raise CommandError(f"--inputs: {name} cannot be read as a picture: {refused}")
        try:
            picture = file if isinstance(file, image.Image) else image.open(file)
            _check_sides(picture, form)
            tensors.append(_prepare(picture.convert("L" if form.channels == 1 else "RGB"), form, image.Resampling))
        except Exception as error:  # pillow's decoders raise what comes: OSError, SyntaxError, struct.error, ...
            said = shortened(" ".join(str(error).split()), 300)
            raise CommandError(f"--inputs: {name} cannot be read as a picture: {said}") from error
    return torch.stack(tensors)


def _check_sides(picture: Any, form: ImageForm) -> None:
    """Raise ValueError for a picture of no pixels, or one so elongated that resizing it would fill the memory."""
    short, long = sorted(picture.size)
    if not short:
        raise ValueError(f"it is {picture.width} x {picture.height} pixels: there are none")
    if max(form.size) * long / short > MOST_PIXELS:
        raise ValueError(f"it is {picture.width} x {picture.height} pixels, far too elongated for this model")


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
