"""What the self-checks ask of a model beside the evaluation's attacks.

Apart from self_checks.py, which judges: it takes tensors, and each of its judgements can be read and tested without a
model. Everything here runs one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core import runtime
from d2r_core.attacks import norms
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import PGD, Noise, input_gradient
from d2r_core.attacks.run import image_noise
from d2r_core.data import Split, to_float
from d2r_core.runtime import at_least_fp32


@dataclass(frozen=True)
class Transfer:
    """The adversarial images of another model, after all steps: those that just fool it seldom fool a second one."""

    other: nn.Module
    attack: PGD
    name: str = "transfer"

    @property
    def passes(self) -> int:
        return self.attack.passes

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.attack(self.other, x, y, noise)


@dataclass(frozen=True)
class RandomStep:
    """A step of length eps in a random direction: for Linf, to a random corner of the ball."""

    eps: float
    norm: Norm
    name: str = "noise"
    passes: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return (x + norms.ascent_step(noise(0), self.eps, self.norm)).clamp(0.0, 1.0)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def logits(model: nn.Module, split: Split, batch_size: int, device: torch.device) -> Tensor:
    """float32 (N, C), on the CPU."""
    with torch.no_grad(), runtime.eager(runtime.is_compiled(model)):
        batches = [
            at_least_fp32(model(to_float(images.to(device)))).float().cpu() for images in split.images.split(batch_size)
        ]
    return torch.cat(batches)


def gradient_sizes(model: nn.Module, split: Split, config: EvaluationConfig, image_ids: Tensor) -> Tensor:
    """The largest component of the cross-entropy's gradient at each image and at PGD's random start, (2, N)."""
    sizes = []
    for index in torch.arange(len(split)).split(config.batch_size):
        images, labels = split.take(index.to(split.labels.device)).to(config.device)
        x = to_float(images)
        draw = image_noise(image_ids[index], x.shape[1:], seed=config.seed, device=config.device)(0)
        start = (x + norms.random_start(draw, config.eps, config.norm)).clamp(0.0, 1.0)
        sizes.append(torch.stack([_largest_gradient(model, point, labels) for point in (x, start)]))
    return torch.cat(sizes, 1).cpu()


def has_gradient(model: nn.Module, split: Split, device: torch.device) -> bool:
    """Whether autograd can follow how the outputs depend on the images (on the first of them)."""
    x = to_float(split.images[:1].to(device)).requires_grad_()
    with torch.enable_grad(), runtime.eager(runtime.is_compiled(model)):
        outputs = model(x)
    if not outputs.requires_grad:
        return False
    return torch.autograd.grad(outputs.sum(), x, allow_unused=True)[0] is not None


def _largest_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad(), runtime.eager(runtime.is_compiled(model)):
        loss = F.cross_entropy(at_least_fp32(model(x)), labels, reduction="sum")
    return input_gradient(loss, x).abs().flatten(1).amax(1)
