"""The GPU list in miniature: stopped and killed it carries on, and its figures stand in the results."""

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
import gpu_luggage  # noqa: E402
import gpu_miniature  # noqa: E402
import gpu_recipe  # noqa: E402
import gpu_results  # noqa: E402

CPU = torch.device("cpu")

# The list on a machine that has nothing of ours but what it needs.
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


def test_stopped_and_killed_it_carries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, results = tmp_path / "state", tmp_path / "results.md"
    arguments = ["--miniature", "--state", str(state), "--results", str(results)]
    results.write_text("# Measured\n\nOther figures.\n")
    for key in ("programs", "cifar10-d2r-awp-ema", "cifar10-trades", "precision"):
        gpu_results.write(results, key, gpu_luggage.commit(), "Measured already.")
    before = results.read_text()

    def where(key: str = "cifar10-d2r") -> Path:
        (found,) = state.glob(f"**/{key}-????????????")
        return found

    child = bare(arguments)
    while not list(state.glob("cifar10-d2r-*/epochs.jsonl")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert not gpu_recipe.weights(where()).exists()

    writes, write_text = iter(range(100)), files.write_text

    def write_and_stop(path: Path, text: str) -> None:
        write_text(path, text)
        if path.name == "evaluation.json" and next(writes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", write_and_stop)
        patch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit) as exit_code:
            gpu.main()
    assert exit_code.value.code == 130
    assert json.loads((where() / "evaluation.json").read_text()).keys() == {"clean", "PGD-2"}
    assert "cifar10-d2r" not in gpu_results.finished(results)
    assert "fp32, eager" in results.read_text()

    child = bare(arguments)
    output = child.communicate(timeout=200)
    assert child.returncode == 0, output
    assert where().parent == state / "finished"
    assert [line["epoch"] for line in gpu_recipe.epochs(where())] == [1, 2, 3]
    assert set(gpu_results.finished(results).values()) == {gpu_luggage.commit()}
    text = results.read_text()
    assert text.startswith(before)
    assert "| AutoAttack quick |" in text
    assert "| PGD-2 |" in text
    assert "WideResNet-34-10" in text

    # Killed, stopped, on other processes: the weights are those of a training that nothing disturbed.
    data = gpu_miniature.data()
    gpu_recipe.train(gpu_miniature.recipe(gpu_recipe.Recipe()), data, tmp_path / "whole", CPU, None)
    whole, pieces = (load_file(gpu_recipe.weights(path)) for path in (tmp_path / "whole", where()))
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_what_was_begun_goes_first_then_what_was_never_measured_then_the_oldest(tmp_path: Path) -> None:
    def one(key: str) -> gpu.Measurement:
        return gpu.Measurement(key, key, tmp_path / key, lambda stop, minutes: None, lambda: "")

    listed = [one(key) for key in ("new", "old", "older", "never", "begun")]
    (tmp_path / "begun").mkdir()
    now = "c 2026-03-01T00:00:00+00:00"
    finished = {
        "new": now,
        "old": "b 2026-02-01T00:00:00+00:00",
        "older": "a 2026-01-01T00:00:00+00:00",
        "begun": now,
    }
    assert [one.key for one in gpu.due(listed, finished, now)] == ["begun", "never", "older", "old"]


def test_a_block_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    results.write_text("Before.\n<!-- gpu:a never -->\nNot yet.\n<!-- /gpu:a -->\nAfter.\n")
    assert gpu_results.finished(results) == {}
    gpu_results.write(results, "b", "2 today", r"\1 of b")
    gpu_results.write(results, "a", "1 today", "Of a.")
    assert results.read_text() == (
        "Before.\n<!-- gpu:a 1 today -->\nOf a.\n<!-- /gpu:a -->\nAfter.\n\n"
        "<!-- gpu:b 2 today -->\n\\1 of b\n<!-- /gpu:b -->\n"
    )
    assert gpu_results.finished(results) == {"a": "1 today", "b": "2 today"}


def test_a_failure_is_noted_and_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    def fail(stop: Any, minutes: float | None) -> None:
        raise UserError("the loss is not finite")

    results, reached = tmp_path / "results.md", tmp_path / "b"
    listed = [
        gpu.Measurement("a", "A", tmp_path / "a", fail, lambda: "So far."),
        gpu.Measurement("b", "B", reached, lambda stop, minutes: reached.mkdir(), lambda: "All."),
    ]
    with pytest.raises(UserError, match="A: the loss is not finite"):
        gpu.slice_of(listed, results, "machine", None)
    assert gpu_results.finished(results).keys() == {"b"}
    assert "So far.\n\n**Failed**: the loss is not finite\n" in results.read_text()


def test_the_results_have_a_place_for_each_measurement(tmp_path: Path) -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for one in gpu.measurements(tmp_path, gpu_miniature.data(), tmp_path, CPU, miniature=False):
        assert f"\n<!-- gpu:{one.key} " in text
        assert f"-->\n### {one.title}\n" in text


def test_the_luggage_holds_the_data_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_luggage, "LUGGAGE", tmp_path / "luggage")
    monkeypatch.setattr(gpu_luggage, "_FOLDER_BYTES", 3_000_000)
    stream = torch.Generator().manual_seed(0)
    splits: dict[str, Any] = {
        name: Split(
            torch.randint(0, 256, (count, 3, 32, 32), generator=stream, dtype=torch.uint8), torch.arange(count) % 10
        )
        for name, count in (("train", 1200), ("validation", 11), ("test", 30))
    }
    with pytest.raises(UserError, match=r"holds no prepared data, .* run `benchmarks/gpu\.sh --bring`"):
        gpu_luggage.prepared(tmp_path)
    for name, split in splits.items():
        save_split(tmp_path / f"prepared/{name}.safetensors", split)
    gpu_luggage.pack(tmp_path / "prepared")
    assert {path.name for path in (tmp_path / "luggage").iterdir()} == {"1", "2"}
    assert (tmp_path / "luggage/1/pyautoattack/square.py").exists()
    found = gpu_luggage.data(gpu_luggage.prepared(tmp_path))
    for name, split in splits.items():
        assert torch.equal(found[name].images, split.images)
        assert torch.equal(found[name].labels, split.labels)
    shutil.rmtree(tmp_path / "luggage/prepared")
    next((tmp_path / "luggage/2").glob("train-*")).unlink()
    with pytest.raises(UserError, match=r"of the 1200 train images\. Copy all of its folders"):
        gpu_luggage.prepared(tmp_path)
