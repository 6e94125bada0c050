"""PGD and its relatives: the ball, their order of strength, and independence of the batch size."""

from typing import Any

import pytest
import torch
from toy import ATTACK, CPU, fit, network, split

from d2r_core import data
from d2r_core.attacks import PGD, Clean, fgsm, pgd
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import margin
from d2r_core.attacks.run import Attack, accuracy_under, run_attack
from d2r_core.evaluation.probes import RandomStep
from d2r_core.training.methods import Standard


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_stays_in_the_ball_and_leaves_the_model_as_it_was(loss: Any) -> None:
    model = network(0).train()
    model.get_submodule("bn1").eval()  # a mixed mode must come back too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data.to_float(split(0).images), split(0).labels
    x_adv = pgd(model, x, y, loss=loss, **ATTACK)
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

    def accuracy(attack: Attack) -> float:
        return accuracy_under(model, images, attack, EvaluationConfig(batch_size=64, seed=0, device=CPU))

    eps = 0.15
    noise, one_step = accuracy(RandomStep(eps, "Linf")), accuracy(fgsm(eps))
    many_steps = accuracy(PGD(eps=eps, step_size=eps / 4, steps=20))
    assert accuracy(Clean()) >= noise >= one_step >= many_steps
    assert many_steps < noise
    assert accuracy(PGD(eps=1.0, step_size=0.1, steps=20)) == 0.0


def test_figures_do_not_depend_on_the_batch_size() -> None:
    model, images = network(0), split(2, 50)
    configs = (EvaluationConfig(batch_size=size, seed=3, device=CPU) for size in (7, 50))
    one, many = (run_attack(model, images, PGD(**ATTACK), config) for config in configs)
    assert torch.equal(one.predictions, many.predictions)
    torch.testing.assert_close(one.margins, many.margins, rtol=1e-4, atol=1e-5)


def test_margins_are_positive_exactly_where_the_model_is_right() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    torch.testing.assert_close(margin(logits, torch.tensor([0, 1])), torch.tensor([1.0, -2.0]))
