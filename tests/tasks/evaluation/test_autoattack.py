"""AutoAttack: the authors' own survivors, whatever the batch, the processes or the company that an image is in."""

from typing import Any

import digits
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from d2r_core import models
from d2r_core.attacks import Clean, norms
from d2r_core.attacks import run as attack_run
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import Noise
from d2r_core.attacks.run import Attack, AttackResult, cascade, run_attack
from d2r_core.data import Split, to_float
from tasks.evaluation import autoattack

pytestmark = pytest.mark.slow

BUDGET = {"_STEPS": 12, "_QUERIES": 60, "_TARGETS": 2}  # of the tests
RADII: dict[Norm, float] = {"Linf": digits.EPS, "L2": 0.9}
NAMES = ["APGD-CE", "APGD-T", "FAB-T", "Square"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BUDGET.items():
        monkeypatch.setattr(autoattack, name, value)


def ours(norm: Norm, classes: int = 10) -> list[Attack]:
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


def config(norm: Norm = "Linf", batch_size: int = 100) -> EvaluationConfig:
    return EvaluationConfig(batch_size=batch_size, seed=0, device=torch.device("cpu"), norm=norm)


def run(
    attack: Attack, split: Split, norm: Norm, *, batch_size: int = 100, image_ids: Tensor | None = None
) -> AttackResult:
    return run_attack(digits.model(), split, attack, config(norm, batch_size), image_ids=image_ids)


class OneDraw:
    """The same draw for every image, whichever others are in the batch: so the authors' code and ours draw alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uniform = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.rand = torch.rand
        self.columns = 0  # of the draw that Square has used
        monkeypatch.setattr(torch, "rand", self._rand)
        monkeypatch.setattr(torch, "randn", lambda shape: norms.normal(2 * self._rand(shape) - 1))
        monkeypatch.setattr(attack_run, "image_noise", lambda image_ids, *_, **__: self.noise(len(image_ids)))

    def noise(self, images: int) -> Noise:
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
    for attack, (x_adv, _) in zip(ours(norm), plain.values(), strict=True):
        adversarial = attack(model, x, y, draws.noise(60))
        assert torch.equal(survivors(adversarial), survivors(x_adv))
        assert survivors(adversarial).sum() < clean.sum()
        assert norms.norm(adversarial.double() - x.double(), norm).max() <= RADII[norm] + 1e-6

    draws.columns = 0
    x_adv, _ = theirs(model, norm).run_standard_evaluation(x, y, batch_size=60)
    result, robust_after = cascade(model, split, ours(norm), config(norm, 60))
    assert torch.equal(result.correct(y), survivors(x_adv))
    assert list(robust_after) == NAMES
    assert list(robust_after.values()) == sorted(robust_after.values(), reverse=True)


def test_from_the_same_start_apgd_finds_the_same_images_as_the_authors_code() -> None:
    model, split = digits.model(), digits.unseen(60)
    correct = run(Clean(), split, "Linf").correct(split.labels)
    split = split.take(correct.nonzero().squeeze(1))
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
    x_adv = ours("Linf")[0](model, x, y, lambda restart: start)
    misclassified = (first != x).flatten(1).any(1)
    assert 0 < misclassified.sum() < len(x)
    torch.testing.assert_close(x_adv[misclassified], first[misclassified], rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7, 200])
def test_any_number_of_classes(classes: int) -> None:
    """No four logits for the targeted DLR loss, fewer targets than nine, or many."""
    torch.manual_seed(0)
    model = models.build("wide_resnet", num_classes=classes, image_size=8, depth=10, widen_factor=1).eval()
    images = digits.unseen(8).images
    with torch.no_grad():
        split = Split(images, model(to_float(images)).argmax(1))  # right by definition
    attacks = ours("Linf", classes)
    assert attacks[1].name == ("APGD-T (unscaled)" if classes < 4 else "APGD-T")
    results = {attack.name: run_attack(model, split, attack, config(batch_size=8)) for attack in attacks}
    assert all(result.correct(split.labels).sum() < 8 for name, result in results.items() if name != "Square")


def test_quick_is_the_first_half_of_standard() -> None:
    quick = autoattack.attacks("quick", eps=0.1, norm="Linf", seed=0, classes=10)
    assert [attack.name for attack in quick] == NAMES[:2]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("place", range(4), ids=NAMES)
def test_no_image_depends_on_its_company(norm: Norm, place: int) -> None:
    split, attack = digits.unseen(8), ours(norm)[place]
    whole = run(attack, split, norm)
    for size in (1, 3):
        same(run(attack, split, norm, batch_size=size), whole)
    few = torch.tensor([5, 2, 7])
    same(run(attack, split.take(few), norm, image_ids=few), AttackResult(*(column[few] for column in whole)))


def same(one: AttackResult, other: AttackResult) -> None:
    assert torch.equal(one.predictions, other.predictions)
    torch.testing.assert_close(one.margins, other.margins, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-3, atol=1e-3)


class Detached(nn.Module):
    """The digits' model, on a copy of the images that autograd cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.network = digits.model()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.network(x.detach())
        return logits


@pytest.mark.parametrize("norm", RADII)
def test_a_model_without_gradients_is_attacked_all_the_same(norm: Norm) -> None:
    """The gradients are zero; Square needs none."""
    split = digits.unseen(30)
    result, robust_after = cascade(Detached(), split, ours(norm), config(norm))
    clean = int(run_attack(Detached(), split, Clean(), config(norm)).correct(split.labels).sum())
    assert list(robust_after) == NAMES
    assert robust_after["FAB-T"] >= robust_after["APGD-T"] - 3, "random starts alone"
    assert robust_after["Square"] < robust_after["FAB-T"] <= clean
    assert result.distances.max() <= RADII[norm] + 1e-5
