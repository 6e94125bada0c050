"""The options of D2R and the warm-up, each against its definition; all are off in the published method."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

from d2r_core import data, runtime
from d2r_core.attacks import cag, pgd
from d2r_core.training import losses
from d2r_core.training.config import Averaging, TrainingConfig, WarmUp, WeightPerturbation
from d2r_core.training.methods import D2R, AdversarialTraining, Lbgat, Standard, Trades


def d2r(**options: Any) -> D2R:
    return D2R(toy.network(0), toy.network(100), attack=toy.ATTACK, clean_weight=20.0, adv_weight=30.0, **options)


def batch() -> tuple[Tensor, Tensor]:
    split = toy.split(0, 16)
    return data.to_float(split.images), split.labels


def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adversarial, clean and guidance logits, float64 (5, 4), that need gradients; and labels."""
    torch.manual_seed(0)
    a, n, t = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return a, n, t, torch.tensor([0, 1, 2, 3, 0])


def gradient(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True))


def test_a_divergence_over_the_images_is_c_times_the_published_one() -> None:
    a, n, t, y = logits()
    pa, pt = a.softmax(1), t.softmax(1)
    by_hand = (pa * ((pa + 1e-5).log() - pt.log())).sum() / 5
    torch.testing.assert_close(losses.kl(a, t, "images"), by_hand)
    torch.testing.assert_close(losses.kl(a, t), by_hand / 4)
    published, over_images = losses.d2r(a, n, t, y), losses.d2r(a, n, t, y, divergence_mean="images")
    for name, factor in (("ce", 1), ("logit", 1), ("clean", 4), ("adv", 4)):
        torch.testing.assert_close(over_images[name], factor * published[name])


def test_adagats_term_pulls_the_guidance_alone() -> None:
    a, n, t, y = logits()
    published, adagat = losses.d2r(a, n, t, y)["total"], losses.d2r(a, n, t, y, guidance_logit_weight=2.5)["total"]
    torch.testing.assert_close(adagat, published + 2.5 * ((a - t) ** 2).mean())
    (da, dn, dt), (da_published, dn_published, dt_published) = (gradient(each, a, n, t) for each in (adagat, published))
    assert torch.equal(da, da_published)
    assert torch.equal(dn, dn_published)
    torch.testing.assert_close(dt, dt_published + 2.5 * 2 * (t - a) / t.numel())
    assert "guidance_logit" not in losses.d2r(a, n, t, y)


