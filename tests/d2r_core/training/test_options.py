"""The quality options and the baseline methods, each against its definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy

from d2r_core import data, runtime
from d2r_core.attacks import Clean
from d2r_core.training import awp, losses, methods, schedules
from d2r_core.training.config import Averaging, WeightPerturbation
from d2r_core.training.methods import AdversarialTraining, Lbgat, Standard, Trades, TrainingMethod
from d2r_core.training.weight_average import WeightAverage

EPOCHS = 14  # every method and option solves the toy in 12
METHODS: dict[str, Any] = {
    "d2r": toy.d2r,
    "lbgat": lambda: Lbgat(toy.network(0), toy.network(100), attack=toy.ATTACK, beta=0.0),
    "lbgat6": lambda: Lbgat(toy.network(0), toy.network(100), attack=toy.ATTACK, beta=6.0),
    "trades": lambda: Trades(toy.network(0), attack=toy.ATTACK, beta=6.0),
    "at": lambda: AdversarialTraining(toy.network(0), attack=toy.ATTACK),
}


@pytest.fixture(scope="module")
def standard() -> float:
    """Robust accuracy of standard training."""
    best, logged = toy.fit(Standard(toy.network(0)), epochs=8)
    assert best.metrics["clean_accuracy"] > 0.95
    assert "batch_accuracy" in logged[0]
    return logged[-1]["robust_accuracy"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_far_more_robust_than_standard_training(method: str, standard: float) -> None:
    best, logged = toy.fit(METHODS[method](), epochs=EPOCHS)
    assert best.metrics["robust_accuracy"] > 0.85
    assert best.metrics["robust_accuracy"] > standard + 0.3
    assert logged[-1]["loss"] < logged[0]["loss"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = toy.split(0, 16)
    return data.to_float(images), labels


def test_the_baselines_losses_are_those_of_their_papers() -> None:
    torch.manual_seed(0)
    a, n, t = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    y = torch.tensor([0, 1, 2, 3, 0])
    pa, pn, pt = (logits.softmax(1) for logits in (a, n, t))
    divergence = (pn * (pn.log() - pa.log())).sum() / 5
    trades = losses.trades(a, n, y, beta=6.0)
    torch.testing.assert_close(trades["total"], -pn.log()[torch.arange(5), y].mean() + 6 * divergence)
    lbgat = losses.lbgat(a, n, t, y, beta=6.0)
    expected = -pt.log()[torch.arange(5), y].mean() + ((a - t) ** 2).mean() + 6 * divergence
    torch.testing.assert_close(lbgat["total"], expected)
    torch.testing.assert_close(losses.cross_entropy(a, y)["total"], -pa.log()[torch.arange(5), y].mean())
    smoothed = losses.d2r(a, n, t, y, label_smoothing=0.1)
    torch.testing.assert_close(smoothed["ce"], 0.9 * -pt.log()[torch.arange(5), y].mean() - 0.1 * pt.log().mean())


def test_awp_takes_the_gradient_where_the_weights_are_worst_and_puts_them_back() -> None:
    model = toy.network(0).train()
    x, y = batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    plain = loss().detach()
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss(), list(model.parameters())), strict=True)
    )
    model.load_state_dict(before)
    with awp.perturbed(model, loss, 0.01):
        moves = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), "the search leaves BatchNorm alone"
        worse = loss().detach()
    assert worse > plain
    for name, move in moves.items():
        if move.ndim > 1:
            expected = 0.01 * before[name].norm() * gradients[name] / gradients[name].norm()
            torch.testing.assert_close(move, expected, rtol=1e-3, atol=1e-6)
        else:
            assert not move.any(), "biases and BatchNorm are not moved"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_averages_are_their_definitions_and_batch_norm_is_their_own() -> None:
    model = toy.network(0)
    ema, swa = (
        WeightAverage(model, averaging)
        for averaging in (Averaging(name="ema", decay=0.9), Averaging(name="swa", from_epoch=2))
    )
    weights = []
    for step in range(3):
        with torch.no_grad():
            model.get_parameter("fc.weight").add_(step + 1.0)
        weights.append(model.get_parameter("fc.weight").detach().clone())
        for average in (ema, swa):
            average.update_after_step(model)
            average.update_after_epoch(model, step + 1)
    torch.testing.assert_close(swa.model.get_parameter("fc.weight").detach(), torch.stack(weights[1:]).mean(0))
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(ema.model.get_parameter("fc.weight").detach(), expected)
    x, _ = batch()
    ema.refresh_batch_norm([x])
    torch.testing.assert_close(
        ema.model.get_buffer("block1.layer.0.bn1.running_mean"),
        model.get_submodule("conv1")(x).mean((0, 2, 3)).detach(),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"averaging": Averaging(name="ema", decay=0.9)},
        {"averaging": Averaging(name="swa", from_epoch=4)},
        {"weight_perturbation": WeightPerturbation(gamma=0.005)},
        {"gradient_clip": 1.0},
        {"schedule": "one_cycle"},
        {"schedule": "cosine"},
    ],
    ids=["ema", "swa", "weight-perturbation", "gradient-clip", "one-cycle", "cosine"],
)
def test_d2r_learns_with_every_option(options: dict[str, Any]) -> None:
    best, _ = toy.fit(toy.d2r(), epochs=EPOCHS, **options)
    assert best.metrics["robust_accuracy"] > 0.85


def test_a_frozen_guidance_does_not_move() -> None:
    guidance = toy.network(100)
    best, _ = toy.fit(Standard(guidance), epochs=4)
    guidance.load_state_dict(best.state)
    method = methods.D2R(
        toy.network(0), guidance, attack=toy.ATTACK, clean_weight=20.0, adv_weight=30.0, guidance_training="frozen"
    )
    robust, _ = toy.fit(method, epochs=10)
    for name, tensor in guidance.state_dict().items():
        assert torch.equal(tensor, best.state[name]), name
    assert robust.metrics["robust_accuracy"] > 0.85


def test_the_gradient_is_clipped_to_the_norm() -> None:
    model = toy.network(0)
    before = model.get_parameter("fc.bias").detach().clone()
    toy.fit(Standard(model), epochs=1, gradient_clip=1e-9, weight_decay=0.0, momentum=0.0)
    torch.testing.assert_close(model.get_parameter("fc.bias").detach(), before, rtol=0, atol=1e-8)


def test_the_step_schedule_is_the_published_one() -> None:
    factors = [schedules.factor("step", epoch, 100) for epoch in range(1, 101)]
    assert factors[0] == 0.2
    assert set(factors[1:75]) == {1.0}
    assert set(factors[75:90]) == {0.1}
    assert set(factors[90:]) == {0.01}


def test_cosine_and_one_cycle_are_their_curves() -> None:
    assert schedules.factor("cosine", 1, 10) == 1.0
    assert schedules.factor("cosine", 6, 10) == pytest.approx(0.5)
    assert schedules.factor("one_cycle", 1, 10) == 0.0
    assert schedules.factor("one_cycle", 4, 10) == pytest.approx(1.0)
    assert schedules.factor("one_cycle", 10, 10, 1.0) == pytest.approx(0.0)


@pytest.mark.slow
def test_a_compiled_training_agrees_with_an_eager_one() -> None:
    def trained(compile: runtime.Compile) -> torch.Tensor:
        method: TrainingMethod = Standard(toy.network(0))
        runtime.compile_models(method, compile=compile, device=toy.CPU)
        assert runtime.is_compiled(method.model) == (compile == "on")
        best, _ = toy.fit(method, epochs=1, batch_size=60, validation_attacks={"clean_accuracy": Clean()})
        return best.state["fc.weight"]

    torch.testing.assert_close(trained("on"), trained("off"), rtol=1e-3, atol=1e-4)


def test_bf16_is_near_and_its_losses_are_fp32() -> None:
    full, half = (toy.fit(toy.d2r(), epochs=1, precision=precision)[1][0] for precision in ("fp32", "bf16"))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.15)
    assert half["loss"] != full["loss"]
