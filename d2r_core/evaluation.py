"""Accuracy under attack, image by image, independent of the batch size."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2r_core import attacks, distributed, runtime
from d2r_core.data import Split, to_float

# (model, images (B, 3, H, W) in [0, 1], labels (B,), uniform noise in [-1, 1] of the images' shape) -> images
Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Outcome(NamedTuple):
    """What the model says of each attacked image, on the CPU."""

    predictions: Tensor  # int64 (N,)
    margins: Tensor  # float32 (N,): the label's logit minus the best other one

    def correct(self, labels: Tensor) -> Tensor:
        """bool (N,)"""
        return self.predictions == labels


def clean() -> Attack:
    """No attack."""
    return lambda model, x, y, noise: x


def fgsm(eps: float) -> Attack:
    """One step of length eps (Goodfellow et al. 2015)."""
    return lambda model, x, y, noise: attacks.fgsm(model, x, y, eps=eps)


def pgd(eps: float, step_size: float, steps: int) -> Attack:
    """Cross-entropy, random start (Madry et al. 2018)."""
    return lambda model, x, y, noise: attacks.pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, noise=noise)


def cw(eps: float, step_size: float, steps: int) -> Attack:
    """The margin loss of Carlini & Wagner (2017) in PGD's loop, random start."""
    return lambda model, x, y, noise: attacks.pgd(
        model, x, y, eps=eps, step_size=step_size, steps=steps, loss="margin", noise=noise
    )


def perturb(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int, seed: int
) -> Iterable[tuple[Split, Tensor]]:
    """Batches of `split` (on the model's device) as float images and labels, each with its attacked images.

    The noise of an image depends on `seed` and its place in the split only, so the batch size changes nothing.
    """
    device = next(model.parameters()).device
    noise = torch.empty(split.images.shape).uniform_(-1.0, 1.0, generator=runtime.generator(seed, torch.device("cpu")))
    for index in torch.arange(len(split)).split(batch_size):
        images, labels = split.take(index.to(split.labels.device)).to(device)
        x = to_float(images).contiguous(memory_format=torch.channels_last)
        # A compiled model runs the smaller last batch eagerly.
        with runtime.eager(len(index) < batch_size and runtime.is_compiled(model)):
            yield Split(x, labels), attack(model, x, labels, noise[index].to(device))


def run(
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    batch_size: int,
    seed: int,
) -> Outcome:
    """Attack every image of `split` and ask the model; in eval mode, the mode is restored."""
    predictions, margins = [], []
    with attacks.under_attack(model):
        for batch, x_adv in perturb(model, split, attack, batch_size=batch_size, seed=seed):
            with torch.no_grad():
                logits = model(x_adv)
            predictions.append(logits.argmax(1).cpu())
            margins.append(attacks.margin(logits, batch.labels).float().cpu())
    return Outcome(torch.cat(predictions), torch.cat(margins))


def sharded_accuracy(model: nn.Module, share: Split, attack: Attack, *, batch_size: int, seed: int) -> float:
    """The accuracy over all ranks' shares of a split, 0 to 1; the same on every rank."""
    outcome = run(model, share, attack, batch_size=batch_size, seed=seed)
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
