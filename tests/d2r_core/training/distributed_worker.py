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


def gradients(folder: Path) -> None:
    """Each rank's gradient on its share of a batch, without and with DDP."""
    objective = toy.d2r()
    indices = data.shares(torch.arange(32), 32, rank=distributed.rank(), world=distributed.world())
    stream = torch.Generator().manual_seed(distributed.rank())
    x, y = data.load_batch(toy.split(0), indices[0], toy.CPU, padding=0, flip=False, generator=stream)
    x_adv = objective.perturb(x, y, stream)
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}

    def gradient(module: torch.nn.Module) -> list[Tensor]:
        objective.zero_grad()
        objective.load_state_dict({**objective.state_dict(), **buffers})
        module(x, x_adv, y)["total"].backward()
        return [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]

    alone = gradient(objective)
    together = gradient(distributed.wrapped(objective))
    torch.save((alone, together), folder / f"gradients{distributed.rank()}.pt")


def train(folder: Path, *, dies: bool) -> None:
    arguments: dict[str, Any] = {"attack": toy.ATTACK, "clean_weight": 20.0, "adv_weight": 30.0}
    objective = Dying(toy.network(0), toy.network(100), **arguments)
    objective.marker = folder / "died"
    if not dies:
        objective.marker.touch()
    kept, logged = toy.fit(objective, state_folder=folder / "state", save_minutes=0.0)
    torch.save((objective.state_dict(), kept.state, logged), folder / f"trained{distributed.rank()}.pt")


if __name__ == "__main__":
    job, where = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with distributed.process_group(toy.CPU):
        if job == "gradients":
            gradients(where)
        else:
            train(where, dies=job == "dies")
