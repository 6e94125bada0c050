"""The training loop: attack, loss, update, validation, log. Methods differ in attack and loss alone."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2r_core import distributed, runtime
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import Attack, accuracy_under
from d2r_core.data import Split, load_batch, rank_batches, require_uint8
from d2r_core.interruption import Interrupted, stop_requests
from d2r_core.training import awp
from d2r_core.training.checkpointer import Checkpointer
from d2r_core.training.config import TrainingConfig
from d2r_core.training.mean_metrics import MeanMetrics
from d2r_core.training.methods import TrainingMethod
from d2r_core.training.non_finite_guard import NonFiniteGuard
from d2r_core.training.schedules import factor
from d2r_core.training.weight_average import WeightAverage

_LOG_SECONDS = 1.0  # between two calls of log_step, each of which waits for the device
_SYNC_STEPS = 10  # between two exchanges of the ranks on stopping, saving and logging


class Logger(Protocol):
    """Receives the figures of a training, on rank 0 only."""

    def log_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        """The means, accuracies and rates of a finished epoch."""

    def log_step(self, means: Mapping[str, float], epoch: int, step: int, steps: int) -> None:
        """The means over the epoch so far, about once a second."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The weights with the highest accuracy on the validation split."""

    epoch: int  # 0: the initial weights
    metrics: dict[str, float]
    last_metrics: dict[str, float]  # of the last epoch: robust overfitting shows as a difference
    state: dict[str, Tensor]  # the model's state dict, on the CPU


