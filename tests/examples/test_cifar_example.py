"""The CIFAR-10 classifier of examples/: what it reads, how well, and how its training starts from nothing changed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.examples.loading import example, needed

IMAGES = 200


@pytest.fixture(scope="module")
def files() -> ModuleType:
    return example("cifar_model")


@pytest.fixture(scope="module")
def model(files: ModuleType) -> Any:
    needed(files.MODEL)
    return files.load_model()


@pytest.fixture(scope="module")
def pictures(files: ModuleType) -> tuple[Tensor, Tensor]:
    needed(files.FILES["test"])
    return files.load_cifar("test", IMAGES)


@pytest.mark.nightly("18 s for one figure of a file that is carried unchanged; the pictures go through it above")
@torch.no_grad()
def test_accuracy_is_that_of_the_file(files: ModuleType, model: Any, pictures: tuple[Tensor, Tensor]) -> None:
    images, labels = pictures
    logits = torch.cat([model(files.prepare(part)) for part in images.split(25)])
    assert logits.shape == (IMAGES, 10)
    share = float((logits.argmax(1) == labels).double().mean())
    assert share >= files.read_facts()["test_accuracy"] - 0.02


def test_trained_file_is_small_and_says_how_it_was_made(files: ModuleType) -> None:
    assert files.HEAD.stat().st_size < 3e6
    facts = files.read_facts()
    assert {"train_images", "test_images", "seed", "torch", "rank"} <= facts.keys()


def test_loaded_model_is_plain_timm_and_whole(files: ModuleType, model: Any) -> None:
    assert not model.training
    assert type(model.backbone).__module__.startswith("timm.")
    assert {type(layer) for layer in model.backbone.blocks.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@torch.no_grad()
def test_position_table_is_resampled_around_the_class_token(files: ModuleType, model: Any) -> None:
    table = files.read_backbone()["pos_embed"]
    side = files.SIZE // files.PATCH
    assert table.shape == (1, 1 + 37 * 37, 384)
    assert model.backbone.pos_embed.shape == (1, 1 + side * side, 384)
    assert torch.equal(model.backbone.pos_embed[:, 0], table[:, 0])
    assert torch.equal(model.backbone.pos_embed, files.resample_positions(table, side))
    # The middle of one grid is the middle of the other.
    middle = model.backbone.pos_embed[0, 1:].unflatten(0, (side, side))[6:8, 6:8].mean((0, 1))
    alike = torch.cosine_similarity(middle, table[0, 1:], dim=1).argmax().item()
    assert 15 <= alike // 37 <= 21
    assert 15 <= alike % 37 <= 21


@torch.no_grad()
def test_corrections_start_at_nothing_and_load_as_trained(files: ModuleType, tmp_path: Path) -> None:
    needed(files.MODEL)
    training = example("train_cifar")
    plain = files.CifarModel(files.build_backbone())
    adapted = files.CifarModel(training.adapt(files.build_backbone(), 2))
    trained = training.trained_parameters(adapted)
    adapted.head.load_state_dict(plain.head.state_dict())
    x = files.prepare(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert torch.equal(adapted.eval()(x), plain.eval()(x))
    for name, parameter in trained.items():
        if name.endswith(".up"):
            parameter.copy_(0.01 * torch.randn(parameter.shape))
        parameter.copy_(parameter.half())
    path = tmp_path / "head.safetensors"
    training.save({name: value.half() for name, value in trained.items()}, path, {"seed": 3})
    loaded = files.load_model(head=path)
    assert files.read_facts(path) == {"seed": 3}
    assert (loaded(x) - plain(x)).abs().max() > 1e-3
    torch.testing.assert_close(loaded(x), adapted(x), rtol=1e-3, atol=1e-3)


def test_classes_take_turns(files: ModuleType, pictures: tuple[Tensor, Tensor]) -> None:
    images, labels = pictures
    assert (images.dtype, images.shape) == (torch.uint8, (IMAGES, 3, 32, 32))
    assert torch.equal(labels, torch.arange(10).repeat(IMAGES // 10))
    fewer, _ = files.load_cifar("test", 13)
    assert torch.equal(fewer, images[:13])
    with pytest.raises(ValueError, match="has 5000 pictures, 5001 were asked for"):
        files.load_cifar("test", 5001)


def test_pictures_are_enlarged_and_normalised(files: ModuleType) -> None:
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    prepared = files.prepare(images)
    assert prepared.shape == (2, 3, 196, 196)
    torch.testing.assert_close(prepared[0, :, 5, 7], (1 - torch.tensor([0.485, 0.456, 0.406])) / _DEVIATION)
    assert files.prepare(images, 98).shape == (2, 3, 98, 98)


_DEVIATION = torch.tensor([0.229, 0.224, 0.225])


def test_missing_files_are_named_with_the_option_that_helps(files: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors.*--backbone"):
        files.load_model(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors.*--output"):
        files.load_model(head=tmp_path / "absent.safetensors")
    for split in ("train", "test"):
        with pytest.raises(FileNotFoundError, match=rf"absent\.npz.*--{split}"):
            files.load_cifar(split, path=tmp_path / "absent.npz")


def test_other_weights_are_refused(files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    example("train_cifar").save({"head.0.weight": torch.ones(768)}, path, {})
    with pytest.raises(ValueError, match="is not the saliency model"):
        files.load_model(path)
    needed(files.MODEL)
    with pytest.raises(ValueError, match=r"is not what train_cifar\.py writes: missing or unknown weights backbone\."):
        files.load_model(head=path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--test-images", "-1"], "--test-images must be at least 1, got -1"),
        (["--coarse", "0", "--fine", "0"], "there is nothing to train on"),
        (["--output", "no/such/folder/head.safetensors"], "does not exist"),
    ],
)
def test_wrong_flags_are_errors_of_the_parser(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        example("train_cifar").parse()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_training_names_the_missing_file_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--test", str(tmp_path / "absent.npz"), "--threads", "1"])
    with pytest.raises(SystemExit, match=r"train_cifar: .*absent\.npz.*--test"):
        example("train_cifar").main()


def test_learning_rate_warms_up_and_ends_low() -> None:
    rate = example("train_cifar").learning_rate
    rates = [rate(step, 400, 1e-3) for step in range(400)]
    assert rates[0] < 1e-4
    assert 0.9e-3 < max(rates) <= 1e-3
    assert rates[-1] < 3e-5
