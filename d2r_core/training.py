"""The training loop: attack, loss, step, log. Pretraining and D2R differ in the objective alone."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from d2r_core import evaluation, runtime
from d2r_core.data import Split, batches
from d2r_core.errors import UserError
from d2r_core.evaluation import Attack
from d2r_core.objectives import D2R, Standard
from d2r_core.schedules import Schedule, factor

Log = Callable[[Mapping[str, float], int], None]  # (metrics, epoch)


class Progress(Protocol):
    """Shows how far a loop over batches is, such as tqdm."""

    def __call__(self, iterable: Iterable[Split], *, desc: str, total: int) -> Iterable[Split]: ...


class Kept(NamedTuple):
    """The checkpoint that did best on the validation split."""

    epoch: int  # 0: the weights training started from
    metrics: dict[str, float]
    state: dict[str, Tensor]  # the model's state dict, on the CPU


def fit(
    objective: Standard | D2R,
    train: Split,
    validation: Split,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    schedule: Schedule,
    momentum: float,
    weight_decay: float,
    crop_padding: int,
    flip: bool,
    seed: int,
    criteria: Mapping[str, Attack],
    log: Log,
    progress: Progress,
) -> Kept:
    """Train all parameters of `objective` with SGD and keep the weights of its model that do best on `validation`.

    Args:
        objective: on its device; its `model` is validated and kept.
        train, validation: on the same device.
        seed: decides batches, crops, flips and the attack's noise.
        criteria: attacks on the validation split, by the name of the accuracy they give; the last one chooses the
            checkpoint, and the later of two equal epochs wins.
        log: gets each epoch's mean losses, the accuracies, the learning rate and the images per second.

    Raises:
        UserError: the loss is not finite; raised before the optimizer's step, the weights are still good.
    """
    device = train.labels.device
    generator = runtime.generator(seed, device)
    optimizer = torch.optim.SGD(objective.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)

    def validate() -> dict[str, float]:
        return {
            name: evaluation.accuracy(
                evaluation.run(objective.model, validation, attack, batch_size=batch_size, seed=seed).correct(
                    validation.labels.cpu()
                )
            )
            for name, attack in criteria.items()
        }

    def keep(epoch: int, metrics: dict[str, float]) -> Kept:
        state = objective.model.state_dict()
        return Kept(epoch, metrics, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})

    decisive = list(criteria)[-1]
    kept = keep(0, validate())
    for epoch in range(1, epochs + 1):
        rate = learning_rate * factor(schedule, epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        objective.train()
        sums: dict[str, Tensor] = {}
        started = time.perf_counter()
        epoch_batches = batches(train, batch_size, padding=crop_padding, flip=flip, generator=generator)
        steps = -(-len(train) // batch_size)
        for step, (x, y) in enumerate(progress(epoch_batches, desc=f"epoch {epoch}/{epochs}", total=steps), 1):
            noise = torch.randn(x.shape, generator=generator, device=device)
            x_adv = objective.perturb(x, noise)
            terms = objective(x, x_adv, y)
            if not torch.isfinite(terms["total"]):
                raise UserError(
                    f"epoch {epoch}, step {step} of {steps}: the loss is not finite "
                    f"({', '.join(f'{name} {float(term.detach()):.4g}' for name, term in terms.items())}). Training "
                    "stopped before this step changed the weights. A lower learning_rate usually helps."
                )
            optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
            optimizer.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() * len(y)
        means = {name: float(total) / len(train) for name, total in sums.items()}
        rates = {"learning_rate": rate, "images_per_second": len(train) / (time.perf_counter() - started)}
        accuracies = validate()
        log({"loss": means.pop("total"), **means, **accuracies, **rates}, epoch)
        if epoch == 1 or accuracies[decisive] >= kept.metrics[decisive]:
            kept = keep(epoch, accuracies)
    return kept