class Trainer:
    """Trains a method's models with SGD and returns the weights of its `model` that do best on `validation`.

    Under torchrun every process makes one and calls it alike; each takes its part of every batch. All random draws of
    a step come from the seed, the epoch, the step and the rank, so a resumed training repeats the interrupted one.

    Args:
        method: on `device`; its `model` is validated and returned.
        train, validation: on `device`, or on the host, from where batches are streamed.
        validation_attacks: by the name of the accuracy that they give on the validation split.
        select_by: the accuracy that selects the checkpoint; the later of two equal epochs wins.

    Raises:
        ValueError: `select_by` is none of the validation attacks, or images are not uint8.
    """

    def __init__(
        self,
        method: TrainingMethod,
        train: Split,
        validation: Split,
        config: TrainingConfig,
        *,
        device: torch.device,
        validation_attacks: Mapping[str, Attack],
        select_by: str,
        logger: Logger | None = None,
    ) -> None:
        if select_by not in validation_attacks:
            raise ValueError(f"select_by is {select_by!r}; validation attacks: {', '.join(validation_attacks)}.")
        require_uint8(train, validation)
        self.method, self.train, self.validation = method, train, validation
        self.config, self.device, self.next_log = config, device, 0.0
        self.logger = logger if distributed.rank() == 0 else None
        self.validation_attacks, self.select_by = validation_attacks, select_by
        self.generator = runtime.generator(config.seed, device)
        method.to(memory_format=torch.channels_last)
        self.parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        averages = config.averaging.name != "none"
        self.average = WeightAverage(method.model, config.averaging) if averages else None
        self.ddp_method = distributed.wrap_ddp(method)
        self.guard = NonFiniteGuard(self.optimizer, device)
        self.metrics = MeanMetrics()  # of the current epoch
        self.epoch, self.step = 0, 0  # the current epoch, from 1, and how many of its steps are done
        self.steps = len(self._batches(torch.arange(len(train))))  # of an epoch
        self.best: BestCheckpoint | None = None

    def fit(self, checkpointer: Checkpointer | None = None, max_minutes: float | None = None) -> BestCheckpoint:
        """Train for the configured epochs, or for what is left of them if `checkpointer` has a state.

        The state is saved after each epoch, on interruption, and whenever the checkpointer says that it is due.

        Raises:
            Interrupted: after SIGINT, SIGTERM or `max_minutes`, with the state saved if there is a checkpointer.
            UserError: the loss or its gradient is not finite, before a weight changes; or the state cannot be written.
        """
        state = checkpointer.load() if checkpointer else None
        if state is not None:
            self.load_state_dict(state)
        else:
            self._update_best(self.validate())
            self.epoch = 1
        with stop_requests(max_minutes) as stop_reason:
            while self.epoch <= self.config.epochs:
                start, first_step = time.monotonic(), self.step
                means = self.train_epoch(stop_reason, checkpointer)
                images = (self.step - first_step) * self.config.batch_size
                rates = {
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    "images_per_second": images / (time.monotonic() - start),
                }
                self._finish_average()
                accuracies = self.validate()
                if self.logger:
                    self.logger.log_epoch({"loss": means.pop("total"), **means, **accuracies, **rates}, self.epoch)
                self._update_best(accuracies)
                self.epoch, self.step = self.epoch + 1, 0
                self.metrics.reset()
                if checkpointer:
                    checkpointer.save(self.state_dict())
        assert self.best is not None
        return self.best

    def train_epoch(
        self, stop_reason: Callable[[], str | None], checkpointer: Checkpointer | None = None
    ) -> dict[str, float]:
        """Train on the rest of the current epoch's batches; returns the means of the loss's terms over the epoch.

        Raises Interrupted between two steps once `stop_reason` returns a reason on any rank.
        """
        order_seed = runtime.derive_seed(self.config.seed, self.epoch)
        order = torch.randperm(len(self.train), generator=runtime.generator(order_seed, torch.device("cpu")))
        full_batch = self.config.batch_size // distributed.world()
        self.method.train()
        for indices in self._batches(order)[self.step :]:
            self.step += 1
            self._begin_step()
            x, y = self._load_batch(indices)
            # An epoch's smaller last batch is not worth compiling for.
            with runtime.eager(len(y) < full_batch and runtime.is_compiled(self.method.model)):
                terms = self.train_step(x, y)
            self.metrics.update(terms, len(y))
            # Ranks must exchange at the same steps, and not at each: it takes a moment.
            if distributed.world() == 1 or self.step % _SYNC_STEPS == 0 or self.step == self.steps:
                self._log_save_or_stop(stop_reason, checkpointer)
        return self.metrics.global_means()

    def train_step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Attack, loss and update on float images (B, 3, H, W) in [0, 1] and labels (B,); returns the loss's terms."""
        # A saved state holds rank 0's BatchNorm statistics alone, and the attack depends on them.
        distributed.broadcast_buffers(self.method)
        with runtime.autocast(self.device, self.config.precision):
            x_adv = self.method.perturb(x, y, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        with self._perturbed_weights(x, x_adv, y):
            terms = self._loss_terms(self.ddp_method, x, x_adv, y)
            terms["total"].backward()
        self.guard.before_step(terms["total"], self._clip_gradient(), self.step)
        if self.device.type == "cpu":  # on a GPU the check would wait for the device; it is made now and then there
            self.guard.check(self.epoch, self.steps)
        self.optimizer.step()
        if self.average:
            self.average.update_after_step(self.method.model)
        return {name: term.detach() for name, term in terms.items()}

    def validate(self) -> dict[str, float]:
        """The accuracy on the validation split, 0 to 1, under each validation attack."""
        model = self.validated_model
        distributed.broadcast_buffers(model)
        config = EvaluationConfig(
            batch_size=self.config.batch_size // distributed.world(),
            seed=self.config.seed,
            precision=self.config.precision,
            device=self.device,
        )
        return {
            name: accuracy_under(model, self.validation, attack, config)
            for name, attack in self.validation_attacks.items()
        }

    @property
    def validated_model(self) -> nn.Module:
        """What is validated and returned: the averaged model from its epoch on, else the method's model."""
        if self.average and self.epoch >= self.config.averaging.from_epoch:
            return self.average.model
        return self.method.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on; tensors are not copied."""
        assert self.best is not None
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "metrics": self.metrics.state_dict(),
            "best": dict(vars(self.best)),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return state | ({"average": self.average.state_dict()} if self.average else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, tensors on any device."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.metrics.load_state_dict(state["metrics"], self.device)
        self.best = BestCheckpoint(**state["best"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def _batches(self, order: Tensor) -> list[Tensor]:
        """This rank's part of each batch of an epoch in this order of images, as indices."""
        return rank_batches(order, self.config.batch_size, rank=distributed.rank(), world=distributed.world())

    def _load_batch(self, indices: Tensor) -> Split:
        """These images for the current step, augmented; all random draws of the step follow from its own seed."""
        padding, flip, generator = self.config.crop_padding, self.config.flip, self.generator
        generator.manual_seed(runtime.derive_seed(self.config.seed, self.epoch, self.step, distributed.rank()))
        return load_batch(self.train, indices, self.device, padding=padding, flip=flip, generator=generator)

    def _begin_step(self) -> None:
        """Set what changes in the course of the training: the learning rate, and what the method changes itself."""
        fraction = (self.step - 1) / self.steps
        scale = factor(self.config.schedule, self.epoch, self.config.epochs, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * scale
        self.method.begin_step(self.config.warm_up, self.epoch - 1 + fraction)

    def _loss_terms(self, method: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        with runtime.autocast(self.device, self.config.precision):
            terms: dict[str, Tensor] = method(x, x_adv, y)
        return terms

    def _perturbed_weights(self, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[None]:
        """The block in which gradients are taken: at adversarially perturbed weights, if that is configured."""
        perturbation = self.config.weight_perturbation
        if perturbation.gamma == 0 or self.epoch < perturbation.from_epoch:
            return nullcontext()
        return awp.perturbed(
            self.method.model, lambda: self._loss_terms(self.method, x, x_adv, y)["total"], perturbation.gamma
        )

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient where that is configured; returns its norm before."""
        if self.config.gradient_clip is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _log_save_or_stop(self, stop_reason: Callable[[], str | None], checkpointer: Checkpointer | None) -> None:
        """After a step, on all ranks at once."""
        reason = distributed.first_not_none(stop_reason())
        log_is_due = time.monotonic() >= self.next_log or self.step == self.steps
        save_is_due = checkpointer is not None and checkpointer.is_due()
        if log_is_due or save_is_due or reason or distributed.world() > 1:  # clocks differ, and all ranks must raise
            self.guard.check(self.epoch, self.steps)
        if log_is_due and self.logger:
            self.logger.log_step(self.metrics.local_means(), self.epoch, self.step, self.steps)
        if log_is_due:
            self.next_log = time.monotonic() + _LOG_SECONDS
        if checkpointer and (save_is_due or reason):
            checkpointer.save(self.state_dict())
        if reason:
            position = f"epoch {self.epoch}, step {self.step} of {self.steps}"
            saved = f"the state after {position} is saved: run it again to continue" if checkpointer else "not saved"
            raise Interrupted(f"{reason}; {saved}.")

    def _finish_average(self) -> None:
        """After an epoch: update the average and give it BatchNorm statistics, on the unaugmented training images."""
        if self.average is None:
            return
        self.average.update_after_epoch(self.method.model, self.epoch)
        if self.validated_model is self.average.model:
            batches = (
                load_batch(self.train, indices, self.device, padding=0, flip=False, generator=self.generator)
                for indices in self._batches(torch.arange(len(self.train)))
            )
            self.average.refresh_batch_norm(batch.images for batch in batches)

    def _update_best(self, metrics: dict[str, float]) -> None:
        """Copy the validated weights if they are the best so far; the first epoch's always replace the initial ones."""
        best = self.best
        if best and self.epoch > 1 and metrics[self.select_by] < best.metrics[self.select_by]:
            self.best = replace(best, last_metrics=metrics)
            return
        state = self.validated_model.state_dict()
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        self.best = BestCheckpoint(self.epoch, metrics, metrics, copied)
