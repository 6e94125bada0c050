"""`d2r evaluate`: any checkpoint, in whatever it is wrapped, or one message that says what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import digits
import pandas as pd
import pyautoattack
import pytest
import torch
from project import SHARED
from typer.testing import CliRunner

from d2r_core import checkpoint, models
from d2r_core.attacks import Clean
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import run_attack
from d2r_core.data import Split, save_split
from d2r_core.errors import UserError
from flows.cli import app
from tasks.config.settings import Settings
from tasks.data import evaluation_images
from tasks.evaluation.report_schema import AttackFigures, RobustnessReport

pytestmark = pytest.mark.slow

ARCHITECTURE: dict[str, Any] = {
    "name": "wide_resnet",
    "num_classes": 10,
    "image_size": 8,
    "depth": 10,
    "widen_factor": 1,
}
OPTIONS = ["--architecture", "wide_resnet", "--depth", "10", "--widen-factor", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_settings: Callable[..., Settings]) -> Path:
    """A folder with a params.yaml and ten test images."""
    settings = tiny_settings(evaluate={"eps": digits.EPS, "step_size": 0.05, "check_images": 4})
    (tmp_path / "params.yaml").write_text(json.dumps(settings.model_dump(mode="json", by_alias=True)))
    save_split(tmp_path / "ten.safetensors", digits.unseen(10))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: str, data: str = "ten.safetensors") -> Any:
    return CliRunner().invoke(app, ["evaluate", "--data", data, "--classes", "10", *arguments])


def attacks(out: str) -> dict[str, AttackFigures]:
    return RobustnessReport.read(Path(out, "robustness.json")).target.attacks


def test_a_published_checkpoint_and_our_own_give_the_same_figures(folder: Path) -> None:
    checkpoint.save(folder / "ours.safetensors", digits.model(), {"architecture": ARCHITECTURE})
    state = {f"module.{name}": tensor for name, tensor in digits.state().items()}
    state["module.sub_block1.layer.0.bn1.weight"] = torch.ones(3)
    torch.save({"state_dict": state, "epoch": 3}, "theirs.pt")

    ours = evaluate("--checkpoint", "ours.safetensors", "--out", "a", "--eps", "1/5", "--steps", "3")
    assert ours.exit_code == 0, ours.exception
    assert "PGD-3" in ours.stdout
    assert "Gradients are neither zero nor NaN" in ours.stdout
    theirs = evaluate("--checkpoint", "theirs.pt", *OPTIONS, "--out", "b", "--eps", "0.2", "--steps", "3")
    assert theirs.exit_code == 0, theirs.exception
    assert attacks("a") == attacks("b")
    target = RobustnessReport.read(Path("a/robustness.json")).target
    assert list(target.costs) == ["fgsm", "pgd", "cw"]
    assert target.curves.median_perturbation is not None
    assert f"median minimal perturbation (Linf) {target.curves.median_perturbation.value:.5g}" in ours.stdout
    pgd = attacks("a")["pgd"]
    assert (pgd.eps, pgd.steps, pgd.images) == (0.2, 3, 10)
    assert pgd.step_size == pytest.approx(0.05 * 0.2 / digits.EPS)
    config = EvaluationConfig(batch_size=10, seed=0, device=torch.device("cpu"))
    result = run_attack(digits.model(), digits.unseen(10), Clean(), config)
    rows = pd.read_parquet("a/examples.parquet")
    assert rows[rows["attack"] == "clean"]["prediction"].tolist() == result.predictions.tolist()
    assert "3 steps of 0.06667" in Path("a/report.html").read_text()
    assert not list((folder / "state").iterdir())


def save_wrong_files() -> None:
    torch.save(digits.state(), "right.pt")
    torch.save(models.build("wide_resnet", num_classes=7, image_size=8, depth=10, widen_factor=1).state_dict(), "7.pt")
    torch.save({"state_dict": digits.state(), "made_by": Path("x")}, "pickle.pt")
    torch.save({"model": digits.state(), "ema": digits.state()}, "two.pt")
    checkpoint.save(Path("ours.safetensors"), digits.model(), {"architecture": ARCHITECTURE})
    torch.save({"epoch": 3}, "empty.pt")
    Path("text.pt").write_text("weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pt", *OPTIONS], r"absent\.pt: there is no such file"),
        (["text.pt", *OPTIONS], r"text\.pt: cannot be read as weights \(it is no checkpoint\)"),
        (["empty.pt", *OPTIONS], r"empty\.pt: holds no weights"),
        (["pickle.pt", *OPTIONS], r"it is a pickle that asks for pathlib\.\w+, and code from a file is never run"),
        (["7.pt", *OPTIONS], r"7\.pt: has 7 classes, not 10 as the data has"),
        (
            ["right.pt", "--architecture", "preact_resnet18", "--shortcut-from", "input"],
            r"does not fit PreActResNet18: it lacks layer1\.0",
        ),
        (["right.pt", "--architecture", "preact_resnet18"], r"preact_resnet18 needs --shortcut-from \(activated as in"),
        (["right.pt", "--architecture", "resnet18"], r"resnet18 needs --strides \(1,2,2,2 as in TRADES"),
        (
            ["right.pt", "--architecture", "dm_preact_resnet18"],
            r"dm_preact_resnet18 needs --activation and --normalize \(or --mean and --std\)",
        ),
        (["right.pt", *OPTIONS, "--activation", "silu"], r"wide_resnet has no --activation"),
        (["right.pt", *OPTIONS, "--mean", "0.5,0.5,0.5"], r"--mean and --std together, or by --normalize NAME"),
        (["right.pt", *OPTIONS, "--mean", "125,123,114", "--std", "1,1,1"], r"--mean 125,123,114: write three numbers"),
        (["right.pt", *OPTIONS, "--mean", "0,0,0", "--std", "1,1,0"], r"--std 1,1,0: must be above 0"),
        (["two.pt", *OPTIONS], r"two\.pt: holds 2 sets of weights: model, ema\. Say which one: --key NAME"),
        (
            ["ours.safetensors", "--normalize", "none", "--key", "ema"],
            r"leave out --normalize \(or --mean and --std\) and --key",
        ),
        (["right.pt", *OPTIONS, "--expect-clean", "40"], r"--expect-clean 40: the clean accuracy is \d+\.\d+% \("),
        (["right.pt"], r"right\.pt: has no JSON beside it, so its architecture must be given: --architecture"),
        (["right.pt", "--architecture", "wide_resnet"], r"wide_resnet needs --depth and --widen-factor"),
        (["right.pt", *OPTIONS, "--width", "16"], r"wide_resnet has no --width"),
        (["right.pt", *OPTIONS[:2], "--depth", "12", "--widen-factor", "1"], r"--depth 12: allowed are 10, 16, 22"),
        (["right.pt", *OPTIONS, "--strides", "1,2"], r"--strides 1,2: write four numbers"),
        (["right.pt", *OPTIONS, "--norm", "L2"], r"--norm L2: evaluate\.eps is a radius in Linf\. Give --eps too"),
        (["right.pt", *OPTIONS, "--steps", "0"], r"the options: evaluate\.steps is 0; input should be greater"),
        (["models:/digits", *OPTIONS], r"models:/digits: write models:/NAME@champion"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str) -> None:
    save_wrong_files()
    refused = evaluate("--checkpoint", *arguments)
    assert isinstance(refused.exception, UserError), refused.exception
    with pytest.raises(UserError, match=message):
        raise refused.exception


@pytest.mark.parametrize(("options", "assumed"), [([], True), (["--normalize", "none"], False)])
def test_what_is_assumed_of_a_checkpoint_is_said(options: list[str], assumed: bool) -> None:
    save_wrong_files()
    stopped = evaluate("--checkpoint", "right.pt", *OPTIONS, *options, "--expect-clean", "1")
    assert "--expect-clean 1: the clean accuracy is" in str(stopped.exception)
    assert ("assumed to take pixels in [0, 1] as they are" in stopped.stderr) == assumed


def test_the_expected_clean_accuracy_lets_the_right_model_pass_alone(folder: Path) -> None:
    """A model that was trained behind a normalisation fits without it, and is wrong."""
    behind = {**digits.state(), "conv1.weight": digits.state()["conv1.weight"] * 0.1}  # images are divided by 0.1
    torch.save({"model": digits.network().state_dict(), "ema": behind}, "theirs.pt")
    options = ["--checkpoint", "theirs.pt", *OPTIONS, "--key", "ema", "--steps", "1", "--eps", "0.01", "--out", "out"]
    normalization = {"mean": [0.0] * 3, "std": [0.1] * 3}
    config = EvaluationConfig(batch_size=40, seed=0, device=torch.device("cpu"))
    save_split(folder / "ten.safetensors", digits.unseen(200))
    normalised = models.build(**ARCHITECTURE, normalization=normalization)
    models.load_weights(normalised, folder / "theirs.pt", key="ema")
    correct = run_attack(normalised, digits.unseen(200), Clean(), config).correct(digits.unseen(200).labels)
    clean = 100 * float(correct.double().mean())
    assert clean > 80

    refused = evaluate(*options, "--normalize", "none", "--expect-clean", f"{clean:.2f}")
    passed = evaluate(*options, "--mean", "0,0,0", "--std", "0.1,0.1,0.1", "--expect-clean", f"{clean:.2f}")

    assert "so this is another model than the expected one" in str(refused.exception)
    assert passed.exit_code == 0, passed.exception
    assert attacks("out")["clean"].accuracy == clean / 100
    report = RobustnessReport.read(Path("out/robustness.json"))
    assert report.target.architecture["normalization"] == normalization
    assert report.warnings == ()


def test_an_accuracy_near_chance_is_a_warning(folder: Path) -> None:
    """Weights that fit by name and shape, in the variant that they were not trained in."""
    torch.manual_seed(0)
    torch.save(models.build(**ARCHITECTURE).state_dict(), "untrained.pt")
    save_split(folder / "ten.safetensors", digits.unseen(100))
    options = [*OPTIONS, "--normalize", "none", "--steps", "1", "--eps", "0.01", "--out", "out"]
    evaluated = evaluate("--checkpoint", "untrained.pt", *options)
    assert evaluated.exit_code == 0, evaluated.exception
    (warning,) = RobustnessReport.read(Path("out/robustness.json")).warnings
    assert "near chance (10.00%): the model is hardly the one that it is taken for" in warning
    assert f"warning: {warning}" in evaluated.stderr


def test_a_claim_is_what_robustbench_reads(folder: Path) -> None:
    prepared = folder / "prepared"
    prepared.mkdir()
    save_split(prepared / "test.safetensors", digits.unseen(10))
    manifest = {"source": "cifar10", "classes": [str(label) for label in range(10)], "hash": "of the images"}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    save_wrong_files()
    options = [
        "--checkpoint",
        "right.pt",
        *OPTIONS,
        "--normalize",
        "none",
        "--write-claim",
        "--steps",
        "1",
        "--out",
        "out",
    ]
    refused = evaluate(*options, data="prepared")
    elsewhere = evaluate(*options)
    standard = ["--autoattack", "standard", "--autoattack-images", "10", "--eps", "64/255"]
    claimed = evaluate(*options, *standard, data="prepared")

    assert "on all test images: --autoattack standard --autoattack-images 10." in str(refused.exception)
    assert "the data are ten.safetensors; RobustBench takes cifar10 and cifar100" in str(elsewhere.exception)
    assert claimed.exit_code == 0, claimed.exception
    figures = attacks("out")
    assert json.loads(Path("out/claim.json").read_text()) == {
        **dict.fromkeys(("link", "name", "authors", "additional_data", "venue", "reported")),
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "WideResNet-10-1",
        "eps": "64/255",
        "clean_acc": f"{100 * figures['clean'].accuracy:.2f}",
        "autoattack_acc": f"{100 * figures['autoattack'].accuracy:.2f}",
        "unreliable": any(
            check.passed is False for check in RobustnessReport.read(Path("out/robustness.json")).target.checks
        ),
        "footnote": "Evaluated on 10 test images.",
    }


def test_data_may_be_raw_images_of_a_test_split_alone(folder: Path) -> None:
    from PIL import Image

    with ZipFile("raw.zip", "w") as packed:
        for number, (image, label) in enumerate(zip(*digits.unseen(30), strict=True)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save("image.png")
            packed.write("image.png", f"test/{label}/{number:03}.png")
    settings: Any = None  # of no use to an image folder
    heldout = evaluation_images.load(folder / "raw.zip", settings, "image_folder")
    assert heldout.classes == [str(label) for label in range(10)]
    order = digits.unseen(30).labels.argsort(stable=True)
    expected = digits.unseen(30).take(order)
    assert torch.equal(heldout.split.labels, expected.labels)
    assert torch.equal(heldout.split.images, expected.images)
    refused = evaluate("--checkpoint", "right.pt", *OPTIONS, data="raw.zip")
    assert "For raw images, give their source: --source image_folder" in str(refused.exception)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the CIFAR-10 test images are not here (../shared/data)")
def test_the_known_answer_of_a_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyautoattack's own example is an unprotected ResNet-18: 94.22 % clean on all 10,000 images, 0 % under PGD-20."""
    model = models.build("resnet18", num_classes=10, image_size=32, strides=(1, 2, 2, 2))
    models.load_weights(model, Path(pyautoattack.__file__).parent / "examples/model_test.pt")
    split = cifar10(every=100)
    config = EvaluationConfig(batch_size=50, seed=0, device=torch.device("cpu"))
    clean, pgd = (run_attack(model, split, attack, config).correct(split.labels) for attack in (Clean(), config.pgd))
    assert len(split) == 100
    assert clean.sum() == 94
    assert pgd.sum() == 0


def cifar10(every: int) -> Split:
    """Each n-th test image, in the order of the names."""
    import io

    import numpy as np
    from PIL import Image

    with ZipFile(SHARED / "cifar10-test.zip") as packed:
        names = sorted(name for name in packed.namelist() if name.endswith(".webp"))
        classes = sorted({name.split("/")[1] for name in names})
        chosen = names[::every]
        images = [np.asarray(Image.open(io.BytesIO(packed.read(name))).convert("RGB")) for name in chosen]
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in chosen])
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels)
