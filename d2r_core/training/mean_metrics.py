"""Means over the images of an epoch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2r_core import distributed


class MeanMetrics:
    """Weighted sums of a step's scalars, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = 0  # seen by this process

    def update(self, values: Mapping[str, Tensor], images: int) -> None:
        """Add the means over one batch of so many images."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * images
        self.images += images

    def local_means(self) -> dict[str, float]:
        """The means over this process's images; waits for the device."""
        return {name: float(total) / self.images for name, total in self.sums.items()}

    def global_means(self) -> dict[str, float]:
        """The means over all ranks' images, which are equally many on each; every rank must call it."""
        images = self.images * distributed.world()
        return {name: float(distributed.all_reduce_sum(total)) / images for name, total in self.sums.items()}

    def reset(self) -> None:
        self.sums, self.images = {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.images = state["images"]
