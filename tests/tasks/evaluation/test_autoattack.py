"""AutoAttack: the authors' own survivors, whatever the batch, the processes or the company that an image is in."""

from typing import Any

import digits
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from d2r_core import models
from d2r_core.attacks import norms
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.run import Outcome
from d2r_core.data import Split, to_float
from tasks.evaluation import autoattack

BUDGET = {"_STEPS": 12, "_QUERIES": 60, "_TARGETS": 2}  # of the tests
RADII: dict[Norm, float] = {"Linf": digits.EPS, "L2": 0.9}
NAMES = ["APGD-CE", "APGD-T", "FAB-T", "Square"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BUDGET.items():
        monkeypatch.setattr(autoattack, name, value)


def ours(norm: Norm, classes: int = 10) -> dict[str, evaluation.Attack]:
    return autoattack.attacks("standard", eps=RADII[norm], norm=norm, seed=0, classes=classes)


def theirs(model: nn.Module, norm: Norm, steps: int = 12, queries: int = 60) -> AutoAttack:
    adversary = AutoAttack(model, norm=norm, eps=RADII[norm], seed=0)
    for part in (adversary.apgd, adversary.apgd_targeted):
        part.n_iter = part.n_iter_orig = steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    adversary.fab.n_iter = steps
    adversary.square.n_queries = queries
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 2
    return adversary


def run(attack: evaluation.Attack, split: Split, norm: Norm, **options: Any) -> Outcome:
    return evaluation.run(digits.model(), split, attack, norm=norm, seed=0, **{"batch_size": 100, **options})


class OneDraw:
    """The same draw for every image, whichever others are in the batch: so the authors' code and ours draw alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uniform = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.rand = torch.rand
        self.columns = 0  # of the draw that Square has used
        monkeypatch.setattr(torch, "rand", self._rand)
        monkeypatch.setattr(torch, "randn", lambda shape: norms.normal(2 * self._rand(shape) - 1))
        monkeypatch.setattr(evaluation, "noise_of", lambda numbers, *_, **__: self.noise(len(numbers)))

    def noise(self, images: int) -> evaluation.Noise:
        return lambda restart: (2 * self.uniform - 1).expand(images, 3, 8, 8)

    def _rand(self, shape: Any) -> Tensor:
        if len(shape) < 4:
            return self.rand(shape)  # torch's stream: what all images share
        if list(shape[2:]) != [1, 1]:
            return self.uniform[:, : shape[2]].expand(*shape).clone()
        self.columns += 1
        return self.uniform.flatten(1)[:, (self.columns - 1) % 64][:, None, None].expand(*shape).clone()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_with_the_same_draws_the_survivors_are_those_of_the_authors_code(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split, draws = digits.model(), digits.unseen(60), OneDraw(monkeypatch)
    x, y = to_float(split.images), split.labels

    def survivors(x_adv: Tensor) -> Tensor:
        return model(x_adv).argmax(1) == y

    clean = survivors(x)
    plain = theirs(model, norm).run_standard_evaluation_individual(x, y, batch_size=60)
    for attack, (x_adv, _) in zip(ours(norm).values(), plain.values(), strict=True):
        found = attack(model, x, y, draws.noise(60))
        assert torch.equal(survivors(found), survivors(x_adv))
        assert survivors(found).sum() < clean.sum()
        assert norms.size(found.double() - x.double(), norm).max() <= RADII[norm] + 1e-6

    draws.columns = 0
    x_adv, _ = theirs(model, norm).run_standard_evaluation(x, y, batch_size=60)
    outcome, stood = evaluation.cascade(model, split, ours(norm), batch_size=60, seed=0, norm=norm)
    assert torch.equal(outcome.correct(y), survivors(x_adv))
    assert list(stood) == NAMES
    assert list(stood.values()) == sorted(stood.values(), reverse=True)


def test_from_the_same_start_apgd_finds_the_same_images_as_the_authors_code() -> None:
    model, split = digits.model(), digits.unseen(60)
    right = run(evaluation.clean(), split, "Linf").correct(split.labels)
    split = split.take(right.nonzero().squeeze(1))
    x, y = to_float(split.images), split.labels
    first = x.clone()  # what first misled the model, or x

    def watched(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        if len(images) == len(x):
            new = (logits.argmax(1) != y) & (first == x).flatten(1).all(1)
            first[new] = images[new].detach()
        return logits

    plain = APGDAttack(watched, n_iter=12, eps=digits.EPS, seed=0, device=torch.device("cpu"))
    plain.perturb(x, y)
    torch.manual_seed(0)
    start = 2 * torch.rand(x.shape) - 1
    found = ours("Linf")["APGD-CE"](model, x, y, lambda restart: start)
    fell = (first != x).flatten(1).any(1)
    assert 0 < fell.sum() < len(x)
    torch.testing.assert_close(found[fell], first[fell], rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7, 200])
def test_any_number_of_classes(classes: int) -> None:
    """No four logits for the targeted DLR loss, fewer targets than nine, or many."""
    torch.manual_seed(0)
    model = models.build("wide_resnet", num_classes=classes, image_size=8, depth=10, widen_factor=1).eval()
    images = digits.unseen(8).images
    with torch.no_grad():
        split = Split(images, model(to_float(images)).argmax(1))  # right by definition
    stages = ours("Linf", classes)
    assert list(stages)[1] == ("APGD-T (unscaled)" if classes < 4 else "APGD-T")
    attacked = {name: evaluation.run(model, split, attack, batch_size=8, seed=0) for name, attack in stages.items()}
    assert all(outcome.correct(split.labels).sum() < 8 for name, outcome in attacked.items() if name != "Square")


def test_quick_is_the_first_half_of_standard() -> None:
    quick = autoattack.attacks("quick", eps=0.1, norm="Linf", seed=0, classes=10)
    assert list(quick) == NAMES[:2]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", NAMES)
def test_no_image_depends_on_its_company(norm: Norm, name: str) -> None:
    split, attack = digits.unseen(8), ours(norm)[name]
    whole = run(attack, split, norm)
    for size in (1, 3):
        same(run(attack, split, norm, batch_size=size), whole)
    few = torch.tensor([5, 2, 7])
    same(run(attack, split.take(few), norm, numbers=few), Outcome(*(column[few] for column in whole)))


def same(one: Outcome, other: Outcome) -> None:
    assert torch.equal(one.predictions, other.predictions)
    torch.testing.assert_close(one.margins, other.margins, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-3, atol=1e-3)
