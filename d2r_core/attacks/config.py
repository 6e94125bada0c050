"""Under which circumstances models are attacked."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import PGD
from d2r_core.runtime import Precision


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How an evaluation runs, and its radius and PGD; eps and step size in the images' units, by default the field's.

    `run_attack` takes an attack with a radius of its own, and reads the first six alone.
    """

    batch_size: int
    seed: int  # of the images' noise
    device: torch.device  # where the model is
    norm: Norm = "Linf"  # that distances are measured in
    precision: Precision = "fp32"  # of the model's passes; "bf16" is autocast. TF32 is set by runtime.set_precision
    # Where the adversarial images of finished batches are cached, for a call that repeats an interrupted one. The
    # caller names it after everything that they depend on.
    cache_folder: Path | None = None
    eps: float = 8 / 255
    step_size: float = 2 / 255  # of PGD and CW
    steps: int = 20
    restarts: int = 1

    @property
    def pgd(self) -> PGD:
        """The evaluation's PGD."""
        return PGD(eps=self.eps, step_size=self.step_size, steps=self.steps, norm=self.norm, restarts=self.restarts)

    def cached_in(self, name: str) -> "EvaluationConfig":
        """The same with that folder inside the cache, if there is a cache."""
        return replace(self, cache_folder=self.cache_folder / name) if self.cache_folder else self

    def without_cache(self) -> "EvaluationConfig":
        """The same for what is not worth a cache."""
        return replace(self, cache_folder=None)
