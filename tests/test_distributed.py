"""Two real processes under torchrun, gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def torchrun(job: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", *options, str(HERE / "distributed_worker.py"), job, str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def results(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_are_the_mean_of_the_shards(tmp_path: Path) -> None:
    done = torchrun("gradients", tmp_path)
    assert done.returncode == 0, done.stderr
    (alone0, together0), (alone1, together1) = results(tmp_path, "gradients")
    assert any((first - second).abs().max() > 1e-3 for first, second in zip(alone0, alone1, strict=True))
    for first, second, mean0, mean1 in zip(alone0, alone1, together0, together1, strict=True):
        assert torch.equal(mean0, mean1)
        torch.testing.assert_close(mean0, (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_ranks_stay_alike_and_a_job_with_a_killed_one_resumes(tmp_path: Path) -> None:
    whole = torchrun("train", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    (weights0, kept, logged), (weights1, kept1, logged1) = results(tmp_path / "whole", "trained")
    assert [row["epoch"] for row in logged] == [1, 2, 3]
    assert logged1 == [], "rank 0 alone logs"
    for name, tensor in weights0.items():
        if "running" not in name:  # BatchNorm's statistics are each rank's own between two validations
            assert torch.equal(tensor, weights1[name]), name
    assert all(torch.equal(kept[name], kept1[name]) for name in kept)

    killed = torchrun("dies", tmp_path / "killed", "--max-restarts=0")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    again = torchrun("train", tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    restarted = torchrun("dies", tmp_path / "restarted", "--max-restarts=1")
    assert restarted.returncode == 0, restarted.stderr
    assert "SIGKILL" in restarted.stderr or "exitcode: -9" in restarted.stderr
    for folder in ("killed", "restarted"):
        (_, resumed, logged), _ = results(tmp_path / folder, "trained")
        assert [row["epoch"] for row in logged] == [2, 3], "the epochs after the one whose state was found"
        assert all(torch.equal(kept[name], resumed[name]) for name in kept)
