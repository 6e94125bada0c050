"""PGD and its relatives: the ball, their order of strength, and independence of the batch size."""

from typing import Any

import pytest
import torch
from toy import ATTACK, fit, network, split

from d2r_core import data
from d2r_core.attacks import pgd as attacks
from d2r_core.attacks import run as evaluation
from d2r_core.training.methods import Standard


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_stays_in_the_ball_and_leaves_the_model_as_it_was(loss: Any) -> None:
    model = network(0).train()
    model.get_submodule("bn1").eval()  # a mixed mode must come back too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data.to_float(split(0).images), split(0).labels
    x_adv = attacks.pgd(model, x, y, loss=loss, **ATTACK)
    assert (x_adv - x).abs().max() <= ATTACK["eps"] + 1e-6
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    assert model.training
    assert not model.get_submodule("bn1").training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_attacks_grow_stronger_from_noise_to_fgsm_to_pgd_and_with_eps() -> None:
    best, _ = fit(Standard(model := network(0)), epochs=3)
    model.load_state_dict(best.state)
    images = split(2, 256)

    def accuracy(attack: evaluation.Attack) -> float:
        outcome = evaluation.run(model, images, attack, batch_size=64, seed=0)
        return evaluation.accuracy(outcome.correct(images.labels))

    eps = 0.15
    noise = accuracy(lambda model, x, y, noise: (x + eps * noise(0).sign()).clamp(0, 1))
    fgsm, pgd = accuracy(evaluation.fgsm(eps)), accuracy(evaluation.pgd(eps, eps / 4, 20))
    assert accuracy(evaluation.clean()) >= noise >= fgsm >= pgd
    assert pgd < noise
    assert accuracy(evaluation.pgd(1.0, 0.1, 20)) == 0.0


def test_figures_do_not_depend_on_the_batch_size() -> None:
    model, images = network(0), split(2, 50)
    attack = evaluation.pgd(**ATTACK)
    one, many = (evaluation.run(model, images, attack, batch_size=size, seed=3) for size in (7, 50))
    assert torch.equal(one.predictions, many.predictions)
    torch.testing.assert_close(one.margins, many.margins, rtol=1e-4, atol=1e-5)


def test_margins_are_positive_exactly_where_the_model_is_right() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    torch.testing.assert_close(attacks.margin(logits, torch.tensor([0, 1])), torch.tensor([1.0, -2.0]))
