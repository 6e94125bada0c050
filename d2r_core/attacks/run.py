"""Accuracy under attack, image by image: the same for any batch size and any number of processes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2r_core import distributed, files, runtime
from d2r_core.attacks import norms
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import Clean, Noise, margin, under_attack
from d2r_core.data import Split, to_float
from d2r_core.runtime import at_least_fp32


class Attack(Protocol):
    """What run_attack runs."""

    @property
    def name(self) -> str:
        """As papers call it."""

    @property
    def passes(self) -> int:
        """About how many passes an image costs that stays robust to the end, forward and backward ones."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Adversarial images for x, (B, 3, H, W) in [0, 1], with labels (B,); `noise` is image_noise's."""


class Progress(Protocol):
    """What hears how far the attacks are; under torchrun from its own process alone."""

    def begin(self, name: str, images: int, robust: int) -> None:
        """An attack starts on `images` images, `robust` of which were robust so far."""

    def advance(self, images: int, robust: int) -> None:
        """The attack is through with `images` more, made now or cached; `robust` of these are robust to it."""


class AttackResult(NamedTuple):
    """What the model says of each attacked image, on the CPU."""

    predictions: Tensor  # int64 (N,)
    margins: Tensor  # float32 (N,): the label's logit minus the best other one
    distances: Tensor  # float64 (N,): the perturbation's norm

    def correct(self, labels: Tensor) -> Tensor:
        """bool (N,)"""
        return self.predictions == labels


@dataclass
class AttackCost:
    """What an attack took to make its images, on all processes together; the passes are those of single images."""

    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0

    def add(self, forward_passes: float, backward_passes: float, seconds: float) -> None:
        self.forward_passes += round(forward_passes)
        self.backward_passes += round(backward_passes)
        self.seconds += seconds


