"""What torchrun starts for tests/d2r_core/training/test_distributed.py: one rank of a training on the toy."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import toy
from torch import Tensor

from d2r_core import data, distributed
from d2r_core.errors import UserError
from d2r_core.training.methods import D2R


class Dying(D2R):
    """A training whose second rank is killed at its sixth step, once."""

    marker: Path
    steps = 0

    def perturb(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        self.steps += 1
        if self.steps == 6 and distributed.rank() == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().perturb(x, y, generator)


class Poisoned(D2R):
    """A training in which the second rank's loss becomes NaN at the sixth step."""

    steps = 0
    before: dict[str, Tensor]

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        terms = super().forward(x, x_adv, y)
        self.steps += 1
        if self.steps == 6:
            self.before = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
            if distributed.rank() == 1:
                terms["total"] = terms["total"] * torch.nan
        return terms


def gradients(folder: Path) -> None:
    """Each rank's gradient on its share of a batch, without and with DDP."""
    method = toy.d2r()
    indices = data.rank_batches(torch.arange(32), 32, rank=distributed.rank(), world=distributed.world())
    stream = torch.Generator().manual_seed(distributed.rank())
    x, y = data.load_batch(toy.split(0), indices[0], toy.CPU, padding=0, flip=False, generator=stream)
    x_adv = method.perturb(x, y, stream)
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}

    def gradient(module: torch.nn.Module) -> list[Tensor]:
        method.zero_grad()
        method.load_state_dict({**method.state_dict(), **buffers})
        module(x, x_adv, y)["total"].backward()
        return [parameter.grad.clone() for parameter in method.parameters() if parameter.grad is not None]

    alone = gradient(method)
    together = gradient(distributed.wrap_ddp(method))
    torch.save((alone, together), folder / f"gradients{distributed.rank()}.pt")


def train(folder: Path, *, dies: bool) -> None:
    arguments: dict[str, Any] = {"attack": toy.ATTACK, "clean_weight": 20.0, "adv_weight": 30.0}
    method = Dying(toy.network(0), toy.network(100), **arguments)
    method.marker = folder / "died"
    if not dies:
        method.marker.touch()
    best, logged = toy.fit(method, state_folder=folder / "state", save_minutes=0.0)
    torch.save((method.state_dict(), best.state, logged), folder / f"trained{distributed.rank()}.pt")


def diverge(folder: Path) -> None:
    """Write each rank's error, and its weights before the bad step and at the end."""
    method = Poisoned(toy.network(0), toy.network(100), attack=toy.ATTACK, clean_weight=20.0, adv_weight=30.0)
    message = ""
    try:
        toy.fit(method)
    except UserError as error:
        message = str(error)
    after = {name: parameter.detach() for name, parameter in method.named_parameters()}
    torch.save((message, method.steps, method.before, after), folder / f"diverged{distributed.rank()}.pt")


if __name__ == "__main__":
    where, *jobs = sys.argv[1:]
    folder = Path(where)
    torch.set_num_threads(1)
    with distributed.process_group(toy.CPU):
        for job in jobs:
            match job:
                case "gradients":
                    gradients(folder)
                case "diverge":
                    diverge(folder)
                case "train" | "dies":
                    train(folder, dies=job == "dies")
