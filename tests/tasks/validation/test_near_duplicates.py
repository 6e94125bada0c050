"""Near-duplicates across splits: detected, reported with their images, and only a warning."""

import io
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image, ImageEnhance
from project import SHARED
from validation_inputs import find, make_pictures, picture, picture_limits, prepare_pictures, tensor

from d2r_core.errors import UserError
from tasks import validate
from tasks.validation import near_duplicates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pictures(tmp_path)


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed": recompressed,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "reduced and enlarged": lambda image: image.resize((20, 20)).resize((32, 32)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_a_changed_copy_in_another_split_is_a_warning_and_named(
    folder: Path, copy: Callable[[Image.Image], Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    copy(Image.open(folder / "train/cat/03.png")).convert("RGB").save(folder / "test/cat/09.png")
    paths = prepare_pictures(folder.parent)
    finding = find(validate.run(picture_limits(), paths), "no near-duplicate in another split")
    assert (finding.ok, finding.severity, finding.observed) == (False, "warning", "1 of 19 fail")
    cat = f"{folder}/test/cat/09.png (near_duplicate_of {folder}/train/cat/03.png)"
    assert [str(offender) for offender in finding.offenders] == [cat]
    output = capsys.readouterr().out
    assert ", 1 warnings ->" in output
    assert cat in output
    with pytest.raises(UserError, match=r"no near-duplicate in another split +1 of 19 fail +at most 0"):
        validate.run(picture_limits(stop_on="warning"), paths)
    assert not paths.accepted.exists()
    assert str(folder / "train/cat/03.png") in paths.data_page.read_text(encoding="utf-8")


def test_unrelated_pictures_are_no_near_duplicates() -> None:
    parts = [torch.stack([tensor(picture(seed)) for seed in range(start, start + 300)]) for start in (0, 300)]
    assert (near_duplicates.find_near_duplicates(parts) == -1).all()
    noise = [torch.stack([tensor(photo(seed)) for seed in range(start, start + 50)]) for start in (0, 50)]
    assert (near_duplicates.find_near_duplicates(noise) == -1).all()


def test_the_closest_hash_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    queries, references = (rng.integers(0, 2**63, count, dtype=np.uint64) for count in (100, 37))
    distances, positions = near_duplicates.closest(queries, references)
    for query, distance, position in zip(queries, distances, positions, strict=True):
        expected = [(int(query) ^ int(reference)).bit_count() for reference in references]
        assert (distance, position) == (min(expected), expected.index(min(expected)))


def test_splits_of_other_sizes_and_empty_ones_are_compared() -> None:
    image = tensor(picture(1))
    small = torch.nn.functional.adaptive_avg_pool2d(image.float(), 16).byte()
    empty = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert near_duplicates.find_near_duplicates([empty, image[None], small[None], empty]).tolist() == [-1, 0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="real CIFAR-10 images are not here (../shared/data)")
def test_real_cifar10_has_near_duplicates_across_its_splits() -> None:
    """C. H. Barz and J. Denzler, Do We Train on Test Data?, 2020, report 3 % of the test images."""

    def automobiles(archive: str, prefix: str) -> torch.Tensor:
        with ZipFile(SHARED / archive) as packed:
            names = sorted(name for name in packed.namelist() if name.startswith(f"{prefix}/automobile/"))
            return torch.stack([tensor(Image.open(io.BytesIO(packed.read(name))).convert("RGB")) for name in names])

    train, test = automobiles("cifar10-train-0.zip", "train"), automobiles("cifar10-test.zip", "test")
    rows = near_duplicates.find_near_duplicates([train, test])[len(train) :]
    assert 10 < (rows >= 0).sum() < 60
