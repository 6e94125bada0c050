"""Accuracy under attack, image by image: the same for any batch size and any number of processes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2r_core import distributed, files, runtime
from d2r_core.attacks import norms
from d2r_core.attacks import pgd as attacks
from d2r_core.attacks.norms import Norm
from d2r_core.data import Split, to_float
from d2r_core.runtime import Precision, at_least_fp32

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
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    batch_size: int,
    seed: int,
    precision: Precision = "fp32",
    numbers: Tensor | None = None,
) -> Tensor:
    """The attacked images of `split`, float32 (N, 3, H, W) on the CPU; arguments as of `run`, but nothing is shared."""
    with runtime.autocast(next(model.parameters()).device, precision):
        batches = _batches(model, split, attack, batch_size, seed, numbers)
        return torch.cat([x_adv.cpu() for _, x_adv in batches])


def run(
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    batch_size: int,
    seed: int,
    norm: Norm = "Linf",
    precision: Precision = "fp32",
    numbers: Tensor | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Attack every image of `split` and ask the model about what came of it; in eval mode, the mode is restored.

    Under torchrun every process calls it alike, takes its share of the batches, and gets the whole outcome.

    Args:
        norm: that distances are measured in.
        precision: of the model's passes; "bf16" runs them under autocast. TF32 is the caller's (runtime.set_precision).
        numbers: the images' numbers in the test split, int64 (N,) on the CPU; by default 0 to N - 1.
        folder: where the attacked images of finished batches are kept, and found by a call that repeats an interrupted
            one. The caller names it after everything that they depend on. What is kept is float32, and predictions and
            distances are taken from it alone.
    """
    device = next(model.parameters()).device
    outcome = Outcome(
        torch.zeros(len(split), dtype=torch.int64, device=device),
        torch.zeros(len(split), dtype=torch.float32, device=device),
        torch.zeros(len(split), dtype=torch.float64, device=device),
    )
    with attacks.under_attack(model), runtime.autocast(device, precision):
        share = (distributed.rank(), distributed.world())
        for index, x_adv in _batches(model, split, attack, batch_size, seed, numbers, folder, share):
            x, labels = _on(device, split, index)
            with torch.no_grad():
                logits = at_least_fp32(model(x_adv))
            outcome.predictions[index] = logits.argmax(1)
            outcome.margins[index] = attacks.margin(logits, labels).float()
            outcome.distances[index] = norms.size(x_adv.double() - x.double(), norm)
    return Outcome(*(distributed.all_reduce_sum(part).cpu() for part in outcome))  # other ranks' images are zeros here


def cascade(
    model: nn.Module,
    split: Split,
    stages: Mapping[str, Attack],
    *,
    begin: Callable[[str, int], None] = lambda name, standing: None,
    numbers: Tensor | None = None,
    folder: Path | None = None,
    **options: Any,
) -> tuple[Outcome, dict[str, int]]:
    """Each attack in turn on the images that still stand, as AutoAttack does.

    Args:
        begin: hears of each attack's name and how many images stand, before it starts.
        numbers, folder, options: as `run` takes them.

    Returns:
        What the most harmful attack made of each image, and how many stood after each.
    """
    numbers = torch.arange(len(split)) if numbers is None else numbers
    labels = split.labels.cpu()
    found = run(model, split, clean(), numbers=numbers, **options)
    stood = {}
    for name, attack in stages.items():
        standing = found.correct(labels).nonzero().squeeze(1)
        begin(name, len(standing))
        if len(standing):
            part = split.take(standing.to(split.labels.device))
            kept = folder / name if folder else None
            attacked = run(model, part, attack, numbers=numbers[standing], folder=kept, **options)
            worse = attacked.margins < found.margins[standing]
            for column, news in zip(found, attacked, strict=True):
                column[standing[worse]] = news[worse]
        stood[name] = int(found.correct(labels).sum())
    return found, stood


def _batches(
    model: nn.Module,
    split: Split,
    attack: Attack,
    batch_size: int,
    seed: int,
    numbers: Tensor | None,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as the images' places in `split` and what the attack made of them, on the device.

    `share` is which rank's batches, of how many ranks.
    """
    rank, world = share
    device = next(model.parameters()).device
    numbers = torch.arange(len(split)) if numbers is None else numbers
    model.to(memory_format=torch.channels_last)
    for batch, index in enumerate(torch.arange(len(split)).split(batch_size)):
        if batch % world != rank:
            continue
        kept = folder / f"{batch:05}.safetensors" if folder else None
        x_adv = _load(kept, numbers[index]) if kept else None
        if x_adv is None:
            x, labels = _on(device, split, index)
            noise = noise_of(numbers[index], x.shape[1:], seed=seed, device=device)
            # Batches shrink as images fall, and no size of them is worth compiling for.
            with runtime.eager(runtime.is_compiled(model)):
                x_adv = attack(model, x, labels, noise)
            if kept:
                with files.atomic(kept) as temporary:
                    save_file({"images": x_adv.cpu().contiguous(), "numbers": numbers[index]}, temporary)
        yield index, x_adv.to(device).contiguous(memory_format=torch.channels_last)


def _on(device: torch.device, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = split.take(index.to(split.labels.device)).to(device)
    return to_float(images).contiguous(memory_format=torch.channels_last), labels


def _load(path: Path, numbers: Tensor) -> Tensor | None:
    """The attacked images of a finished batch; None where there is none, a damaged file, or one of other images.

    Others, where a model whose passes do not repeat exactly has left other images standing.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return found["images"] if torch.equal(found["numbers"], numbers) else None


def accuracy_under(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int, seed: int, precision: Precision = "fp32"
) -> float:
    """The accuracy on `split`, 0 to 1; arguments as of `run`."""
    outcome = run(model, split, attack, batch_size=batch_size, seed=seed, precision=precision)
    return accuracy(outcome.correct(split.labels.cpu()))


def accuracy(correct: Tensor) -> float:
    """The share of True in a bool tensor, 0 to 1."""
    return float(correct.double().mean())


def accuracy_per_class(correct: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Accuracy among the images of each class; None for a class without images."""
    return [accuracy(correct[labels == label]) if (labels == label).any() else None for label in range(classes)]
