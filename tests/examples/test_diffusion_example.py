"""The denoiser of examples/: how it is built, trained, resumed and read, and that what it draws can be repeated."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.examples.loading import example, needed

PARAMETERS = 1_316_035
IMAGES = 20

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def files() -> ModuleType:
    return example("diffusion_model")


@pytest.fixture(scope="module")
def untrained(files: ModuleType) -> Any:
    torch.manual_seed(0)
    return files.build_model().eval()


@pytest.fixture(scope="module")
def trained(files: ModuleType) -> Any:
    return files.load_model()


@pytest.fixture(scope="module")
def digits(files: ModuleType) -> tuple[Tensor, Tensor]:
    pictures: tuple[Tensor, Tensor] = files.load_pictures("digits", "test", 4)
    return pictures


def loss_of(files: ModuleType, model: nn.Module, pictures: tuple[Tensor, Tensor], seed: int = 1) -> float:
    return float(files.denoising_loss(model, *pictures, torch.Generator().manual_seed(seed)))


def train(tmp_path: Path, *flags: str) -> Path:
    """Run the training script on digits, with its checkpoint and its weights in `tmp_path`; the weights."""
    training = example("train_diffusion")
    output = tmp_path / "denoiser.safetensors"
    sizes = ["--batch", "4", "--watched", "1", "--test-images", "1", "--threads", "1"]
    given = ["--source", "digits", "--folder", str(tmp_path), "--output", str(output), *sizes, *flags]
    training.run_training(training.parse(given), importlib.import_module("rich.console").Console(quiet=True))
    return output


def test_model_is_the_libraries_own_with_attention_at_two_resolutions(files: ModuleType, untrained: Any) -> None:
    assert sum(parameter.numel() for parameter in untrained.parameters()) == PARAMETERS
    assert type(untrained.unet).__name__ == "UNet2DConditionModel"
    tokens: list[int] = []
    blocks = [module for module in untrained.modules() if type(module).__name__ == "BasicTransformerBlock"]
    hooks = [block.attn1.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1])) for block in blocks]
    with torch.no_grad():
        velocity = untrained(torch.zeros(2, 3, 32, 32), torch.tensor([5, 900]), torch.tensor([3, files.NULL]))
    for hook in hooks:
        hook.remove()
    assert velocity.shape == (2, 3, 32, 32)
    assert tokens == [1024, 256, 256, 256, 1024, 1024]


def test_loss_is_repeatable_and_depends_on_the_noise_alone(
    files: ModuleType, untrained: Any, digits: tuple[Tensor, Tensor]
) -> None:
    first = loss_of(files, untrained, digits)
    assert loss_of(files, untrained, digits) == first
    assert loss_of(files, untrained, digits, seed=2) != first
    # A model that says nothing is wrong by the whole velocity.
    nothing: Any = lambda x, *_: torch.zeros_like(x)  # noqa: E731
    assert loss_of(files, nothing, digits) == pytest.approx(0.9, abs=0.2)


def test_perfect_answer_has_no_loss(files: ModuleType) -> None:
    images, noise, timesteps = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([100, 800])
    velocity = files.noise_schedule().get_velocity(images, noise, timesteps)
    assert files.velocity_loss(lambda *_: velocity, images, torch.tensor([0, 1]), timesteps, noise) == 0


def test_sampler_finds_the_picture_that_a_perfect_model_knows(files: ModuleType) -> None:
    picture = torch.rand(3, 32, 32) * 1.8 - 0.9
    shares = files.noise_schedule().alphas_cumprod.sqrt(), (1 - files.noise_schedule().alphas_cumprod).sqrt()

    def perfect(x: Tensor, timesteps: Tensor, _: Tensor) -> Tensor:
        signal, spread = (share[timesteps][:, None, None, None] for share in shares)
        noise = (x - signal * picture) / spread
        return signal * noise - spread * picture

    drawn = files.sample(perfect, [1, 2], steps=4)
    torch.testing.assert_close(drawn, picture.expand(2, -1, -1, -1), rtol=0, atol=2e-3)


def test_samples_are_repeatable_and_heed_seed_class_and_guidance(files: ModuleType, trained: Any) -> None:
    first = files.sample(trained, [1, 7], steps=2, seed=3)
    assert first.shape == (2, 3, 32, 32)
    assert -1 <= first.min() <= first.max() <= 1
    assert torch.equal(files.sample(trained, [1, 7], steps=2, seed=3), first)
    assert not torch.equal(files.sample(trained, [1, 7], steps=2, seed=4), first)
    assert not torch.equal(files.sample(trained, [1, 7], steps=2, seed=3, guidance=1.0), first)
    other = files.sample(trained, [1, 2, 3], steps=2, seed=3)
    torch.testing.assert_close(other[0], first[0], rtol=0, atol=1e-3)
    assert (other[1] - first[1]).abs().max() > 1e-2


def test_without_a_class_guidance_changes_nothing(files: ModuleType, trained: Any) -> None:
    weak, strong = (files.sample(trained, [files.NULL], steps=2, guidance=guidance) for guidance in (1.0, 5.0))
    torch.testing.assert_close(weak, strong, rtol=0, atol=1e-4)


def test_carried_weights_are_small_and_say_how_they_were_made(files: ModuleType) -> None:
    assert files.WEIGHTS.stat().st_size < 3e6
    facts = files.read_facts()
    assert {"source", "held_out_loss", "held_out_images", "pictures_seen", "minutes", "seed", "torch"} <= facts.keys()


def test_carried_weights_denoise_unseen_pictures(files: ModuleType, trained: Any, untrained: Any) -> None:
    facts = files.read_facts()
    path = example("cifar_model").FILES["test"]
    if facts["source"] == "cifar":
        needed(path)
    pictures = files.load_pictures(facts["source"], "test", IMAGES)
    loss = loss_of(files, trained, pictures)
    assert loss == pytest.approx(facts["held_out_loss"], rel=0.2)
    few = (pictures[0][:5], pictures[1][:5])
    assert loss_of(files, trained, few) < 0.3 * loss_of(files, untrained, few)


def test_pictures_of_digits_are_coloured_and_scaled_like_the_others(files: ModuleType) -> None:
    images, labels = files.load_pictures("digits", "train", 20)
    assert images.shape == (20, 3, 32, 32)
    assert (images.min(), images.max()) == (-1, 1)
    assert set(labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="297 digits to test, 298 were asked for"):
        files.load_pictures("digits", "test", 298)
    with pytest.raises(ValueError, match="no pictures called 'faces': cifar or digits"):
        files.load_pictures("faces", "test")


def test_training_goes_on_from_its_checkpoint_as_if_never_cut_off(files: ModuleType, tmp_path: Path) -> None:
    training = example("train_diffusion")
    args = training.parse(["--source", "digits", "--folder", str(tmp_path), "--batch", "4", "--steps", "4"])
    pictures = files.load_pictures("digits", "train", 20)
    whole = training.start_run(args)
    for _ in range(2):
        training.train_step(whole, *pictures, args)
    training.save_run(whole, "digits", tmp_path)
    resumed = training.resume_run(args)
    assert (resumed.steps, resumed.pictures, resumed.seconds) == (2, [8, 0], whole.seconds)
    for _ in range(2):
        assert training.train_step(resumed, *pictures, args) == training.train_step(whole, *pictures, args)
    # By then the run was past its share of half-size pictures.
    assert resumed.pictures == whole.pictures == [8, 4]
    for name, value in whole.average.state_dict().items():
        assert torch.equal(resumed.average.state_dict()[name], value)


def test_training_script_writes_its_weights_and_resumes(files: ModuleType, tmp_path: Path) -> None:
    weights = train(tmp_path, "--steps", "2")
    facts = files.read_facts(weights)
    assert (facts["steps"], facts["pictures_seen"]) == (2, {"16 pixels": 4, "32 pixels": 2})
    assert (facts["source"], facts["data"][:12]) == ("digits", "scikit-learn")
    before = files.load_model(weights)
    assert files.read_facts(train(tmp_path, "--steps", "3", "--resume"))["steps"] == 3
    name = "unet.conv_in.weight"
    assert not torch.equal(files.load_model(weights).get_parameter(name), before.get_parameter(name))


@pytest.mark.nightly("12 s; that training steps, resumes and writes its weights is tested beside it")
def test_training_learns(files: ModuleType, tmp_path: Path) -> None:
    model = files.load_model(train(tmp_path, "--steps", "15", "--coarse-share", "0.8", "--batch", "16"))
    pictures = files.load_pictures("digits", "test", 2)
    torch.manual_seed(0)
    assert loss_of(files, model, pictures) < 0.8 * loss_of(files, files.build_model(), pictures)


def test_learning_rate_warms_up_and_ends_low() -> None:
    rates = [example("train_diffusion").learning_rate(step / 400, 1e-3) for step in range(400)]
    assert rates[0] < 1e-4
    assert 0.9e-3 < max(rates) <= 1e-3
    assert rates[-1] < 3e-5


def test_resuming_names_what_is_wrong(files: ModuleType, untrained: Any, tmp_path: Path) -> None:
    training = example("train_diffusion")
    args = training.parse(["--source", "digits", "--folder", str(tmp_path), "--resume"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint\.pt.*--resume"):
        training.resume_run(args)
    training.save_run(training.start_run(args), "cifar", tmp_path)
    with pytest.raises(ValueError, match="was trained on cifar, not on digits"):
        training.resume_run(args)


def test_missing_and_other_weights_are_named(files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors.*--output"):
        files.load_model(path)
    files.save_model(nn.Linear(2, 2), path, {})
    with pytest.raises(ValueError, match=r"is not what train_diffusion\.py writes: wrong weights bias"):
        files.load_model(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [11]}, r"labels must be a list of numbers from 0 to 10, got \[11\]"),
        ({"labels": []}, "labels must be a list"),
        ({"labels": [1], "steps": 0}, "steps must be from 1 to 1000, got 0"),
    ],
)
def test_sampling_refuses_what_it_cannot_draw(
    files: ModuleType, untrained: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        files.sample(untrained, **arguments)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_diffusion", ["--batch", "0"], "--batch must be at least 1, got 0"),
        ("train_diffusion", ["--minutes", "0"], "--minutes must be more than 0, got 0.0"),
        ("train_diffusion", ["--coarse-share", "1.5"], "--coarse-share must be from 0 to 1, got 1.5"),
        ("train_diffusion", ["--output", "no/such/folder/x.safetensors"], "does not exist"),
        ("diffusion", ["--ratio", "0.5", "0.8"], "--ratio must be above 0 and at most 0.75, got 0.8"),
        ("diffusion", ["--labels", "11"], "--labels must be from 0 to 10, got 11"),
        ("diffusion", ["--steps", "0"], "--steps must be from 1 to 1000, got 0"),
        ("diffusion", ["--output", "no/such/folder/x.png"], "does not exist"),
    ],
)
def test_wrong_flags_are_errors_of_the_parser(
    script: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example(script).parse(flags)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_comparison_draws_plain_and_tomesd_and_leaves_no_patch(
    files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tomesd")
    output = tmp_path / "grid.png"
    flags = ["--methods", "tomesd", "--ratio", "0.5", "--labels", "1", "7", "--steps", "2", "--loss-batches", "1"]
    monkeypatch.setattr(sys, "argv", ["diffusion.py", *flags, "--threads", "1", "--output", str(output)])
    example("diffusion").main()
    printed = capsys.readouterr().out
    assert output.stat().st_size > 5000
    assert "tomesd 0.5" in printed
    assert "dB" in printed


def test_tomesd_patch_changes_the_answer_and_is_removed(files: ModuleType, trained: Any) -> None:
    pytest.importorskip("tomesd")
    script = example("diffusion")
    plain = files.sample(trained, [1], steps=2)
    with script.prepare(trained, script.Variant("tomesd", "tomesd 0.5", 0.5), "eager") as patched:
        merged = files.sample(patched, [1], steps=2)
    assert 1e-3 < (merged - plain).abs().mean() < 0.5
    assert torch.equal(files.sample(trained, [1], steps=2), plain)


def test_missing_tomesd_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = example("diffusion")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    console = importlib.import_module("rich.console").Console()
    assert script.usable_methods(["tofu", "tomesd"], console) == ["tofu"]
    assert "pip install tomesd" in capsys.readouterr().out


def test_similarity_of_pictures_is_in_decibels() -> None:
    variant = example("diffusion").Variant
    plain, near = variant("plain", "plain", images=torch.zeros(1, 3, 4, 4)), variant("tofu", "tofu", 0.5)
    near.images = torch.full((1, 3, 4, 4), 0.2)
    assert near.psnr(plain) == pytest.approx(20.0)
    assert plain.psnr(plain) == float("inf")