def parameters(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def test_a_guidance_that_learns_the_adversarial_images_is_detached_for_the_target() -> None:
    method = d2r(guidance_training="adversarial").train()
    x, y = batch()
    x_adv = method.perturb(x, y, runtime.generator(0, toy.CPU))
    terms = method(x, x_adv, y)
    a, n, t = method.model(x_adv), method.model(x), method.guidance(x_adv)
    expected = losses.d2r(a, n, t.detach(), y)
    cross_entropy = nn.functional.cross_entropy(t, y)
    torch.testing.assert_close(terms["total"], expected["total"])
    for ours, by_hand in (
        (gradient(terms["total"], *parameters(method.guidance)), gradient(cross_entropy, *parameters(method.guidance))),
        (gradient(terms["total"], *parameters(method.model)), gradient(expected["total"], *parameters(method.model))),
    ):
        torch.testing.assert_close(ours, by_hand)


def test_the_moving_average_is_its_definition_and_the_target_learns_the_labels() -> None:
    method = d2r(guidance_training="ema").train()
    first = {name: tensor.clone() for name, tensor in method.model.state_dict().items()}

    def step(expected_move: float) -> None:
        """The target's parameters grow by 1; the average follows by so much, counted from the first state."""
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter.add_(1.0)
        method.begin_step(WarmUp(), 0.0)
        for name, tensor in method.guidance.state_dict().items():
            expected = first[name] + expected_move if name.endswith(("weight", "bias")) else first[name]
            torch.testing.assert_close(tensor, expected, msg=name)

    assert not any(parameter.requires_grad for parameter in method.guidance.parameters())
    assert not method.guidance.training
    for move in (1.0, 1.5, 2.0):  # the means of 1; 1 and 2; 1, 2 and 3
        step(move)
    method.get_buffer("averaged_steps").fill_(1000)
    step(0.995 * 2.0 + 0.005 * 4.0)
    x, y = batch()
    terms = method(x, x, y)
    torch.testing.assert_close(terms["ce"], nn.functional.cross_entropy(method.model(x), y))


def test_a_training_with_a_moving_average_continues_where_it_stopped(tmp_path: Path) -> None:
    whole, pieces = d2r(guidance_training="ema"), d2r(guidance_training="ema")
    toy.fit(whole, epochs=2)
    toy.fit(pieces, epochs=1, state_folder=tmp_path)
    pieces = d2r(guidance_training="ema")
    toy.fit(pieces, epochs=2, state_folder=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, pieces.state_dict()[name]), name


def test_the_attacks_are_those_of_cag_trades_and_pgd() -> None:
    x, y = batch()

    def noise(draw: str) -> Tensor:
        return getattr(torch.empty_like(x), draw)(generator=runtime.generator(0, toy.CPU))

    def examples(name: Any) -> Tensor:
        return d2r(attack_name=name).perturb(x, y, runtime.generator(0, toy.CPU))

    target, guidance = toy.network(0), toy.network(100)
    normal, uniform = noise("normal_"), 2 * noise("uniform_") - 1
    assert torch.equal(examples("cag"), cag.generate(target, guidance, x, noise=normal, **toy.ATTACK))
    assert torch.equal(examples("trades"), cag.generate(target, target, x, noise=normal, **toy.ATTACK))
    torch.testing.assert_close(examples("pgd"), pgd(target, x, y, noise=uniform, **toy.ATTACK))


def test_a_warm_up_is_linear_and_ends() -> None:
    warm_up = WarmUp(eps_epochs=4.0, regularization_epochs=0.5)
    assert [warm_up.eps_factor(epochs) for epochs in (0.0, 1.0, 3.0, 4.0, 9.0)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert [warm_up.regularization_factor(epochs) for epochs in (0.0, 0.25, 0.5)] == [0.0, 0.5, 1.0]
    assert WarmUp().eps_factor(0.0) == WarmUp().regularization_factor(0.0) == 1.0


@pytest.mark.parametrize(
    "method",
    [
        d2r(),
        Trades(toy.network(0), attack=toy.ATTACK, beta=6.0),
        Lbgat(toy.network(0), toy.network(100), attack=toy.ATTACK, beta=6.0),
        AdversarialTraining(toy.network(0), attack=toy.ATTACK),
    ],
    ids=["d2r", "trades", "lbgat", "at"],
)
def test_a_warm_up_shrinks_the_ball_and_every_term_but_the_cross_entropy(method: Any) -> None:
    method.train()
    x, y = batch()

    def distance() -> float:
        return float((method.perturb(x, y, runtime.generator(0, toy.CPU)) - x).abs().max())

    full = method(x, x, y)
    assert distance() == pytest.approx(0.1, abs=1e-6)
    method.begin_step(WarmUp(eps_epochs=4.0, regularization_epochs=2.0), 1.0)
    assert distance() == pytest.approx(0.025, abs=1e-6)
    half = method(x, x, y)
    for name, term in half.items():
        if name not in ("ce", "total") and not name.startswith("batch_"):
            torch.testing.assert_close(term, 0.5 * full[name])
    torch.testing.assert_close(half["ce"], full["ce"])
    method.begin_step(WarmUp(eps_epochs=4.0), 0.0)
    assert distance() == 0.0


def test_the_trainer_warms_up_step_by_step() -> None:
    method, factors = d2r(), []
    method.register_forward_pre_hook(lambda module, inputs: factors.append((method.eps_factor, method.regularization)))
    toy.fit(method, epochs=3, warm_up=WarmUp(eps_epochs=2.0, regularization_epochs=1.0))
    expected = [(min(1.0, step / 8), min(1.0, step / 4)) for step in range(12)]  # four steps an epoch
    assert factors == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"attack_name": "trades"},
        {"attack_name": "pgd"},
        {"guidance_training": "adversarial"},
        {"guidance_training": "ema", "epochs": 48, "learning_rate": 0.02},  # the average trails behind the target
        {"guidance_logit_weight": 2.5},
        {"divergence_mean": "images"},
        {"label_smoothing": 0.1},
        {
            "averaging": Averaging(name="ema", decay=0.9),
            "weight_perturbation": WeightPerturbation(gamma=0.005),
            "epochs": 28,
            "learning_rate": 0.02,
        },
        {"warm_up": WarmUp(eps_epochs=4.0)},
        {"warm_up": WarmUp(regularization_epochs=4.0)},
    ],
    ids=[
        "trades",
        "pgd",
        "adversarial",
        "ema",
        "adagat",
        "images",
        "label-smoothing",
        "ema-awp",
        "warm-up-eps",
        "warm-up",
    ],
)
def test_d2r_learns_with_every_option(options: dict[str, Any]) -> None:
    fields = TrainingConfig.__dataclass_fields__
    of_training = {name: value for name, value in options.items() if name in fields}
    method = d2r(**{name: value for name, value in options.items() if name not in fields})
    best, _ = toy.fit(method, **{"epochs": 20, "learning_rate": 0.005, **of_training})
    assert best.metrics["robust_accuracy"] > 0.85


def test_without_an_attack_nothing_is_perturbed() -> None:
    x, y = batch()
    assert Standard(toy.network(0)).perturb(x, y, runtime.generator(0, toy.CPU)) is x
