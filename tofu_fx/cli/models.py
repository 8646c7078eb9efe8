"""Where models come from: timm, transformers, or a function of the user's own."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tofu_fx.cli.command import CommandError, positive
from tofu_fx.cli.forms import Loaded
from tofu_fx.extras import need
from tofu_fx.wording import refusal_of, shortened, shown

SOURCES = """\
a MODEL is one of:
  timm:NAME          a timm model, such as timm:vit_base_patch16_224; random weights without --pretrained or --weights
  hf:NAME_OR_FOLDER  a transformers model and its weights (AutoModel.from_pretrained)
  hf-config:NAME_OR_FOLDER
                     its architecture only, with random weights
  MODULE:FUNCTION    anything that can be imported from here: FUNCTION() must return a torch.nn.Module
"""
USER = "this kind of model"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what decides which model it is."""
    parser.add_argument("model", metavar="MODEL", help="such as timm:vit_base_patch16_224; see below")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's trained weights (downloaded once)")
    weights.add_argument("--weights", type=Path, metavar="FILE", help="a .safetensors file with the model's weights")
    parser.add_argument("--image-size", type=positive, metavar="N", help="pixels a side (the model's own)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of model and inputs (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and inputs (%(default)s)")


def load_model(args: argparse.Namespace) -> Loaded:
    """The model that the arguments name, in eval mode and on its device.

    Raises:
        CommandError: no such model, weights that do not fit, or no such device; says what was expected.
        MissingExtraError: timm, transformers or safetensors is not installed.
    """
    source, colon, name = args.model.partition(":")
    if not colon or not name:
        raise CommandError(
            f"MODEL {shown(args.model)}: expected timm:NAME, hf:NAME, hf-config:NAME or MODULE:FUNCTION"
            + (f"; did you mean timm:{args.model}?" if not colon else "")
        )
    device = _device(args.device)
    torch.manual_seed(args.seed)
    makers: Mapping[str, Callable[[str, argparse.Namespace], nn.Module]] = {
        "timm": _timm, "hf": _transformers, "hf-config": _transformers_config,
    }  # fmt: skip
    if args.pretrained and source not in ("timm", "hf"):
        raise CommandError(f"--pretrained: only timm: models have it; the weights of {source}: are what they are")
    model = makers[source](name, args) if source in makers else _imported(source, name)
    if args.weights is not None:
        _load_weights(model, args.weights)
    dtype: torch.dtype = getattr(torch, args.dtype)
    return Loaded(
        model=model.eval().to(device=device, dtype=dtype),
        name=args.model,
        keyword=getattr(model, "main_input_name", None) if hasattr(model, "config") else None,
        trained=source not in ("timm", "hf-config") or args.pretrained or args.weights is not None,
        device=device,
        dtype=dtype,
        processing=_processing(name) if source.startswith("hf") else {},
    )


def _timm(name: str, args: argparse.Namespace) -> nn.Module:
    timm = need("timm", user=USER)
    size = {"img_size": args.image_size} if args.image_size else {}
    try:
        try:
            model: nn.Module = timm.create_model(name, pretrained=args.pretrained, **size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, pretrained=args.pretrained)  # takes pictures of any size
    except Exception as error:
        if "Unknown model" in str(error):
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names those that there are"
            raise CommandError(f"MODEL timm:{name}: timm {timm.__version__} has no such model; {hint}") from error
        raise CommandError(f"MODEL timm:{name} cannot be made: {error}") from error
    return model


def _transformers(name: str, args: argparse.Namespace) -> nn.Module:
    if args.image_size:
        raise CommandError(
            f"--image-size: the weights of hf:{name} are for its own size; leave it out, or use hf-config:{name}"
        )
    return _from_hub(args.model, lambda transformers: transformers.AutoModel.from_pretrained(name))


def _transformers_config(name: str, args: argparse.Namespace) -> nn.Module:
    def make(transformers: Any) -> nn.Module:
        size = {"image_size": args.image_size} if args.image_size else {}
        config = transformers.AutoConfig.from_pretrained(name, **size)
        model: nn.Module = transformers.AutoModel.from_config(config)
        return model

    return _from_hub(args.model, make)


def _from_hub(name: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    transformers = need("transformers", user=USER)
    try:
        return make(transformers)
    except Exception as error:  # of a configuration that means nothing transformers raises what comes
        raise CommandError(
            f"MODEL {name} cannot be loaded: expected the name of a model on the Hugging Face hub, or a folder with "
            f"its config.json and weights: {_said(error)}"
        ) from error


def _processing(name: str) -> Mapping[str, Any]:
    """What the preprocessor's configuration says; nothing where there is none."""
    transformers = need("transformers", user=USER)
    try:
        found: Mapping[str, Any] = transformers.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except Exception:  # noqa: BLE001 - none there, or one that means nothing: the model's own numbers are taken
        return {}
    return found if isinstance(found, Mapping) else {}


def _imported(module: str, factory: str) -> nn.Module:
    where = f"MODEL {module}:{factory}"
    if not all(part.isidentifier() for part in module.split(".")) or Path(module).is_file():
        file = "; of a file, the name without .py" if module.endswith(".py") or "/" in module else ""
        raise CommandError(
            f"{where}: {shown(module)} is not the name of a module; expected timm:NAME, hf:NAME, hf-config:NAME or "
            f"MODULE:FUNCTION, as mymodels:build{file}"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            # the module is there, and imports one that is not
            raise CommandError(f"{where}: importing {module} fails: {_said(error)}") from error
        raise CommandError(
            f"{where}: no module {error.name!r} here or among what is installed; expected timm:NAME, hf:NAME, "
            "hf-config:NAME, or the MODULE:FUNCTION of a file in the current folder"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise CommandError(f"{where}: importing {module} fails: {_said(error)}") from error
    make = getattr(imported, factory, None)
    if not callable(make):
        file = getattr(imported, "__file__", None) or "a module without a file"
        raise CommandError(f"{where}: {module} has no function {factory!r} (it is looked for in {file})")
    try:
        model = make()
    except (Exception, SystemExit) as error:  # whatever the user's function does
        raise CommandError(f"{where}: calling {factory}() without arguments fails: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{where}: expected that {factory}() returns a torch.nn.Module, got {type(model).__name__}")
    return model


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}"


def _load_weights(model: nn.Module, path: Path) -> None:
    refused = refusal_of(path)
    if refused:
        raise CommandError(f"--weights {path}: {refused}; expected a .safetensors file")
    load_file = need("safetensors.torch", user="--weights").load_file
    try:
        weights = load_file(str(path))
    except Exception as error:  # safetensors has an exception class of its own for each fault
        raise CommandError(f"--weights {path}: not a .safetensors file: {error}") from error
    own = model.state_dict()
    wrong = [
        f"{name} is {list(weights[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    wrong += [f"{name} is missing" for name in own if name not in weights]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CommandError(f"--weights {path} is of another model: {', '.join(wrong[:4])}{more}")
    model.load_state_dict(weights)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: there is no such device here: {str(error).splitlines()[0]}") from error
    return device
