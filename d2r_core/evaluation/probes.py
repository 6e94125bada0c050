"""What the self-checks ask of a model beside the evaluation's attacks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core import runtime
from d2r_core.attacks import norms
from d2r_core.attacks import run as evaluation
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.run import Attack, Noise
from d2r_core.data import Split, to_float
from d2r_core.evaluation.curves import last_iterate
from d2r_core.runtime import at_least_fp32


def crafted_on(other: nn.Module, eps: float, step_size: float, steps: int, norm: Norm) -> Attack:
    """The adversarial images of another model, after all steps: those that just fool it seldom fool a second one."""
    attack = last_iterate(eps, step_size, steps, norm)
    return lambda model, x, y, noise: attack(other, x, y, noise)


def random_step(eps: float, norm: Norm) -> Attack:
    """A step of length eps in a random direction: for Linf, to a random corner of the ball."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return (x + norms.steepest(noise(0), eps, norm)).clamp(0.0, 1.0)

    return attack


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def logits(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """float32 (N, C), on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad(), runtime.eager(runtime.is_compiled(model)):
        batches = [
            at_least_fp32(model(to_float(images.to(device)))).float().cpu() for images in split.images.split(batch_size)
        ]
    return torch.cat(batches)


def gradient_sizes(
    model: nn.Module, split: Split, eps: float, norm: Norm, *, batch_size: int, seed: int, numbers: Tensor
) -> Tensor:
    """The largest component of the cross-entropy's gradient at each image and at PGD's random start, (2, N)."""
    device = next(model.parameters()).device
    sizes = []
    for index in torch.arange(len(split)).split(batch_size):
        images, labels = split.take(index.to(split.labels.device)).to(device)
        x = to_float(images)
        draw = evaluation.noise_of(numbers[index], x.shape[1:], seed=seed, device=device)(0)
        start = (x + norms.start(draw, eps, norm)).clamp(0.0, 1.0)
        sizes.append(torch.stack([_largest_gradient(model, point, labels) for point in (x, start)]))
    return torch.cat(sizes, 1).cpu()


def _largest_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad(), runtime.eager(runtime.is_compiled(model)):
        loss = F.cross_entropy(at_least_fp32(model(x)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient.abs().flatten(1).amax(1)
