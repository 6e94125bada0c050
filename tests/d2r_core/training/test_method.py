"""CAG and the D2R loss agree with the figures recorded from the published method, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core.attacks import cag
from d2r_core.training import losses
from d2r_core.training.methods import D2R, AttackParameters

RECORDED = np.load(Path(__file__).parents[2] / "reference/d2r_steps.npz")
CASES = sorted({name.split("/")[0] for name in RECORDED.files})


class Small(nn.Module):
    """The network of the recorded figures."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(features, classes)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1))


class Case:
    """One recorded step: `case["x"]` is the array of that name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.target, self.guidance = self.network("target"), self.network("guidance")
        self.x, self.y = self["x"], self["y"]
        self.attack = {"eps": float(self["eps"]), "step_size": float(self["step_size"])}
        self.steps = int(self["steps"])

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(RECORDED[f"{self.name}/{key}"])

    def network(self, role: str) -> Small:
        prefix = f"{self.name}/{role}."
        state = {n.removeprefix(prefix): torch.from_numpy(RECORDED[n]) for n in RECORDED.files if n.startswith(prefix)}
        classes, features = state["fc.weight"].shape
        model = Small(classes, features).double()
        model.load_state_dict(state)
        return model.train()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_cag_makes_the_recorded_examples(case: Case) -> None:
    before = state(case.target), state(case.guidance)
    x_adv = cag.generate(case.target, case.guidance, case.x, steps=case.steps, noise=case["noise"], **case.attack)
    torch.testing.assert_close(x_adv, case["x_adv"], rtol=0, atol=1e-12)
    for model, old in zip((case.target, case.guidance), before, strict=True):
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, old[name]), f"{name} changed during the attack"
    assert case.guidance.calls == 1, "the guidance's distribution is computed once per batch"
    assert case.target.calls == case.steps


def test_one_training_step_has_the_recorded_loss_gradients_and_statistics(case: Case) -> None:
    attack: AttackParameters = {"eps": case.attack["eps"], "step_size": case.attack["step_size"], "steps": case.steps}
    method = D2R(case.target, case.guidance, attack=attack, clean_weight=20.0, adv_weight=30.0)
    x_adv = cag.generate(case.target, case.guidance, case.x, noise=case["noise"], **attack)
    terms = method(case.x, x_adv, case.y)
    terms["total"].backward()
    torch.testing.assert_close(terms["total"].detach(), case["loss"].squeeze(), rtol=1e-12, atol=1e-12)
    for role, model in (("target", case.target), ("guidance", case.guidance)):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, case[f"grad.{role}.{name}"], rtol=1e-9, atol=1e-12)
        for name in ("bn.running_mean", "bn.running_var"):
            torch.testing.assert_close(model.state_dict()[name], case[f"after.{role}.{name}"], rtol=1e-12, atol=1e-12)


def test_the_terms_add_up_and_are_what_the_paper_writes() -> None:
    torch.manual_seed(0)
    a, n, t = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    y = torch.tensor([0, 1, 2, 3, 0])

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p + 1e-5).log() - p * q.log()).sum() / p.numel()

    pa, pn, pt = (logits.softmax(1) for logits in (a, n, t))
    terms = losses.d2r(a, n, t, y, clean_weight=2.0, adv_weight=3.0)
    expected = {
        "ce": -pt.log()[torch.arange(5), y].mean(),
        "logit": ((a - t) ** 2).mean(),
        "clean": 2 * (kl(pn, pt) - kl(pt, pn)).abs(),
        "adv": 3 * kl(pa, pt),
    }
    expected["total"] = torch.stack(list(expected.values())).sum()
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
