"""The evaluation of any module with PyTorch alone: its figures, its curves and its self-checks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from project import ROOT
from torch import Tensor, nn

from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.evaluation import evaluate_model
from d2r_core.evaluation.self_checks import SELF_CHECKS
from d2r_core.evaluation.statistics import wilson

CONFIG = EvaluationConfig(batch_size=16, seed=0, device=torch.device("cpu"), eps=0.1, step_size=0.025, steps=10)


class Brightness(nn.Module):
    """Three classes, dark, bright and one that no image has; without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 20 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright, torch.full_like(bright, -30.0)], 1)


def flat(*levels: int) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def test_any_module_gets_figures_curves_and_self_checks() -> None:
    images = flat(0, 64, 120, 135, 200, 255)  # the third and the fourth are nearer to the boundary than eps
    labels = torch.tensor([0, 0, 0, 1, 1, 0])  # the last one is wrong
    evaluation = evaluate_model(Brightness(), images, labels, CONFIG)

    assert list(evaluation.figures) == ["clean", "fgsm", "pgd", "cw", "worst"]
    names = [figure["name"] for figure in evaluation.figures.values()]
    assert names == ["clean", "FGSM", "PGD-10", "CW-10", "worst of these"]
    assert [figure["correct"] for figure in evaluation.figures.values()] == [5, 3, 3, 3, 3]
    pgd = evaluation.figures["pgd"]
    assert (pgd["norm"], pgd["eps"], pgd["step_size"], pgd["steps"], pgd["restarts"]) == ("Linf", 0.1, 0.025, 10, 1)
    assert (pgd["accuracy"], pgd["interval"], pgd["per_class"]) == (0.5, list(wilson(3, 6)), [0.5, 0.5, None])
    assert evaluation.eps_curve.robust(0.1).tolist() == [True, True, False, False, True, False]
    assert evaluation.steps_curve.robust.shape == (7, 6)
    passes = {key: (cost.forward_passes, cost.backward_passes) for key, cost in evaluation.costs.items()}
    assert passes["fgsm"] == (6 + 5 + 5, 5), "each image, the step from the five right ones, its result"
    assert list(passes) == ["fgsm", "pgd", "cw"]
    checks = {check.key: check.passed for check in evaluation.self_checks}
    assert tuple(checks) == SELF_CHECKS
    assert {key for key, passed in checks.items() if passed is None} == {"black_box", "transfer"}
    assert all(passed for passed in checks.values() if passed is not None), evaluation.self_checks


def test_float_images_are_the_same_as_their_bytes(tmp_path: Path) -> None:
    images, labels = flat(10, 110, 140, 250), torch.tensor([0, 0, 1, 1])
    before = (images / 255).clone()
    expected = evaluate_model(Brightness(), images, labels, CONFIG)
    evaluation = evaluate_model(Brightness(), before, labels, replace(CONFIG, cache_folder=tmp_path))
    assert torch.equal(before, images / 255), "the caller's images are left alone"
    assert evaluation.figures == expected.figures
    assert [check.passed for check in evaluation.self_checks] == [check.passed for check in expected.self_checks]
    assert {folder.name for folder in tmp_path.iterdir()} == {"clean", "fgsm", "pgd", "cw", "curve", "checks"}


class Detached(nn.Module):
    """The same classes, from a copy of the images that autograd cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return Brightness()(x.detach())


class Unused(nn.Module):
    """The same classes, beside a gradient that does not come from the images."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = [torch.zeros(3, requires_grad=True)]  # in a list: no parameter that could be frozen

    def forward(self, x: Tensor) -> Tensor:
        return Brightness()(x.detach()) + self.offset[0]


class Classes(nn.Module):
    """The class as a number, one hot."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(Brightness()(x).argmax(1), 3).float()


@pytest.mark.parametrize("model", [Detached(), Unused(), Classes()])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_outputs_without_a_gradient_are_a_failed_check(model: nn.Module, norm: Norm) -> None:
    images, labels = flat(10, 110, 140, 250), torch.tensor([0, 0, 1, 1])
    evaluation = evaluate_model(model, images, labels, replace(CONFIG, norm=norm))
    checks = {check.key: check for check in evaluation.self_checks}
    assert checks["gradients"].passed is False
    assert "do not depend on the images in a way that autograd can follow" in checks["gradients"].detail
    assert evaluation.figures["fgsm"]["correct"] == 4, "there is nowhere to go"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (flat(1, 2)[:, :1], torch.tensor([0, 1]), r"images are torch.uint8 \(2, 1, 4, 4\); expected uint8 or float"),
        (flat(1, 2).long(), torch.tensor([0, 1]), r"images are torch.int64"),
        (flat(1, 2).float(), torch.tensor([0, 1]), r"images lie between 1 and 2; expected 0 to 1"),
        (flat(1, 2), torch.tensor([0]), r"labels are torch.int64 \(1,\); expected int64 \(2,\)"),
        (flat(1, 2), torch.tensor([0.0, 1.0]), r"labels are torch.float32"),
    ],
)
def test_images_and_labels_of_another_kind_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_model(Brightness(), images, labels, CONFIG)


def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Any module from Python")[2]
    code = "\n".join(line[4:] for line in section.partition("\n### ")[0].splitlines() if line.startswith("    "))
    exec(code, {"model": Brightness(), "images": flat(10, 110, 140, 250), "labels": torch.tensor([0, 0, 1, 1])})
    printed = capsys.readouterr().out
    assert "PGD-20 1.0 " in printed
    assert "passed Gradients are neither zero nor NaN" in printed
