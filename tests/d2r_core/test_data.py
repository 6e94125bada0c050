"""Prepared splits: batches, augmentation, orders, and files that are refused."""

from pathlib import Path

import pytest
import torch
from toy import CPU

from d2r_core import data, runtime
from d2r_core.data import Split
from d2r_core.errors import UserError


def test_crops_and_flips_are_exact_shifts_of_each_image() -> None:
    images = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).reshape(2, 3, 5, 5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for seed in range(60):
        augmented = data.crop_and_flip(images, padding=2, flip=True, generator=runtime.generator(seed, CPU))
        for image in range(2):
            crops = {(i, j): padded[image, :, i : i + 5, j : j + 5] for i in range(5) for j in range(5)}
            matches = [
                (*shift, mirrored)
                for shift, crop in crops.items()
                for mirrored in (False, True)
                if torch.equal(augmented[image], crop.flip(-1) if mirrored else crop)
            ]
            assert matches, "not a shift of the image"
            seen.update(matches)
    assert len(seen) > 30, "shifts and mirrors vary"


def test_an_epoch_holds_every_image_once() -> None:
    numbered = Split(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 4, 4), torch.arange(10))
    generator = runtime.generator(0, CPU)
    order = torch.randperm(10, generator=generator)
    indices = data.rank_batches(order, 4)
    assert [len(index) for index in indices] == [4, 4, 2]
    assert torch.equal(torch.cat(indices), order)
    halves = [data.rank_batches(order, 4, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(indices, *halves, strict=True):
        assert len(parts[0]) == len(parts[1])
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    batch = data.load_batch(numbered, indices[0], CPU, padding=0, flip=False, generator=generator)
    assert torch.equal(batch.labels, indices[0])
    torch.testing.assert_close(batch.images[:, 0, 0, 0] * 255, batch.labels.float())


def test_a_balanced_order_has_balanced_prefixes() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 5)
    order = data.balanced_order(labels, seed=0)
    assert torch.equal(order.sort().values, torch.arange(35))
    assert labels[order[:15]].bincount().tolist() == [5, 5, 5]
    assert not torch.equal(order, data.balanced_order(labels, seed=1))


def test_a_damaged_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    with pytest.raises(UserError, match=r"train\.safetensors: cannot be read as prepared data"):
        data.load_split(path)
    data.save_split(path, Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(UserError, match=r"images are torch\.uint8 \(2, 1, 4, 4\); expected uint8 \(N, 3, H, W\)"):
        data.load_split(path)


def test_a_split_on_the_device_is_not_streamed_whatever_the_device_is_called() -> None:
    """Training on a GPU asks for "cuda" and holds its split on "cuda:0"; here "cpu:0" and "cpu"."""
    images = Split(torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8), torch.arange(8))
    index = torch.arange(4)
    named, plain = (
        data.load_batch(images, index, device, padding=0, flip=False, generator=torch.Generator().manual_seed(0))
        for device in (torch.device("cpu", 0), torch.device("cpu"))
    )
    assert torch.equal(named.images, plain.images)
