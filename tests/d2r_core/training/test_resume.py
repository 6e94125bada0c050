"""A training cannot be lost: killed at any moment it continues and ends with bitwise the same weights."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from project import ROOT

from d2r_core import checkpoint, data, files
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted
from d2r_core.training.trainer import BestCheckpoint
from tasks import pretrain
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.tracking import runs

pytestmark = pytest.mark.slow

KILLS = 20


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Children of a server that has imported PyTorch start at once; each is a process of its own."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["toy", "torch._dynamo"])  # the latter is imported by the first optimizer
    with pytest.MonkeyPatch.context() as patch:
        # The server inherits this path but not sys.path, and says nothing of a module that it does not find.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield processes


def test_killed_at_random_moments_it_ends_bitwise_the_same(tmp_path: Path, processes: ForkServerContext) -> None:
    def start(name: str) -> ForkServerProcess:
        child = processes.Process(target=toy.train_to_file, args=(tmp_path / name, tmp_path / f"{name}.pt"))
        child.start()
        return child

    start("warm-up").join()
    begun = time.monotonic()
    start("whole").join()
    duration = time.monotonic() - begun
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    moments, kills, run, states = random.Random(0), 0, 0, 0
    while kills < KILLS:
        name, killed_here = f"killed{run}", 0
        while True:
            child = start(name)
            # A machine that has become slower must not keep the training from ever getting anywhere.
            child.join(moments.uniform(0.1, 0.8) * duration * 1.2**killed_here)
            if not child.is_alive():
                break
            child.kill()
            child.join()
            killed_here += 1
            states += (tmp_path / name / "latest.pt").exists()
        assert child.exitcode == 0
        assert same(torch.load(tmp_path / f"{name}.pt", weights_only=True), whole), f"after {killed_here} kills"
        kills, run = kills + killed_here, run + 1
    assert states > kills / 2, "a kill before the first state is survived by starting anew"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in_and_a_rerun_continues(tmp_path: Path, number: signal.Signals) -> None:
    whole, _ = toy.fit(toy.d2r())
    method = toy.d2r()
    attack, steps = method.perturb, iter(range(1, 100))

    def perturb(*arguments: Any) -> torch.Tensor:
        if next(steps) == 7:
            os.kill(os.getpid(), number)
        return attack(*arguments)

    method.perturb = perturb  # type: ignore[method-assign, assignment]
    with pytest.raises(
        Interrupted,
        match=rf"stopped by {number.name}; the state after epoch 2, step 3 of 4 is saved: run it again to continue",
    ):
        toy.fit(method, state_folder=tmp_path)
    continued, logged = toy.fit(toy.d2r(), state_folder=tmp_path)
    assert [row["epoch"] for row in logged] == [2, 3]
    assert same(continued.state, whole.state)


def test_max_minutes_stops_and_continues_step_by_step(tmp_path: Path) -> None:
    whole, _ = toy.fit(toy.d2r())
    for _ in range(3 * 4):  # one step at a time
        with pytest.raises(
            Interrupted, match=r"max_minutes \(0\) are over; the state after epoch \d, step \d of 4 is saved"
        ):
            toy.fit(toy.d2r(), state_folder=tmp_path, max_minutes=0.0)
    pieces, _ = toy.fit(toy.d2r(), state_folder=tmp_path, max_minutes=0.0)
    assert same(pieces.state, whole.state)
    assert (pieces.epoch, pieces.metrics) == (whole.epoch, whole.metrics)


def test_a_damaged_state_is_reported_and_the_one_before_it_used(tmp_path: Path) -> None:
    whole, _ = toy.fit(toy.d2r())
    toy.fit(toy.d2r(), state_folder=tmp_path, epochs=2)
    content = (tmp_path / "latest.pt").read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (tmp_path / "latest.pt").write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"latest\.pt is damaged and is not used"):
            state = checkpoint.load_state(tmp_path, warnings.warn)
        assert state is not None
    with pytest.warns(UserWarning, match="is damaged"):
        continued, logged = toy.fit(toy.d2r(), state_folder=tmp_path)
    assert [row["epoch"] for row in logged] == [2, 3]
    assert same(continued.state, whole.state)


def train_on_a_full_disk(state_folder: Path, size: int, message: Path) -> None:
    """The system refuses whatever makes a file larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        toy.fit(toy.d2r(), state_folder=state_folder)
    except UserError as error:
        message.write_text(str(error))


def test_a_full_disk_stops_with_the_last_state_intact(tmp_path: Path, processes: ForkServerContext) -> None:
    whole, _ = toy.fit(toy.d2r())
    state = tmp_path / "state"
    toy.fit(toy.d2r(), state_folder=state, epochs=2)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    half = len(before["latest.pt"]) // 2
    child = processes.Process(target=train_on_a_full_disk, args=(state, half, tmp_path / "message"))
    child.start()
    child.join()
    assert "latest.pt: the training state cannot be written (File too large)." in (tmp_path / "message").read_text()
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    continued, logged = toy.fit(toy.d2r(), state_folder=state)
    assert [row["epoch"] for row in logged] == [3]
    assert same(continued.state, whole.state)


def test_a_state_holds_no_code(tmp_path: Path) -> None:
    toy.fit(toy.d2r(), state_folder=tmp_path, epochs=1)
    state = checkpoint.load_state(tmp_path, print)
    assert state is not None
    assert isinstance(BestCheckpoint(**state["best"]), BestCheckpoint)


def test_a_state_of_other_settings_data_or_code_is_never_continued(
    tmp_path: Path, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(tmp_path)
    paths.prepared.mkdir(parents=True)
    for name in ("train", "validation"):
        data.save_split(paths.prepared / f"{name}.safetensors", toy.split(0))
    monkeypatch.setattr(runs, "training_run", lambda *_: runs.silent())

    def describe(content: str) -> None:
        paths.manifest.write_text(json.dumps({"hash": content, "classes": ["dark", "bright"], "image_size": 8}))

    def next_step(**changes: Any) -> int:
        """Train for one step more, in the state that belongs to these settings; returns its number."""
        settings = tiny_settings(**{"runtime": {"max_minutes": 1e-9}, **changes})
        with pytest.raises(Interrupted) as stopped:
            pretrain.run(settings, paths)
        return int(str(stopped.value).partition("step ")[2].split()[0])

    describe("data")
    assert [next_step(), next_step()] == [1, 2]
    assert next_step(pretrain={"learning_rate": 0.01}) == 1
    assert next_step(seed=1) == 1
    assert next_step(runtime={"max_minutes": 1e-9, "precision": "bf16"}) == 1
    describe("other data")
    assert next_step() == 1
    describe("data")
    code = tmp_path / "code"
    for room in ("d2r_core", "tasks"):
        shutil.copytree(files.CODE / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(files.CODE / "dvc.yaml", code)
    monkeypatch.setattr(files, "CODE", code)
    assert next_step() == 3, "the same code elsewhere is the same"
    (code / "d2r_core/evaluation/self_checks.py").write_text("# changed")
    assert next_step() == 4, "a training does not depend on the self-checks"
    (code / "d2r_core/training/losses.py").write_text("# changed")
    assert next_step() == 1
