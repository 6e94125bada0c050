"""`d2r predict`: real image files, classified as a served model classifies them."""

import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import photos
import pyarrow.parquet
import pytest
import torch
import yaml
from mlflow_server import model_server
from PIL import Image
from registry_project import CLASSES, NAME, Project, logged_model_folder, logits, make_project
from typer.testing import CliRunner, Result

from d2r_core import checkpoint
from flows.cli import app
from tasks.config.settings import Settings
from tasks.data import archive
from tasks.registry import batch_prediction
from tasks.registry.client_model import ClientModel, Preparation
from tasks.registry.servable import ServedModel

pytestmark = pytest.mark.slow
PROBABILITIES = [f"probability_{name}" for name in CLASSES]
OUT = Path("reports/predictions/photos.parquet")


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    use(project)
    return project


def use(project: Project, **prepare: Any) -> None:
    """Settings with these values of `prepare`, in params.yaml too."""
    settings = project.with_settings(prepare=prepare)
    values = settings.model_dump(mode="json", by_alias=True)
    project.paths.params.write_text(yaml.safe_dump(values))


def predict(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["predict", *arguments])


def save_photos(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Images of several formats and modes, in folders; their pixels as `prepare` makes them, (3, 16, 16)."""
    colour, grey, turned = photos.photo(1), photos.photo(2, "L"), photos.photo(3)
    (folder / "deep/er").mkdir(parents=True)
    colour.save(folder / "colour.PNG")
    grey.save(folder / "deep/grey.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(folder / "deep/er/turned.webp", lossless=True, exif=exif)
    return {
        "colour.PNG": pixels(colour),
        "deep/er/turned.webp": pixels(turned.transpose(Image.Transpose.ROTATE_270)),
        "deep/grey.bmp": pixels(grey.convert("RGB")),
    }


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def expected_logits(project: Project, images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    model, _ = checkpoint.load(project.paths.target, torch.device("cpu"))
    return logits(model, np.stack(images).astype(np.float32) / np.float32(255))


def test_a_folder_is_classified_as_by_the_served_champion(project: Project, tmp_path: Path) -> None:
    prepared = save_photos(tmp_path / "photos")
    version = project.register(0)
    project.promote(version)
    project.register(1)  # the challenger, which is not asked
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")

    result = predict("photos")

    assert result.exit_code == 0, result.exception
    assert result.output == f"3 images were classified by {NAME} version 1: {OUT}\n"
    table = pd.read_parquet(OUT)
    assert list(table) == ["file", "label", "probability", *PROBABILITIES, "version", "weights_sha256"]
    assert list(table["file"]) == list(prepared)
    answers = served.predict(np.stack(list(prepared.values())))
    assert list(table["label"]) == list(answers["label"])
    np.testing.assert_array_equal(table[PROBABILITIES], np.array(answers["probabilities"].tolist()))
    np.testing.assert_array_equal(table["probability"], table[PROBABILITIES].max(axis=1))
    assert set(table["version"]) == {version}
    assert set(table["weights_sha256"]) == {project.version(version).tags["weights_sha256"]}
    with model_server(f"models:/{NAME}@champion") as client:
        inputs = [image.tolist() for image in prepared.values()]
        rows = client.post("/invocations", json={"inputs": inputs}).json()["predictions"]
    assert [row["label"] for row in rows] == list(table["label"])
    np.testing.assert_allclose(table[PROBABILITIES], [row["probabilities"] for row in rows], rtol=0, atol=1e-6)
    first = OUT.read_bytes()
    assert predict("photos").exit_code == 0
    assert OUT.read_bytes() == first


@pytest.mark.parametrize("reference", ["2", "challenger", "@challenger"])
def test_another_version_is_named_by_number_or_alias(project: Project, tmp_path: Path, reference: str) -> None:
    prepared = save_photos(tmp_path / "photos")
    project.promote(project.register(0))
    project.register(1)

    result = predict("photos", "--version", reference, "--out", "elsewhere/answers.parquet")

    assert result.exit_code == 0, result.exception
    table = pd.read_parquet("elsewhere/answers.parquet")
    assert set(table["version"]) == {2}
    expected = torch.from_numpy(expected_logits(project, list(prepared.values()))).double().softmax(1)
    np.testing.assert_allclose(table[PROBABILITIES], expected, atol=1e-6)
    assert list(table["label"]) == [CLASSES[index] for index in expected.argmax(1).tolist()]


def test_images_are_prepared_as_those_of_the_version_were(project: Project, tmp_path: Path) -> None:
    wide = photos.photo(4, size=(32, 16))
    (tmp_path / "photos").mkdir()
    wide.save(tmp_path / "photos/wide.png")
    photos.photo(5).save(tmp_path / "photos/square.png")
    use(project, fit="crop")
    project.promote(project.register(0))
    use(project, fit="pad")  # of the next training

    assert predict("photos").exit_code == 0
    table = pd.read_parquet(OUT).set_index("file")
    cropped = pixels(wide.crop((8, 0, 24, 16)))
    expected = torch.from_numpy(expected_logits(project, [cropped])).double().softmax(1)
    np.testing.assert_allclose(table.loc[["wide.png"], PROBABILITIES], expected, atol=1e-6)

    use(project, on_mismatch="refuse")
    project.promote(project.register(1))
    result = predict("photos")
    assert (
        "not classified: wide.png (RGB, 32 x 16, not RGB of 16 x 16 pixels, and prepare.on_mismatch is refuse)"
        in result.output
    )
    assert list(pd.read_parquet(OUT)["file"]) == ["square.png"]


def test_an_unusable_image_is_one_line_and_loses_no_other(project: Project, tmp_path: Path) -> None:
    prepared = save_photos(tmp_path / "photos")
    (tmp_path / "photos/notes.txt").write_text("no image")
    content = io.BytesIO()
    photos.photo(6).save(content, "PNG")
    (tmp_path / "photos/deep/cut.png").write_bytes(content.getvalue()[:200])
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "photos/sixteen.png")
    (tmp_path / "photos/.hidden").write_text("")
    photos.photo(7).save(os.fsdecode(bytes(tmp_path / "photos") + b"/caf\xe9.png"))
    project.promote(project.register(0))

    result = predict("photos")

    assert result.exit_code == 0, result.exception
    refused = [line for line in result.output.splitlines() if line.startswith("not classified: ")]
    assert [line.split(" (")[0].removeprefix("not classified: ") for line in refused] == [
        *("deep/cut.png", "notes.txt", "sixteen.png")
    ]
    assert refused[1] == "not classified: notes.txt (not an image)"
    assert result.output.splitlines()[-1].startswith(f"4 images were classified by {NAME} version 1, 3 could not be: ")
    assert list(pd.read_parquet(OUT)["file"]) == sorted([*prepared, "caf\\udce9.png"])


def test_what_cannot_be_done_is_one_message_and_leaves_the_earlier_file(project: Project, tmp_path: Path) -> None:
    def message(*arguments: str) -> str:
        result = predict(*arguments)
        assert result.exit_code == 1
        return str(result.exception)

    save_photos(tmp_path / "photos")
    assert message("photos") == "digits has no version @champion. `d2r models` lists them."
    project.promote(project.register(0))
    assert predict("photos").exit_code == 0
    before = OUT.read_bytes()

    assert message("nothing") == "nothing: there is no such folder. Give a folder of images."
    (tmp_path / "texts").mkdir()
    assert message("texts", "--out", str(OUT)) == "texts: has no image that can be classified (it is empty)."
    (tmp_path / "texts/a.txt").write_text("a")
    assert "(a.txt: not an image)" in message("texts", "--out", str(OUT))
    assert message("photos", "--out", "photos") == "photos: is a folder. Name a file: --out NAME.parquet."
    (tmp_path / "texts/b.png").symlink_to(tmp_path / "photos/colour.PNG")
    assert "texts/b.png: is a link, which is not followed." in message("texts")
    weights = logged_model_folder(project.version(1)) / "data/model/target.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "its files were changed after the registration" in message("photos")
    assert OUT.read_bytes() == before
    assert [path.name for path in OUT.parent.iterdir()] == [OUT.name]


def test_a_checkpoint_without_a_registry(project: Project, tmp_path: Path) -> None:
    prepared = save_photos(tmp_path / "photos")
    project.train(3)

    result = predict("photos", "--checkpoint", "models/target.safetensors")

    assert result.exit_code == 0, result.exception
    table = pd.read_parquet(OUT)
    expected = torch.from_numpy(expected_logits(project, list(prepared.values()))).double().softmax(1)
    np.testing.assert_allclose(table[PROBABILITIES], expected, atol=1e-6)
    assert table["version"].isna().all()


def test_many_batches_are_in_order_and_in_groups_of_rows(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_prediction, "_BATCH", 8)
    monkeypatch.setattr(batch_prediction, "_ROW_GROUP", 32)
    (tmp_path / "photos").mkdir()
    images = [photos.photo(seed) for seed in range(100)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"photos/{number:03}.png")
    project.promote(project.register(0))

    assert predict("photos").exit_code == 0

    table = pd.read_parquet(OUT)
    assert list(table["file"]) == [f"{number:03}.png" for number in range(100)]
    expected = torch.from_numpy(expected_logits(project, [pixels(image) for image in images])).double().softmax(1)
    np.testing.assert_allclose(table[PROBABILITIES], expected, atol=1e-6)
    assert pd.read_parquet(OUT, filters=[("file", "==", "050.png")]).shape[0] == 1
    assert [pyarrow.parquet.ParquetFile(OUT).metadata.row_group(i).num_rows for i in range(4)] == [32, 32, 32, 4]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As large as the buffer that a file is read into, which would hide the rest.
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 2**16)
    size, kib = 64, 3 * 64 * 64 / 1024  # of a decoded image
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, 2))
    prepare = Preparation.of("image_folder", "stretch", "convert")
    model = ClientModel(ServedModel(network, ["a", "b"], size), ["a", "b"], size, prepare, None, "0")
    peaks = []  # KiB; 1500 images are more than the threads decode in advance
    for count in (1500, 3500):
        folder = tmp_path / str(count)
        folder.mkdir()
        content = io.BytesIO()
        photos.photo(0, size=(size, size)).save(content, "PNG")
        for number in range(count):
            (folder / f"{number}.png").write_bytes(content.getvalue())
        tracemalloc.start()
        try:
            result = batch_prediction.predict_folder(model, folder, tmp_path / "out.parquet")
            peaks.append(tracemalloc.get_traced_memory()[1] / 1024)
        finally:
            tracemalloc.stop()
        assert result == (count, [])
    # The paths of 2000 more files are far below 1 KiB each; their pixels would be 24 MiB.
    assert peaks[1] - peaks[0] < 2000 * 2 < 2000 * kib
