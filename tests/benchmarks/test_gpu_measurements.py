"""The GPU measurements in miniature: killed and stopped they continue, and their figures are in the results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2r_core import files
from d2r_core.data import Split, save_split
from d2r_core.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_bundle  # noqa: E402
import gpu_training  # noqa: E402

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")

# The script on a machine that has nothing but what it needs.
BARE = """
import runpy, sys

# None makes an import fail as if nothing were there.
sys.modules.update(dict.fromkeys(["pydantic", "yaml", "pandas", "mlflow", "dvc", "prefect", "sklearn", "tqdm"]))
sys.path.insert(0, "benchmarks")
sys.argv[0] = "benchmarks/gpu.py"
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def bare(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BARE, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_stopped_it_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, results = tmp_path / "state", tmp_path / "results.md"
    arguments = ["--miniature", "--state", str(state), "--results", str(results)]
    results.write_text("# Measured\n\nOther figures.\n")
    for key in ("cifar10-d2r-clip", "cifar10-d2r-awp-ema", "cifar10-trades"):
        gpu.write_block(results, key, gpu_bundle.commit(), "Measured already.")
    before = results.read_text()

    def folder() -> Path:
        (one,) = state.glob("cifar10-d2r-????????????")
        return one

    child = bare(arguments)
    while not list(state.glob("cifar10-d2r-*/epochs.jsonl")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert not (folder() / "target.safetensors").exists()

    write_text, writes = files.write_text, iter(range(100))

    def write_and_stop(path: Path, text: str) -> None:
        write_text(path, text)
        if path.name == "robust.json" and next(writes) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", write_and_stop)
        patch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit) as exit_code:
            gpu.main()
    assert exit_code.value.code == 130
    assert json.loads((folder() / "robust.json").read_text()).keys() == {"clean", "PGD-2"}
    assert "cifar10-d2r" not in gpu.stamps(results)
    assert "Unfinished." in results.read_text()

    child = bare(arguments)
    output = child.communicate(timeout=200)
    assert child.returncode == 0, output
    assert [line["epoch"] for line in gpu_training.read_epochs(folder())] == [1, 2, 3]
    assert set(gpu.stamps(results).values()) == {gpu_bundle.commit()}
    text = results.read_text()
    assert text.startswith(before)
    assert "| APGD-T | " in text
    assert "WideResNet-34-10" in text

    recipe = gpu.recipes(CPU)["cifar10-d2r"]
    gpu_training.train(recipe, gpu_bundle.miniature(), tmp_path / "undisturbed", CPU, None)
    whole, pieces = (load_file(path / "target.safetensors") for path in (tmp_path / "undisturbed", folder()))
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_what_was_begun_goes_first_then_what_was_never_measured_then_the_oldest(tmp_path: Path) -> None:
    folders = {key: tmp_path / key for key in ("new", "old", "older", "never", "begun")}
    folders["begun"].mkdir()
    now = "c 2026-03-01T00:00:00+00:00"
    measured = {"new": now, "old": "b 2026-02-01T00:00:00+00:00", "older": "a 2026-01-01T00:00:00+00:00"}
    assert gpu.due(folders, measured, now) == ["begun", "never", "older", "old"]


def test_a_block_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    results.write_text("Before.\n<!-- gpu:a never -->\nNot yet.\n<!-- /gpu:a -->\nAfter.\n")
    assert gpu.stamps(results) == {}
    gpu.write_block(results, "b", "2 today", r"\1 of b")
    gpu.write_block(results, "a", "1 today", "Of a.")
    assert results.read_text() == (
        "Before.\n<!-- gpu:a 1 today -->\nOf a.\n<!-- /gpu:a -->\nAfter.\n\n"
        "<!-- gpu:b 2 today -->\n\\1 of b\n<!-- /gpu:b -->\n"
    )
    assert gpu.stamps(results) == {"a": "1 today", "b": "2 today"}


def test_a_failure_is_noted_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(key: str, *arguments: Any) -> None:
        if key == "cifar10-d2r":
            raise UserError("the loss is not finite")

    results = tmp_path / "results.md"
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "figures", lambda key, *arguments: f"Figures of {key}.")
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--miniature", "--state", str(tmp_path / "state"), "--results", str(results)]
    )
    with pytest.raises(SystemExit, match="D2R as published: the loss is not finite"):
        gpu.main()
    assert gpu.stamps(results).keys() == gpu.TRAININGS.keys()
    assert "Figures of cifar10-d2r.\n\n**Failed**: the loss is not finite\n" in results.read_text()


def test_the_results_have_a_place_for_each_measurement() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for key, title in gpu.TITLES.items():
        assert f"\n<!-- gpu:{key} " in text
        assert f"-->\n### {title}\n" in text


def test_the_bundle_holds_the_data_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, prepared = tmp_path / "bundle", tmp_path / "prepared"
    monkeypatch.setattr(gpu_bundle, "FOLDER", bundle)
    monkeypatch.setattr(gpu_bundle, "_FOLDER_BYTES", 3_000_000)
    stream = torch.Generator().manual_seed(0)
    splits = {
        name: Split(
            torch.randint(0, 256, (count, 3, 32, 32), generator=stream, dtype=torch.uint8), torch.arange(count) % 10
        )
        for name, count in (("train", 1200), ("validation", 11), ("test", 10000))
    }
    with pytest.raises(UserError, match=r"holds no prepared data, .* run `python benchmarks/gpu\.py --pack`"):
        gpu_bundle.prepared_folder(prepared)
    for name, split in splits.items():
        save_split(prepared / f"{name}.safetensors", split)
    gpu_bundle.pack(prepared)
    assert len(list(bundle.iterdir())) > 2
    assert (bundle / "1/pyautoattack/square.py").exists()
    shutil.rmtree(prepared)
    unpacked = gpu_bundle.cifar10(gpu_bundle.prepared_folder(prepared))
    for name, split in splits.items():
        assert torch.equal(unpacked[name].images, split.images)
        assert torch.equal(unpacked[name].labels, split.labels)
    shutil.rmtree(bundle / "prepared")
    next(bundle.glob("*/train-*")).unlink()
    with pytest.raises(UserError, match=r"of the 1200 train images\. Copy all of its folders"):
        gpu_bundle.prepared_folder(prepared)
