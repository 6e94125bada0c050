"""The training loop: attack, loss, step, log. Methods differ in the objective alone."""

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from d2r_core import checkpoint, distributed, runtime
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import Attack, accuracy_under
from d2r_core.data import Split, load_batch, shares
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted, stop_requests
from d2r_core.training import awp, weight_average
from d2r_core.training.methods import Objective
from d2r_core.training.schedules import Schedule, factor

Log = Callable[[Mapping[str, float], int], None]  # (metrics, epoch)
LogStep = Callable[[Mapping[str, float], int, int, int], None]  # (means so far, epoch, step, steps of the epoch)

_LOG_SECONDS = 1.0  # between two calls of log_step, each of which waits for the device


@dataclass(frozen=True)
class Kept:
    """The checkpoint that did best on the validation split."""

    epoch: int  # 0: the weights training started from
    metrics: dict[str, float]
    last_metrics: dict[str, float]  # of the last epoch: robust overfitting shows as a difference
    state: dict[str, Tensor]  # the model's state dict, on the CPU


def fit(
    objective: Objective,
    train: Split,
    validation: Split,
    *,
    device: torch.device,
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
    log_step: LogStep = lambda means, epoch, step, steps: None,
    gradient_clip: float | None = None,
    awp_gamma: float = 0.0,
    awp_from_epoch: int = 1,
    average: weight_average.Averaging = "none",
    average_decay: float = 0.999,
    average_from_epoch: int = 1,
    precision: runtime.Precision = "fp32",
    state_folder: Path | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
) -> Kept:
    """Train `objective` with SGD and keep the weights of its model that do best on `validation`.

    Under torchrun every process calls it alike and takes its share of each batch.

    Args:
        objective: on `device`; its `model` is validated and kept.
        train, validation: on `device`, or on the host, from where batches are streamed.
        batch_size: of a step, over all processes.
        seed: decides order, crops, flips and the attack's noise, each step's on its own, so that a training continues
            exactly where it stopped.
        criteria: attacks on the validation split, by the name of the accuracy they give; the last one chooses the
            checkpoint, and the later of two equal epochs wins.
        log, log_step: get each epoch's means, accuracies and rates, and about once a second the means so far; on rank
            0 only.
        gradient_clip: largest norm of the gradient; None leaves it as it is.
        awp_gamma: size of the adversarial weight perturbation (awp.perturbed); 0 for none.
        average: from `average_from_epoch` on, an average of the model's weights is what is validated and kept.
        state_folder: where the state is saved after each epoch and every `save_minutes`, and resumed from. The caller
            names it after everything that the training depends on. None: no state.
        max_minutes: save the state and stop after so long.

    Raises:
        Interrupted: after SIGINT, SIGTERM or `max_minutes`, with the state saved.
        UserError: the loss is not finite (before the optimizer's step), or the state cannot be written.
    """
    rank, world = distributed.rank(), distributed.world()
    cpu = torch.device("cpu")
    stream = runtime.generator(seed, device)
    objective.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    averaged = weight_average.averaged(objective.model, average, average_decay)
    parallel = distributed.wrapped(objective)
    decisive = list(criteria)[-1]

    def validate(model: nn.Module) -> dict[str, float]:
        distributed.share_buffers(model)
        return {
            name: accuracy_under(
                model,
                validation,
                attack,
                EvaluationConfig(batch_size=batch_size // world, seed=seed, precision=precision, device=device),
            )
            for name, attack in criteria.items()
        }

    def candidate() -> nn.Module:
        """What is validated and kept after an epoch: the model, or the average with its own BatchNorm statistics."""
        if averaged is None or epoch < average_from_epoch:
            return objective.model
        indices = shares(torch.arange(len(train)), batch_size, rank=rank, world=world)
        plain = (load_batch(train, index, device, padding=0, flip=False, generator=stream).images for index in indices)
        weight_average.refresh_batch_norm(averaged, plain)
        model: nn.Module = averaged.module
        return model

    def keep(epoch: int, model: nn.Module, metrics: dict[str, float]) -> Kept:
        state = {name: tensor.detach().to(cpu, copy=True) for name, tensor in model.state_dict().items()}
        return Kept(epoch, metrics, metrics, state)

    def save() -> None:
        if state_folder is not None and rank == 0:
            progress = {"epoch": epoch, "step": step, "sums": sums, "kept": asdict(kept)}
            models = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
            averages = {} if averaged is None else {"averaged": averaged.state_dict()}
            checkpoint.save_state(state_folder, progress | models | averages)

    def update(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Attack, loss, step; returns the loss's terms."""
        distributed.share_buffers(objective)  # the state holds rank 0's alone, and the attack depends on them
        with runtime.autocast(device, precision):
            x_adv = objective.perturb(x, y, stream)

        def loss(module: nn.Module) -> dict[str, Tensor]:
            with runtime.autocast(device, precision):
                terms: dict[str, Tensor] = module(x, x_adv, y)
            return terms

        optimizer.zero_grad(set_to_none=True)
        perturbs = awp_gamma > 0 and epoch >= awp_from_epoch
        with awp.perturbed(objective.model, lambda: loss(objective)["total"], awp_gamma) if perturbs else nullcontext():
            terms = loss(parallel)
            terms["total"].backward()
        if gradient_clip is not None:
            nn.utils.clip_grad_norm_(trained, gradient_clip)
        finite.guard(terms["total"], step)
        optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    epoch, step = 1, 0  # step: how many of this epoch's are done
    sums: dict[str, Tensor] = {}  # of the loss's terms over this epoch's images
    # Rank 0 alone has the file, on a machine of several; and it writes the next one while others might still read.
    found = checkpoint.load_state(state_folder, warnings.warn) if state_folder is not None and rank == 0 else None
    state = distributed.from_first(found)
    if state is None:
        kept = keep(0, objective.model, validate(objective.model))
    else:
        epoch, step, kept = state["epoch"], state["step"], Kept(**state["kept"])
        sums = {name: total.to(device) for name, total in state["sums"].items()}
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])

    with stop_requests(max_minutes) as stop_reason:
        next_save, next_log = time.monotonic() + 60 * save_minutes, 0.0
        while epoch <= epochs:
            order = torch.randperm(len(train), generator=runtime.generator(_number(seed, epoch), cpu))
            indices = shares(order, batch_size, rank=rank, world=world)
            steps = len(indices)
            objective.train()
            finite = _Finite(optimizer, device, epoch, steps)
            begun, first = time.monotonic(), step
            for index in indices[first:]:
                step += 1
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * factor(schedule, epoch, epochs, (step - 1) / steps)
                stream.manual_seed(_number(seed, epoch, step, rank))
                x, y = load_batch(train, index, device, padding=crop_padding, flip=flip, generator=stream)
                # An epoch's smaller last batch is not worth compiling for.
                with runtime.eager(len(y) < batch_size // world and runtime.is_compiled(objective.model)):
                    terms = update(x, y)
                if averaged is not None and average == "ema":
                    averaged.update_parameters(objective.model)
                for name, term in terms.items():
                    sums[name] = sums.get(name, torch.zeros_like(term)) + term * len(y)
                if time.monotonic() >= next_log or step == steps:
                    finite.check()
                    if rank == 0:
                        log_step(_means(sums, min(step * batch_size, len(train)) / world), epoch, step, steps)
                    next_log = time.monotonic() + _LOG_SECONDS
                # Every tenth step: asking the other ranks takes a moment, and all must ask at the same step.
                asks = world == 1 or step % 10 == 0 or step == steps
                reason = distributed.first_of(stop_reason()) if asks else None
                if reason or time.monotonic() >= next_save:
                    finite.check()
                    save()
                    next_save = time.monotonic() + 60 * save_minutes
                if reason:
                    saved = f"the state after epoch {epoch}, step {step} of {steps} is saved: run it again to continue"
                    raise Interrupted(f"{reason}; {saved if state_folder is not None else 'no state was kept'}.")
            means = _means(
                {name: distributed.summed(total) for name, total in sums.items()}, sum(map(len, indices)) * world
            )
            seconds = time.monotonic() - begun
            rates = {
                "learning_rate": optimizer.param_groups[0]["lr"],
                "images_per_second": (steps - first) * batch_size / seconds,
            }
            if averaged is not None and average == "swa" and epoch >= average_from_epoch:
                averaged.update_parameters(objective.model)
            model = candidate()
            accuracies = validate(model)
            if rank == 0:
                log({"loss": means.pop("total"), **means, **accuracies, **rates}, epoch)
            best = epoch == 1 or accuracies[decisive] >= kept.metrics[decisive]
            kept = keep(epoch, model, accuracies) if best else replace(kept, last_metrics=accuracies)
            epoch, step, sums = epoch + 1, 0, {}
            save()
    return kept


class _Finite:
    """Keeps a loss that is not finite out of the weights, without waiting for the device at every step.

    On the device the optimizer skips every step from the first bad loss on; `check`, called now and then, names it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, epoch: int, steps: int) -> None:
        self.optimizer = optimizer
        self.first_bad = torch.zeros((), device=device)
        self.epoch, self.steps = epoch, steps

    def guard(self, loss: Tensor, step: int) -> None:
        """Before the optimizer's step: make it skip if this or an earlier loss of the epoch is not finite."""
        bad_now = ~torch.isfinite(loss.detach())
        self.first_bad = torch.where((self.first_bad == 0) & bad_now, float(step), self.first_bad)
        self.optimizer.found_inf = (self.first_bad > 0).float()  # type: ignore[attr-defined]
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise UserError if a loss was not finite; waits for the device."""
        bad = int(self.first_bad)
        if bad:
            raise UserError(
                f"epoch {self.epoch}, step {bad} of {self.steps}: the loss is not finite. Training stopped before this "
                "step changed the weights. A lower learning_rate, or gradient_clip, usually helps."
            )


def _means(sums: Mapping[str, Tensor], images: float) -> dict[str, float]:
    return {name: float(total) / images for name, total in sums.items()}


def _number(*key: int) -> int:
    """A seed for the random stream of that name, so that no two streams of a training are alike."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
