"""Ten classes of 8 x 8 digits and a small network that is half robust on them: what evaluations are tried on."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core import models, runtime
from d2r_core.attacks import pgd
from d2r_core.attacks.pgd import Noise
from d2r_core.data import Split, to_float

EPS = 0.15  # at which about half of the images fall


@dataclass(frozen=True)
class FunctionAttack:
    """A test's own function as an attack."""

    function: Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]
    name: str = "function"
    passes: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.function(model, x, y, noise)


@functools.cache
def split() -> Split:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    return Split(images[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long())


def unseen(count: int) -> Split:
    """Images that `model` was not trained on."""
    return split().take(torch.arange(1200, 1200 + count))


def network(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return models.build("wide_resnet", num_classes=classes, image_size=8, depth=10, widen_factor=1)


@functools.cache
def state() -> dict[str, torch.Tensor]:
    """The weights after two epochs of adversarial training on the first 1200 images."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = runtime.generator(0, torch.device("cpu"))
    for _ in range(2):
        for index in torch.randperm(1200, generator=generator).split(64):
            x, y = to_float(split().images[index]), split().labels[index]
            noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
            x_adv = pgd(model, x, y, eps=0.2, step_size=0.1, steps=2, noise=noise)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
    return model.state_dict()


def model() -> nn.Module:
    """The trained network, in eval mode."""
    trained = network()
    trained.load_state_dict(state())
    return trained.eval()
