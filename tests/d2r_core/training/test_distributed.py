"""Two real processes under torchrun, gloo on the CPU."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2r_core import checkpoint, models
from tasks import prepare
from tasks.config.paths import Paths
from tasks.config.settings import Settings

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes in `folder`."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", *arguments),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def work(folder: Path, *jobs: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Jobs of distributed_worker.py, one after the other in the same processes."""
    return torchrun(folder, f"--max-restarts={restarts}", str(HERE / "distributed_worker.py"), str(folder), *jobs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of the jobs in which no process is killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = work(folder, "gradients", "diverge", "train")
    assert process.returncode == 0, process.stderr
    return folder


def results(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_are_the_mean_of_the_shards(undisturbed: Path) -> None:
    (alone0, together0), (alone1, together1) = results(undisturbed, "gradients")
    assert any((first - second).abs().max() > 1e-3 for first, second in zip(alone0, alone1, strict=True))
    for first, second, mean0, mean1 in zip(alone0, alone1, together0, together1, strict=True):
        assert torch.equal(mean0, mean1)
        torch.testing.assert_close(mean0, (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_ranks_stay_alike_and_a_job_with_a_killed_one_resumes(undisturbed: Path, tmp_path: Path) -> None:
    (weights0, best, logged), (weights1, best1, logged1) = results(undisturbed, "trained")
    assert [row["epoch"] for row in logged] == [1, 2, 3]
    assert logged1 == [], "rank 0 alone logs"
    for name, tensor in weights0.items():
        if "running" not in name:  # BatchNorm's statistics are each rank's own between two validations
            assert torch.equal(tensor, weights1[name]), name
    assert all(torch.equal(best[name], best1[name]) for name in best)

    killed = work(tmp_path / "killed", "dies")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    restarted = work(tmp_path / "restarted", "dies", restarts=1)
    assert restarted.returncode == 0, restarted.stderr
    assert "SIGKILL" in restarted.stderr or "exitcode: -9" in restarted.stderr
    (again0, resumed, logged), (again1, _, _) = results(tmp_path / "restarted", "trained")
    assert [row["epoch"] for row in logged] == [2, 3], "the epochs after the one whose state was saved"
    assert all(torch.equal(best[name], resumed[name]) for name in best)
    for weights, again in ((weights0, again0), (weights1, again1)):
        assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_ranks_before_the_step(undisturbed: Path) -> None:
    for message, steps, before, after in results(undisturbed, "diverged"):
        assert message.startswith("epoch 2, step 2 of 4: the loss or its gradient is not finite.")
        assert steps == 6, "raised at the same step, not later"
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_stage_under_torchrun_writes_what_one_process_would(
    tmp_path: Path, tiny_values: dict[str, Any], tiny_settings: Callable[..., Settings]
) -> None:
    paths, settings = Paths(tmp_path), tiny_settings()
    paths.params.write_text(yaml.safe_dump(tiny_values), encoding="utf-8")
    manifest = prepare.run(settings, paths)
    shape = {"num_classes": len(manifest["classes"]), "image_size": manifest["image_size"]}
    architecture = {**settings.pretrain.architecture.model_dump(), **shape}
    checkpoint.save(paths.guidance, models.build(**architecture), {"architecture": architecture})
    process = torchrun(tmp_path, "-m", "tasks.train")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("train: best epoch 1 of 1") == 1
    assert sorted(path.name for path in paths.target.parent.iterdir()) == [
        *("guidance.json", "guidance.safetensors", "target.json", "target.safetensors"),
    ]
    assert len(paths.train_history.read_text(encoding="utf-8").splitlines()) == 2  # head and epoch
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select name, status from runs").fetchall()
    # The run of the pass, and the training's below it, made by one of the processes.
    assert [(re.sub(r" \d{4}-\d\d-\d\d ", " DAY ", name), status) for name, status in runs] == [
        ("chain DAY digits d2r", "FINISHED"),
        ("train DAY digits d2r", "FINISHED"),
    ]
