"""Models that hide their gradients, planted and caught; honest ones, found honest.

Small networks on scikit-learn's digits, trained here in seconds: one as usual, one adversarially.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from digits import FunctionAttack
from pyautoattack.square import SquareAttack
from sklearn.datasets import load_digits
from torch import Tensor, nn
from toy import CPU

from d2r_core.attacks import Clean
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import Noise
from d2r_core.attacks.run import adversarial_images, run_attack
from d2r_core.data import Split
from d2r_core.evaluation import curves, self_checks
from d2r_core.evaluation.self_checks import SELF_CHECKS, SelfCheck, run_self_checks
from d2r_core.training.config import TrainingConfig
from d2r_core.training.methods import AdversarialTraining, Standard
from d2r_core.training.trainer import Trainer

pytestmark = pytest.mark.slow

EPS = 0.15
IMAGES = 60


class Trained(NamedTuple):
    usual: nn.Module
    robust: nn.Module
    test: Split


@pytest.fixture(scope="module")
def trained() -> Trained:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().mul(255 / 16).round().to(torch.uint8)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    everything = Split(pixels[order, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target)[order])
    split, test = everything.take(torch.arange(1400)), everything.take(torch.arange(1400, 1400 + IMAGES))

    def fit(make: Callable[[nn.Module], Standard], epochs: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        config = TrainingConfig(
            epochs=epochs,
            batch_size=64,
            learning_rate=0.1,
            schedule="one_cycle",
            momentum=0.9,
            weight_decay=2e-4,
            crop_padding=0,
            flip=False,
            seed=0,
        )
        attacks = {"clean_accuracy": Clean()}
        trainer = Trainer(
            make(model), split, test, config, device=CPU, validation_attacks=attacks, select_by="clean_accuracy"
        )
        model.load_state_dict(trainer.fit().state)
        return model.eval()

    def adversarially(model: nn.Module) -> Standard:
        return AdversarialTraining(model, attack={"eps": EPS, "step_size": EPS / 2, "steps": 3})

    return Trained(fit(Standard, 6), fit(adversarially, 12), test)


class Defended(nn.Module):
    """A model behind a defence: what is done to its input and to its logits."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = copy.deepcopy(model), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


