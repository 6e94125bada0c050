"""Accuracy against eps and against the number of steps, on a linear model whose distances are known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2r_core.attacks import PGD
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.run import adversarial_images
from d2r_core.data import Split
from d2r_core.evaluation import curves

PIXELS = 3 * 4 * 4


def config(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(batch_size=7, seed=0, device=torch.device("cpu"), **values)


class Brightness(nn.Module):
    """Two classes, dark and bright: an image at brightness b is |b - 0.5| from the other class in Linf."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        bright = self.gain * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], 1)


def images(*levels: int) -> Split:
    """One flat grey image per level (of 255), labelled as the model sees it, and one that it gets wrong."""
    brightness = torch.tensor([*levels, 0], dtype=torch.uint8)
    labels = (brightness > 127).long()
    labels[-1] = 1
    return Split(brightness[:, None, None, None].expand(-1, 3, 4, 4).contiguous(), labels)


@pytest.mark.parametrize(("norm", "unit"), [("Linf", 1.0), ("L2", PIXELS**0.5)])
def test_smallest_eps_is_the_first_of_the_curve_beyond_the_boundary(norm: Norm, unit: float) -> None:
    split = images(122, 107, 87, 70, 255)  # 0.022, 0.08, 0.16, 0.23 and 0.5 from the boundary
    eps = 0.1 * unit
    curve = curves.against_eps(Brightness(), split, config(eps=eps, step_size=eps / 4, steps=20, norm=norm))
    assert (curve.smallest_eps / unit).tolist() == pytest.approx([0.025, 0.1, 0.2, 0.3, 0.8, 0.0])
    accuracies = {round(point["eps"] / unit, 3): point["correct"] for point in curve.points}
    assert accuracies == {0: 5, 0.025: 4, 0.05: 4, 0.075: 4, 0.1: 3, 0.15: 3, 0.2: 2, 0.3: 1, 0.4: 1, 0.8: 0}
    assert curve.robust(eps).tolist() == [False, False, True, True, True, False]
    last = curve.points[-1]
    assert (last["images"], last["accuracy"], last["interval"][0]) == (6, 0.0, 0.0)


def test_the_curve_ends_where_a_ball_holds_every_image() -> None:
    class Constant(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 1e-9)

    curve = curves.against_eps(Constant(), images(10, 20), config(eps=0.3, step_size=0.1, steps=2))
    assert [point["eps"] for point in curve.points] == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.45, 0.6, 0.9, 1])
    assert curve.smallest_eps.tolist() == [math.inf, math.inf, 0.0]


def test_each_number_of_steps_is_a_run_of_its_own_that_reaches_the_border() -> None:
    split = images(122, 107, 87)
    curve = curves.against_steps(Brightness(), split, config(eps=0.1, steps=30))
    assert [point["steps"] for point in curve.points] == [1, 2, 5, 10, 20, 50, 100, 150]
    assert [point["correct"] for point in curve.points] == [1] * 8
    assert curve.robust.tolist() == [[False, False, True, False]] * 8
    attack = PGD(eps=0.1, step_size=0.025, steps=10, any_iterate=False)
    x_adv = adversarial_images(Brightness(), split, attack, config())
    distance = (x_adv - split.images / 255).flatten(1).abs()
    torch.testing.assert_close(
        distance[:3], torch.full_like(distance[:3], 0.1)
    )  # also for those misclassified on the way


def test_an_interrupted_curve_is_finished_with_the_same_figures(tmp_path: Path) -> None:
    split, model = images(122, 107, 87), Brightness()

    class Interrupted(Brightness):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            if self.passes > 60:
                raise KeyboardInterrupt
            return super().forward(x)

    cached = config(eps=0.1, step_size=0.01, steps=20, cache_folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        curves.against_eps(Interrupted(), split, cached)
    assert list(tmp_path.iterdir())
    resumed = curves.against_eps(model, split, cached)
    whole = curves.against_eps(model, split, replace(cached, cache_folder=None))
    assert resumed.points == whole.points
    assert torch.equal(resumed.smallest_eps, whole.smallest_eps)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((122, 107, 87), (0.025, 0.0, 0.025)),  # 0.022, 0.08 and 0.16 from the boundary, and one image wrong
        ((255, 255), (0.5, 0.4, 0.8)),  # a third wrong, two thirds robust up to 0.5: half way in between
        ((), (0.0, 0.0, 0.0)),
    ],
)
def test_the_median_perturbation_is_where_half_of_the_images_are_left(
    levels: tuple[int, ...], expected: tuple[float, float, float]
) -> None:
    curve = curves.against_eps(Brightness(), images(*levels), config(eps=0.1, step_size=0.025, steps=20))
    median = curve.median_perturbation()
    assert median == pytest.approx(expected)


def test_a_model_that_no_radius_misleads_has_no_median_perturbation() -> None:
    assert (
        curves.EpsCurve(
            [{"eps": 0.0, "accuracy": 1.0}, {"eps": 1.0, "accuracy": 0.75}], torch.empty(0)
        ).median_perturbation()
        is None
    )
