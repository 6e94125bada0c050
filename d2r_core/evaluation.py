"""Accuracy under attack, image by image: the same for any batch size and any number of processes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2r_core import attacks, distributed, norms, runtime
from d2r_core.data import Split, to_float
from d2r_core.losses import full
from d2r_core.norms import Norm
from d2r_core.runtime import Precision

# Restart number, from 0 -> uniform draw in [-1, 1] of the batch's shape, each image's from the seed and its own number.
Noise = Callable[[int], Tensor]
# (model, images (B, 3, H, W) in [0, 1], labels (B,), noise) -> adversarial images
Attack = Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]


class Outcome(NamedTuple):
    """What the model says of each attacked image, on the CPU."""

    predictions: Tensor  # int64 (N,)
    margins: Tensor  # float32 (N,): the label's logit minus the best other one
    distances: Tensor  # float64 (N,): the perturbation's size in the attack's norm

    def correct(self, labels: Tensor) -> Tensor:
        """bool (N,)"""
        return self.predictions == labels


def clean() -> Attack:
    """No attack."""
    return lambda model, x, y, noise: x


def fgsm(eps: float, norm: Norm = "Linf") -> Attack:
    """One step of length eps from the clean image (Goodfellow et al. 2015)."""
    return lambda model, x, y, noise: attacks.search(
        model, x, y, lambda restart: torch.zeros_like(x), eps=eps, step_size=eps, steps=1, norm=norm
    )


def pgd(eps: float, step_size: float, steps: int, norm: Norm = "Linf", restarts: int = 1) -> Attack:
    """Cross-entropy, random start (Madry et al. 2018); see attacks.search."""
    return lambda model, x, y, noise: attacks.search(
        model, x, y, noise, eps=eps, step_size=step_size, steps=steps, norm=norm, restarts=restarts
    )


def cw(eps: float, step_size: float, steps: int, norm: Norm = "Linf", restarts: int = 1) -> Attack:
    """The margin loss of Carlini & Wagner (2017) in PGD's loop, random start; see attacks.search."""
    return lambda model, x, y, noise: attacks.search(
        model, x, y, noise, eps=eps, step_size=step_size, steps=steps, norm=norm, restarts=restarts, loss="margin"
    )


def noise_of(numbers: Tensor, shape: torch.Size, *, seed: int, device: torch.device) -> Noise:
    """The noise of the images with these numbers in the test split, (B,), each of `shape` (C, H, W).

    A counter-based generator (Salmon et al. 2011) keyed by seed and number, its counter set to the restart: no draw
    depends on which other images are in the batch.
    """

    def noise(restart: int) -> Tensor:
        draws = np.empty((len(numbers), *shape), np.float32)
        for draw, number in zip(draws, numbers.tolist(), strict=True):
            philox = np.random.Philox(key=[seed, number], counter=[0, 0, 0, restart])
            np.random.Generator(philox).random(out=draw, dtype=np.float32)
        return torch.from_numpy(draws).mul_(2.0).sub_(1.0).to(device)

    return noise


def perturb(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int, seed: int, numbers: Tensor | None = None
) -> Iterator[tuple[Split, Tensor]]:
    """Batches of `split` on the model's device as float images and labels, each with its attacked images.

    Args:
        numbers: the images' numbers in the test split, int64 (N,) on the CPU; by default 0 to N - 1.
    """
    device = next(model.parameters()).device
    if numbers is None:
        numbers = torch.arange(len(split))
    for index in torch.arange(len(split)).split(batch_size):
        images, labels = split.take(index.to(split.labels.device)).to(device)
        x = to_float(images).contiguous(memory_format=torch.channels_last)
        noise = noise_of(numbers[index], images.shape[1:], seed=seed, device=device)
        # Batches shrink as images fall, and no size of them is worth compiling for.
        with runtime.eager(runtime.is_compiled(model)):
            yield Split(x, labels), attack(model, x, labels, noise)


def run(
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    batch_size: int,
    seed: int,
    norm: Norm = "Linf",
    numbers: Tensor | None = None,
    precision: Precision = "fp32",
) -> Outcome:
    """Attack every image of `split` and ask the model; in eval mode, the mode is restored.

    Args:
        norm: that distances are measured in.
        numbers: the images' numbers in the test split, int64 (N,) on the CPU; by default 0 to N - 1.
        precision: of the model's passes; "bf16" runs them under autocast. TF32 is the caller's (runtime.set_precision).
    """
    predictions, margins, distances = [], [], []
    device = next(model.parameters()).device
    with attacks.under_attack(model), runtime.autocast(device, precision):
        for batch, x_adv in perturb(model, split, attack, batch_size=batch_size, seed=seed, numbers=numbers):
            with torch.no_grad():
                logits = full(model(x_adv))
            predictions.append(logits.argmax(1).cpu())
            margins.append(attacks.margin(logits, batch.labels).float().cpu())
            distances.append(norms.size(x_adv.double() - batch.images.double(), norm).cpu())
    return Outcome(torch.cat(predictions), torch.cat(margins), torch.cat(distances))


def sharded_accuracy(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int, seed: int, precision: Precision = "fp32"
) -> float:
    """The accuracy on a split of which every rank attacks its share, 0 to 1; the same on every rank."""
    numbers = torch.arange(distributed.rank(), len(split), distributed.world())
    share = split.take(numbers.to(split.labels.device))
    outcome = run(model, share, attack, batch_size=batch_size, seed=seed, numbers=numbers, precision=precision)
    correct = outcome.correct(share.labels.cpu())
    counts = torch.tensor(
        [int(correct.sum()), len(correct)], dtype=torch.float64, device=next(model.parameters()).device
    )
    right, images = distributed.summed(counts).tolist()
    return right / images


def accuracy(correct: Tensor) -> float:
    """The share of True in a bool tensor, 0 to 1."""
    return float(correct.double().mean())


def accuracy_per_class(correct: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Accuracy among the images of each class; None for a class without images."""
    return [accuracy(correct[labels == label]) if (labels == label).any() else None for label in range(classes)]