def square(eps: float, norm: Norm) -> Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]:
    """AutoAttack's black box, with few queries."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        authors = SquareAttack(model, norm=norm, eps=eps, n_queries=300, seed=0, device="cpu", resc_schedule=False)
        return cast(Tensor, authors.perturb(x.contiguous(), y))  # its L2 views fail on channels-last images

    return attack


def config(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(batch_size=40, seed=0, device=CPU, **values)


def check_all(
    model: nn.Module, test: Split, *, other: nn.Module, eps: float = EPS, norm: Norm = "Linf"
) -> list[SelfCheck]:
    plan = config(eps=eps, step_size=eps / 4, steps=10, norm=norm)
    return run_self_checks(
        model,
        test,
        plan,
        eps_curve=curves.against_eps(model, test, plan),
        steps_curve=curves.against_steps(model, test, plan),
        distances={"pgd": run_attack(model, test, plan.pgd, plan).distances},
        saved=(test.images, adversarial_images(model, test, plan.pgd, plan)),
        other=("other model", other),
        black_box_attack=FunctionAttack(square(eps, norm)),
    )


def test_each_check_is_explained(trained: Trained) -> None:
    explained = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    checks = check_all(trained.usual, trained.test.take(torch.arange(2)), other=trained.robust)
    assert tuple(check.key for check in checks) == SELF_CHECKS
    for check in checks:
        assert f'### <a id="{check.key.replace("_", "-")}"></a>{check.name}\n' in explained


def failed(checks: list[SelfCheck]) -> set[str]:
    return {check.key for check in checks if check.passed is False}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 1.0)])
def test_honest_models_pass_every_check(trained: Trained, norm: Norm, eps: float) -> None:
    for model, other in ((trained.usual, trained.robust), (trained.robust, trained.usual)):
        checks = check_all(model, trained.test, other=other, eps=eps, norm=norm)
        assert [check.passed for check in checks] == [True] * 10, checks


# What is done to the input or the logits, and which checks see it; more may.
DEFENCES: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], set[str]]] = {
    "quantised input": (
        {"before": lambda x: (x * 8).round() / 8},
        {"gradients", "black_box", "transfer", "large_eps"},
    ),
    "saturated logits": (
        {"after": lambda logits: logits * 1e5},
        {"gradients", "black_box", "transfer", "large_eps"},
    ),
    "probabilities": ({"after": lambda logits: logits.softmax(1)}, {"logits"}),
    "random input": ({"before": lambda x: x + 0.1 * torch.randn_like(x)}, {"eval_mode"}),
    "steep sigmoid": ({"before": lambda x: torch.sigmoid(1000 * (x - 0.5))}, {"gradients", "black_box", "large_eps"}),
    "bent logits": ({"after": lambda logits: 5 * torch.tanh(logits)}, {"losses"}),
    "shattered gradients": ({"before": lambda x: x + 0.0075 * torch.sin(200 * x)}, {"more_steps"}),
    "gradients that are not finite": ({"before": lambda x: x.sqrt()}, {"gradients"}),
}


@pytest.mark.parametrize("name", DEFENCES)
def test_a_model_that_hides_its_gradients_is_caught(trained: Trained, name: str) -> None:
    defence, expected = DEFENCES[name]
    checks = check_all(Defended(trained.usual, **defence), trained.test, other=trained.robust)
    assert failed(checks) >= expected, checks


def test_20_images_are_enough(trained: Trained) -> None:
    few = trained.test.take(torch.arange(20))
    assert failed(check_all(trained.usual, few, other=trained.robust)) == set()
    quantised = Defended(trained.usual, before=lambda x: (x * 8).round() / 8)
    assert {"gradients", "large_eps"} <= failed(check_all(quantised, few, other=trained.robust))


def test_noise_that_harms_more_than_a_quarter_of_the_attack_is_seen(trained: Trained) -> None:
    coarse = Defended(trained.usual, before=lambda x: (x * 2).round() / 2)
    assert "noise" in failed(check_all(coarse, trained.test, other=trained.robust, eps=0.5))


def test_a_model_that_stays_in_training_mode_is_caught(trained: Trained) -> None:
    class Training(Defended):
        def train(self, mode: bool = True) -> "Training":
            super().train(True)
            return self

    checks = {check.key: check for check in check_all(Training(trained.usual), trained.test, other=trained.robust)}
    assert checks["eval_mode"].passed is False
    assert "a module is in training mode" in checks["eval_mode"].detail
    assert "the attacks changed model.1.running_mean" in checks["eval_mode"].detail


def test_a_check_without_what_it_compares_with_is_skipped(trained: Trained) -> None:
    few = trained.test.take(torch.arange(10))
    plan = config(eps=EPS, step_size=EPS, steps=2)
    wrong = Split(few.images, (few.labels + 5) % 10)
    checks = run_self_checks(
        trained.usual,
        wrong,
        plan,
        eps_curve=curves.against_eps(trained.usual, wrong, plan),
        steps_curve=curves.against_steps(trained.usual, wrong, plan),
        distances={},
        saved=(few.images, few.images / 255),
    )
    skipped = {check.key: check.detail for check in checks if check.passed is None}
    assert set(skipped) == {"black_box", "transfer", "gradients"}
    assert skipped["black_box"] == "There was no black-box attack."
    assert skipped["gradients"] == "The model gets no image right, so there is nothing to attack."


def test_perturbations_are_measured_again() -> None:
    clean = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    x = clean / 255

    def passed(adversarial: Tensor, distances: list[float], norm: Norm = "Linf", eps: float = 0.1) -> bool | None:
        recorded = {"pgd": torch.tensor(distances, dtype=torch.float64)}
        return self_checks.perturbation(recorded, (clean, adversarial), eps, norm).passed

    assert passed(x + 0.1, [0.1, 0.1000001])
    assert not passed(x + 0.1, [0.1, 0.10001])
    assert not passed(x + 0.10001, [0.1])
    assert not passed(x + 0.1, [torch.nan])
    assert passed(x - 0.2, [0.2], eps=0.2)
    assert not passed(x - 0.2001, [0.2], eps=0.3)  # darker than black
    assert passed(x + 0.1, [], "L2", eps=0.1 * 48**0.5)
    assert not passed(x + 0.1, [], "L2", eps=0.69)


def test_logits_are_told_from_probabilities() -> None:
    outputs = 4 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert self_checks.logits(outputs).passed
    assert self_checks.logits(outputs.log_softmax(1)).passed  # logits too, as long as nothing was rounded away
    for wrong, why in (
        (outputs.softmax(1), "between .* and .*: probabilities"),
        (outputs.sigmoid(), "not the range of logits"),
        ((30 * outputs).log_softmax(1), "logarithms of probabilities, rounded to 1 for [0-9]+ of 20 images"),
        (outputs.softmax(1).round().log(), "20 of 20 images are not finite"),
    ):
        check = self_checks.logits(wrong)
        assert not check.passed
        assert re.search(why, check.detail)
