"""The GPU list in miniature: the same ways with a tiny network and few images, for a try on a CPU."""

from dataclasses import replace

import torch
from gpu_recipe import Recipe

from d2r_core.data import Split


def data() -> dict[str, Split]:
    """Four classes of 16 x 16 images, each a bright quarter in noise."""

    def split(seed: int, count: int) -> Split:
        labels = torch.arange(count) % 4
        stream = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 160, (count, 3, 16, 16), generator=stream)
        for place, label in enumerate(labels.tolist()):
            row, column = 8 * (label // 2), 8 * (label % 2)
            images[place, :, row : row + 8, column : column + 8] += 80
        return Split(images.to(torch.uint8), labels)

    return {"train": split(0, 128), "validation": split(1, 32), "test": split(2, 32)}


def recipe(whole: Recipe) -> Recipe:
    """The recipe in miniature: three epochs of a small network, attacks of two steps, the quick AutoAttack."""
    small = {"name": "wide_resnet", "depth": 10, "widen_factor": 1}
    return replace(
        whole,
        target=small,
        guidance=small,
        epochs=3,
        batch_size=32,
        crop_padding=1,
        steps=2,
        awp_from_epoch=2,
        attack_steps=2,
        autoattack="quick",
        batch_size_attacked=8,
        shard=16,
    )
