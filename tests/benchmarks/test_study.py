"""The study in miniature: killed and stopped it continues to the same table."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from d2r_core import data
from tasks.config.settings import D2RMethod

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import study_cells  # noqa: E402
import study_table  # noqa: E402
import study_training  # noqa: E402

CELLS = ("at", "d2r")


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    only = [argument for cell in CELLS for argument in ("--only", cell)]
    command = [sys.executable, "benchmarks/study.py", "--miniature", "--folder", str(folder), *only, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(folder: Path, code: int, *arguments: str) -> str:
    child = start(folder, *arguments)
    output = child.communicate(timeout=300)
    assert child.returncode == code, output
    return output[0] + output[1]


def wait_for(child: "subprocess.Popen[str]", folder: Path, pattern: str) -> None:
    while not list(folder.glob(pattern)):
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)


def timeless(text: str) -> str:
    """A table without its times."""
    return re.sub(r"[\d.]+ min", "", text)


@pytest.mark.slow
def test_killed_and_stopped_it_continues_to_the_same_table(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    finish(whole, 0)
    for pattern in ("runs/*/state/*/latest.pt", "cells/at-seed0.json"):  # in a training of the search; after a cell
        child = start(pieces)
        wait_for(child, pieces, pattern)
        child.kill()
        child.communicate()
    assert "run it again to continue" in finish(pieces, 130, "--minutes", "0.0001")
    assert not (pieces / "cells/d2r-seed0.json").exists()
    assert "| AT | " in finish(pieces, 0)
    tables = []
    for folder in (whole, pieces):
        results = folder / "results.md"
        results.write_text("# Results\n\nOthers.\n")
        finish(folder, 0, "--write", "--results", str(results))
        finish(folder, 0, "--write", "--results", str(results))
        tables.append(timeless(results.read_text()))
        figures = json.loads((folder / "study.json").read_text())
        assert list(figures) == list(CELLS)
        assert figures["at"]["0"]["accuracies"]["autoattack"]["name"] == "APGD-CE + APGD-T (quick)"
    assert tables[0] == tables[1]
    assert tables[0].startswith("# Results\n\nOthers.\n\n<!-- study -->\n")
    assert tables[0].count("<!-- study -->") == 1
    assert "| D2R, random guidance (as published) | " in tables[0]
    assert "| 14 | " in tables[0], "gradients of 14 steps"
    assert "at      " in finish(whole, 0, "--list")


@pytest.mark.slow
def test_every_training_is_an_mlflow_run_with_its_test_accuracies(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    finish(tmp_path, 0, "--only", "standard")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    result = json.loads((tmp_path / "results.json").read_text())["standard"]["0"]
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.method.name"] == "standard"
    assert run.data.metrics["test/target/pgd"] == result["accuracies"]["pgd"]["accuracy"]
    experiments = {experiment.name for experiment in client.search_experiments()}
    assert {"study standard", "study at", "study d2r"} <= experiments


def test_without_the_archives_the_error_names_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/study.py", "--folder", str(tmp_path / "s"), "--data", str(tmp_path)]
    child = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 1
    assert f"error: {tmp_path}: has no cifar10-*.zip" in child.stderr


def test_every_cell_has_valid_settings_and_the_published_one_is_published() -> None:
    for key, cell in study_cells.CELLS.items():
        settings = study_cells.Study(Path("folder")).settings(key)
        assert cell.reference in study_cells.CELLS
        assert not cell.search or cell.search in study_cells.CELLS
        assert settings.prepare == study_cells.Study(Path("folder")).settings("d2r").prepare
        assert settings.evaluate == study_cells.Study(Path("folder")).settings("d2r").evaluate
    published = study_cells.Study(Path("folder")).settings("d2r-published-rate", **study_cells.PUBLISHED)
    assert published.pretrain.epochs == 0
    assert published.train.method == D2RMethod(
        name="d2r",
        clean_weight=20.0,
        adv_weight=30.0,
        attack="cag",
        guidance="joint",
        guidance_logit_weight=0.0,
        divergence_mean="elements",
    )
    assert (published.train.learning_rate, published.train.schedule) == (0.1, "step")


def test_close_cells_and_what_they_are_compared_with_get_all_seeds() -> None:
    accuracies = {"at": 0.30, "trades": 0.35, "d2r-pretrained": 0.20, "d2r-frozen": 0.215, "clean-0": 0.10}
    assert study_cells.similar(accuracies) == ["d2r-pretrained", "d2r-frozen"]


def test_the_recorded_gradients_are_those_of_the_terms() -> None:
    method = toy.d2r().train()
    split = toy.split(0, 16)
    x = data.to_float(split.images)
    rows = study_training.term_gradients(method, method(x, x, split.labels))
    assert rows.keys() == {"ce", "logit", "clean", "adv"}
    cross_entropy = nn.functional.cross_entropy(method.guidance(x), split.labels)
    gradients = torch.autograd.grad(cross_entropy, list(method.guidance.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert rows["ce"]["guidance"] == pytest.approx(float(expected), rel=1e-4)
    assert rows["ce"]["model"] == 0.0
    assert rows["adv"]["model"] > 0.0


def test_a_failed_training_and_several_seeds_have_their_rows() -> None:
    choice = {"learning_rate": 0.1, "schedule": "step", "weight_decay": 2e-4}

    def run(accuracy: float) -> dict[str, Any]:
        figure = {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}
        return {
            "choice": choice,
            "accuracies": dict.fromkeys(("clean", "pgd", "cw", "autoattack"), figure),
            "train_seconds": 120.0,
            "collapsed": False,
        }

    failed = {"choice": choice, "failed": "epoch 1, step 13 of 94: the loss or its gradient is not finite. More."}
    text = study_table.table({"at": {"0": run(0.5)}, "trades": {"0": run(0.3), "1": run(0.5)}, "d2r": {"0": failed}})
    assert "| AT | 50.0% (40.0% to 60.0%) | " in text
    assert "| TRADES, beta 6 | 40.0% [30.0% to 50.0%, 2 seeds] | " in text
    assert "| 2.0 min | rate 0.1, step, decay 0.0002 |" in text
    assert "| **epoch 1, step 13 of 94: not finite** | " in text


def test_the_results_have_a_place_for_the_study() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- study -->\n.*?^<!-- /study -->\n", text, re.DOTALL | re.MULTILINE)) == 1
