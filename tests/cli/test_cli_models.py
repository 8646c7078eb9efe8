"""`tofu-fx calibrate`, `explain`, `bench` and `plan`: from a model and inputs on disk to a plan and a table."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tofu_fx
from tofu_fx import Plan, cli
from tofu_fx.report.swept import Sweep, SweepRow

FACTORIES = """
import timm, torch

def vit():
    torch.manual_seed(7)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, embed_dim=48, num_heads=3, num_classes=5, global_pool="avg"
    )

def of_class_token():
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, embed_dim=48, num_heads=3)

def number():
    return 3

def plain():
    return torch.nn.Flatten()
"""
VIT = "tofu_cli_factories:vit"


@dataclass
class Done:
    code: int
    out: str
    err: str


def tofu(*arguments: Any) -> Done:
    """The command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with factories, pictures and weights."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tofu_cli_factories.py").write_text(FACTORIES)
    (folder / "pictures" / "more").mkdir(parents=True)
    (folder / "empty").mkdir()
    for number in range(5):
        Image.effect_noise((80, 70), 20 + 20 * number).convert("RGB").save(folder / f"pictures/more/{number}.png")
    save_file({"cls_token": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "text.json").write_text("no plan")
    return folder


@pytest.fixture(scope="module")
def configs(home: Path) -> Path:
    """A folder with the configurations of two small models of transformers."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    transformers.ViTConfig(image_size=64, patch_size=16, **small).save_pretrained(home / "vit")
    transformers.BertConfig(vocab_size=99, max_position_embeddings=40, **small).save_pretrained(home / "bert")
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = list(sys.path)
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "160")
    yield
    sys.path[:] = path


@pytest.fixture(scope="module")
def calibrated(home: Path) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return tofu(
            "calibrate", VIT, "-o", "plan.json", "--inputs", "pictures", "--samples", 4, "--flops", 0.75,
            "--inner-backend", "eager", "--plot", "plan.png", "--seed", 3,
        )  # fmt: skip


def test_calibrate_writes_a_plan_that_compiles(calibrated: Done, home: Path) -> None:
    assert calibrated.code == 0, calibrated.err
    plan = Plan.load(home / "plan.json")
    assert plan.calibration is not None
    assert (plan.calibration.target, plan.calibration.value) == ("flops", 0.75)
    assert (plan.calibration.samples, plan.calibration.seed) == (4, 3)
    assert [row.id for row in plan.sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert (home / "plan.png").read_bytes().startswith(b"\x89PNG")
    done = tofu("explain", VIT, "--plan", "plan.json")
    assert done.code == 0, done.err
    before, after = 17, 17 - sum(row.r for row in plan.sites)
    assert f"tokens: {before} → {after}" in done.out


def test_calibrate_prints_the_table_and_warns_of_nothing_with_real_inputs(calibrated: Done) -> None:
    assert "target flops 0.75" in calibrated.out
    assert "blocks.1.attn" in calibrated.out
    assert "random" not in calibrated.err
    assert "the plan is in plan.json" in calibrated.err


def test_quiet_calibration_of_noise_prints_the_warnings_only(configs: Path, tmp_path: Path) -> None:
    done = tofu(
        "calibrate", "hf-config:vit", "-o", tmp_path / "plan.json", "--samples", 2,
        "--flops", 0.9, "--inner-backend", "eager", "--quiet", "--policy", "linearity",
    )  # fmt: skip
    assert (done.code, done.out) == (0, ""), done.err
    noise, weights = done.err.splitlines()
    assert "the inputs are random noise" in noise
    assert "--inputs" in noise
    assert "random weights" in weights
    calibration = json.loads((tmp_path / "plan.json").read_text())["calibration"]
    assert calibration["policy"] == "linearity"
    assert len(Plan.load(tmp_path / "plan.json").sites) == 2


def test_explain_does_what_its_options_say() -> None:
    done = tofu("explain", VIT, "--r", "2,3", "--strategy", "mean")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if "blocks." in line]
    assert [(row[1], row[5:8], row[9]) for row in rows] == [
        ("blocks.0.attn", ["17", "→", "15"], "mean"),
        ("blocks.1.attn", ["15", "→", "12"], "mean"),
    ]


def test_explain_says_which_rows_nobody_reads_and_computes_them_if_that_is_asked_for() -> None:
    done = tofu("explain", "tofu_cli_factories:of_class_token", "--ratio", 0.4)
    assert (done.code, "16 of 17 rows are read by nobody and not computed" in done.out) == (0, True), done.err
    done = tofu("explain", "tofu_cli_factories:of_class_token", "--ratio", 0.4, "--unread", "keep")
    assert (done.code, "read by nobody" in done.out) == (0, False), done.err


def test_explain_takes_models_of_pictures_and_of_text_from_transformers(configs: Path) -> None:
    done = tofu("explain", "hf-config:vit", "--ratio", 0.4, "--placement", "stream")
    assert (done.code, done.out.count("17 → ")) == (0, 2), done.err
    done = tofu("explain", "hf-config:bert", "--r", 4, "--placement", "stream")
    assert (done.code, done.out.count("40 → 36")) == (0, 1), done.err
    done = tofu("explain", "hf-config:bert", "--length", 30, "--r", 4, "--placement", "stream")
    assert (done.code, done.out.count("30 → 26")) == (0, 1), done.err


def test_bench_shows_plain_and_every_variant(calibrated: Done) -> None:
    done = tofu(
        "bench", VIT, "--plan", "plan.json", "--ratio", "0.3,0.6", "--strategy", "mlerp", "--batch", 3, "--rounds", 2,
        "--inner-backend", "eager", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "batches of 3, float32, on CPU" in done.out
    rows = [line.split() for line in done.out.splitlines() if "%" in line]
    assert [" ".join(row[:-6]) for row in rows] == ["plain eager", "plan.json", "mlerp, ratio 0.3", "mlerp, ratio 0.6"]
    flops, speed = ([row[place] for row in rows] for place in (-6, -3))
    assert (flops[0], speed[0]) == ("100.0%", "1.00x")
    left = [float(text.rstrip("%")) for text in flops]
    assert 65 < left[1] <= 75
    assert 100 > left[2] > left[3]


def test_sweep_passes_on_what_was_asked_and_writes_rows_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def sweep(model: Any, inputs: torch.Tensor, **arguments: Any) -> Sweep:
        asked.update(arguments, samples=len(inputs))
        rows = [
            SweepRow("plain", None, 1.0, 1.0, 0.2, None, 0.0),
            SweepRow("uniform mean", 0.6, 0.59, 1.4, 0.1, None, 0.3),
        ]
        return Sweep(rows, "kl", 2, 4, "a fast one", "eager")

    monkeypatch.setattr(tofu_fx, "sweep", sweep)
    done = tofu(
        "bench", VIT, "--sweep", "--flops", "0.6,0.5", "--csv", tmp_path / "a.csv", "--png", tmp_path / "a.png",
        "--samples", 4, "--batch", 2, "--inner-backend", "eager", "--seed", 5, "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    expected = {"flops": [0.6, 0.5], "inner_backend": "eager", "seed": 5, "batch_size": 2, "samples": 4}
    assert {key: asked[key] for key in expected} == expected
    assert "random noise" in done.err
    assert "1.40x" in done.out
    assert (tmp_path / "a.csv").read_text().splitlines()[2] == "uniform mean,0.6,0.59,1.4,0.1,,0.3"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plan_show_prints_and_draws(calibrated: Done, tmp_path: Path) -> None:
    done = tofu("plan", "show", "plan.json", "--plot", tmp_path / "shown.png")
    assert done.code == 0, done.err
    assert "blocks.0.attn" in done.out
    assert (tmp_path / "shown.png").read_bytes().startswith(b"\x89PNG")


def test_plan_diff_exits_with_0_3_or_1(calibrated: Done, home: Path, tmp_path: Path) -> None:
    content = json.loads((home / "plan.json").read_text())
    content["sites"][1]["r"] += 1
    (tmp_path / "edited.json").write_text(json.dumps(content))
    assert tofu("plan", "diff", "plan.json", "plan.json").out == "no difference\n"
    assert tofu("plan", "diff", "plan.json", "plan.json").code == 0
    # In a process of its own, as a script would ask.
    command = [sys.executable, "-m", "tofu_fx.cli", "plan", "diff", "plan.json", str(tmp_path / "edited.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "1 site differs" in done.stdout
    assert "blocks.1.attn" in done.stdout
    assert "blocks.0.attn" not in done.stdout
    failed = tofu("plan", "diff", "plan.json", "nowhere.json", "--debug")
    assert failed.code == 1
    assert "Traceback" in failed.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain", "vit_tiny_patch16_224"], "did you mean timm:vit_tiny_patch16_224?"),
        (["explain", "timm:vit_tiny_patch16_22"], "did you mean vit_tiny_patch16_224"),
        (["explain", "nowhere_at_all:f"], "no module 'nowhere_at_all'"),
        (["explain", "tofu_cli_factories:vid"], "has no function 'vid'"),
        (["explain", "tofu_cli_factories:number"], "number() returns a torch.nn.Module, got int"),
        (["explain", "tofu_cli_factories:plain"], "give --image-size"),
        (["explain", VIT, "--pretrained"], "only timm: models have it"),
        (["explain", VIT, "--weights", "no.safetensors"], "no.safetensors: No such file"),
        (["explain", VIT, "--weights", "text.json"], "text.json: not a .safetensors file"),
        (["explain", VIT, "--weights", "other.safetensors"], "cls_token is [2], not [1, 1, 48]"),
        (["explain", VIT, "--device", "abacus"], "--device abacus"),
        (["explain", VIT, "--inputs", "nowhere"], "nowhere: no such folder or file"),
        (["explain", VIT, "--inputs", "empty"], "empty: no pictures in it; expected files that end in .bmp"),
        (["explain", VIT, "--inputs", "text.json"], "text.json: not an .npz file"),
        (["explain", VIT, "--plan", "nowhere.json"], "nowhere.json"),
        (["explain", VIT, "--plan", "text.json"], "is not JSON"),
        (["explain", "hf:./empty"], "MODEL hf:./empty cannot be loaded: expected"),
        (["explain", "hf:./empty", "--image-size", "32"], "use hf-config:./empty"),
        (
            ["calibrate", VIT, "-o", "nowhere/plan.json"],
            "--output nowhere/plan.json: the folder nowhere does not exist",
        ),
        (["calibrate", VIT, "-o", "p.json", "--plot", "nowhere/p.png"], "--plot nowhere/p.png"),
        (["bench", VIT, "--csv", "a.csv"], "--csv belongs to --sweep"),
        (["bench", VIT, "--sweep", "--ratio", "0.5"], "leave out --plan and --ratio"),
        (["plan", "show", "text.json"], "text.json' is not JSON"),
    ],
)
def test_wrong_files_and_models_are_one_line_that_says_what_to_do(arguments: list[str], expected: str) -> None:
    done = tofu(*arguments)
    assert done.code == 1
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("tofu-fx: error: ")
    assert expected in line


def test_plan_of_another_model_is_one_line_although_dynamo_wraps_it(calibrated: Done) -> None:
    done = tofu(
        "bench", "timm:vit_tiny_patch16_224", "--image-size", 64, "--plan", "plan.json", "--inner-backend", "eager"
    )
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith("tofu-fx: error: the plan is of another model")
    assert "Dynamo" not in line


def test_own_weights_are_loaded(home: Path) -> None:
    import importlib

    from tofu_fx.cli.models import load_model

    sys.path.insert(0, str(home))
    weights = importlib.import_module("tofu_cli_factories").vit().state_dict()
    weights["cls_token"] = weights["cls_token"] + 1
    save_file(weights, home / "mine.safetensors")
    arguments = ["explain", VIT, "--weights", str(home / "mine.safetensors"), "--dtype", "bfloat16"]
    loaded = load_model(cli.build_parser(cli.COMMANDS).parse_args(arguments))
    assert loaded.trained
    assert not loaded.model.training
    assert torch.equal(loaded.model.state_dict()["cls_token"], weights["cls_token"].bfloat16())