def run_attack(
    model: nn.Module,
    split: Split,
    attack: Attack,
    config: EvaluationConfig,
    *,
    image_ids: Tensor | None = None,
    cost: AttackCost | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """Attack every image of `split` and ask the model about the result; in eval mode, the mode is restored.

    Under torchrun every process calls it alike, takes its share of the batches, and gets the whole result.

    Args:
        split: uint8 images, or float ones in [0, 1]; on any device.
        image_ids: the images' places in the test split, int64 (N,) on the CPU; by default 0 to N - 1. With the seed
            they determine the noise.
        cost: that of the attack is added to it; a cached batch costs what it took when it was made.
        progress: hears of each finished batch.
    """
    spent = torch.zeros(3, dtype=torch.float64, device=config.device)
    result = AttackResult(
        torch.zeros(len(split), dtype=torch.int64, device=config.device),
        torch.zeros(len(split), dtype=torch.float32, device=config.device),
        torch.zeros(len(split), dtype=torch.float64, device=config.device),
    )
    with under_attack(model), runtime.autocast(config.device, config.precision):
        share = (distributed.rank(), distributed.world())
        measured = spent if cost is not None else None
        for index, x_adv in _batches(model, split, attack, config, image_ids, share, measured):
            x, labels = _on_device(split, index, config.device)
            with torch.no_grad():
                logits = at_least_fp32(model(x_adv))
            result.predictions[index] = logits.argmax(1)
            result.margins[index] = margin(logits, labels).float()
            result.distances[index] = norms.norm(x_adv.double() - x.double(), config.norm)
            if progress:
                progress.advance(len(index), int((result.predictions[index] == labels).sum()))
    if cost is not None:
        cost.add(*distributed.all_reduce_sum(spent).tolist())
    # The other ranks' images are zeros here.
    return AttackResult(*(distributed.all_reduce_sum(part).cpu() for part in result))


def adversarial_images(
    model: nn.Module, split: Split, attack: Attack, config: EvaluationConfig, *, image_ids: Tensor | None = None
) -> Tensor:
    """The attacked images themselves, float32 (N, 3, H, W) on the CPU; as run_attack, but every process makes all."""
    with runtime.autocast(config.device, config.precision):
        return torch.cat([x_adv.cpu() for _, x_adv in _batches(model, split, attack, config, image_ids)])


def cascade(
    model: nn.Module,
    split: Split,
    attacks: Sequence[Attack],
    config: EvaluationConfig,
    *,
    image_ids: Tensor | None = None,
    cost: AttackCost | None = None,
    progress: Progress | None = None,
) -> tuple[AttackResult, dict[str, int]]:
    """Each attack in turn on the images that are still robust, as AutoAttack does.

    Args:
        image_ids: as run_attack takes them.
        cost: that of all attacks is added to it.
        progress: hears of each attack and its batches.

    Returns:
        What the most harmful attack made of each image, and how many were robust after each attack.
    """
    image_ids = torch.arange(len(split)) if image_ids is None else image_ids
    labels = split.labels.cpu()
    worst = run_attack(model, split, Clean(), replace(config, cache_folder=None), image_ids=image_ids)
    robust_after = {}
    for attack in attacks:
        robust = worst.correct(labels).nonzero().squeeze(1)
        if progress:
            progress.begin(attack.name, len(robust), len(robust))
        if len(robust):
            part = split.take(robust.to(split.labels.device))
            cached = config.cached_in(attack.name)
            ids = image_ids[robust]
            result = run_attack(model, part, attack, cached, image_ids=ids, cost=cost, progress=progress)
            worse = result.margins < worst.margins[robust]
            for column, values in zip(worst, result, strict=True):
                column[robust[worse]] = values[worse]
        robust_after[attack.name] = int(worst.correct(labels).sum())
    return worst, robust_after


def accuracy_under(model: nn.Module, split: Split, attack: Attack, config: EvaluationConfig) -> float:
    """The accuracy on `split`, 0 to 1; arguments as of `run_attack`."""
    return accuracy(run_attack(model, split, attack, config).correct(split.labels.cpu()))


def accuracy(correct: Tensor) -> float:
    """The share of True in a bool tensor, 0 to 1."""
    return float(correct.double().mean())


def image_noise(image_ids: Tensor, shape: torch.Size, *, seed: int, device: torch.device) -> Noise:
    """The noise of the images with these places in the test split, (B,), each of `shape` (C, H, W).

    A counter-based generator (Salmon et al. 2011) keyed by seed and place, its counter set to the restart: no draw
    depends on which other images are in the batch.
    """

    def noise(restart: int) -> Tensor:
        draws = np.empty((len(image_ids), *shape), np.float32)
        for draw, image_id in zip(draws, image_ids.tolist(), strict=True):
            philox = np.random.Philox(key=[seed, image_id], counter=[0, 0, 0, restart])
            np.random.Generator(philox).random(out=draw, dtype=np.float32)
        return torch.from_numpy(draws).mul_(2.0).sub_(1.0).to(device)

    return noise


def _batches(
    model: nn.Module,
    split: Split,
    attack: Attack,
    config: EvaluationConfig,
    image_ids: Tensor | None,
    share: tuple[int, int] = (0, 1),
    spent: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as the images' places in `split` and their adversarial images, on the device.

    `share` is which rank's batches, of how many ranks. What they cost is added to `spent`: forward passes, backward
    passes, seconds.
    """
    rank, world = share
    image_ids = torch.arange(len(split)) if image_ids is None else image_ids
    model.to(memory_format=torch.channels_last)
    for batch, index in enumerate(torch.arange(len(split)).split(config.batch_size)):
        if batch % world != rank:
            continue
        cache = config.cache_folder / f"{batch:05}.safetensors" if config.cache_folder else None
        batch_cost = torch.zeros(3, dtype=torch.float64)
        made = _load(cache, image_ids[index]) if cache else None
        if made is None:
            x, labels = _on_device(split, index, config.device)
            noise = image_noise(image_ids[index], x.shape[1:], seed=config.seed, device=config.device)
            # Batches shrink as images are misclassified, and no size of them is worth compiling for.
            measured = _measured(model, batch_cost, config.device) if cache or spent is not None else nullcontext()
            with runtime.eager(runtime.is_compiled(model)), measured:
                x_adv = attack(model, x, labels, noise)
            if cache:
                content = {"images": x_adv.cpu().contiguous(), "numbers": image_ids[index], "cost": batch_cost}
                with files.atomic(cache) as temporary:
                    save_file(content, temporary)
        else:
            x_adv, batch_cost = made
        if spent is not None:
            spent += batch_cost.to(spent.device)
        # Results are taken from these images alone, which are float32 in the cache as here.
        yield index, x_adv.to(config.device).contiguous(memory_format=torch.channels_last)


@contextmanager
def _measured(model: nn.Module, cost: Tensor, device: torch.device) -> Iterator[None]:
    """Add the passes of single images through `model`, and the seconds, to `cost`, float64 (3,)."""

    def count(module: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        images = len(inputs[0])
        cost[0] += images
        if logits.requires_grad:
            logits.register_hook(lambda gradient: count_backward(images))

    def count_backward(images: int) -> None:
        cost[1] += images

    hook = model.register_forward_hook(count)
    start = time.monotonic()
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost[2] += time.monotonic() - start
    finally:
        hook.remove()


def _on_device(split: Split, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = split.take(index.to(split.labels.device)).to(device)
    return to_float(images).contiguous(memory_format=torch.channels_last), labels


def _load(path: Path, image_ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """The adversarial images of a finished batch and their cost; None where there is none, or a damaged file.

    None too for other images, where a model whose passes do not repeat exactly has left other images robust.
    """
    try:
        content = load_file(path)
    except (OSError, SafetensorError):
        return None
    return (content["images"], content["cost"]) if torch.equal(content["numbers"], image_ids) else None
