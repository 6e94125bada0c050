"""How far an evaluation is, as its log and its terminal say it: images through, images still robust, time left."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import digits
import pytest
import torch
from project import ROOT, settings_from
from torch import Tensor, nn

from d2r_core.attacks import PGD
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import Noise
from d2r_core.attacks.run import run_attack
from tasks.evaluation import autoattack, progress
from tasks.evaluation.evaluate_model import ModelFigures, evaluate_model
from tasks.evaluation.progress import Progress, Step

IMAGES, BATCH = 60, 25
LINE = re.compile(r"target: (.+), (\d+) of (\d+) images(?:, (\d+) still robust)?(?:, about (.+) left)?")


def evaluate(values: dict[str, object]) -> ModelFigures:
    changes = {"batch_size": BATCH, "eps": digits.EPS, "step_size": 0.05, "steps": 3, "autoattack_images": 40}
    settings = settings_from(values, evaluate=changes).evaluate
    return evaluate_model(digits.model(), digits.unseen(IMAGES), settings, classes=10, seed=0, description="target")


def lines(output: str) -> list[tuple[str, int, int, int]]:
    """Attack, images through, images, and how many of those through are robust."""
    matches = [LINE.fullmatch(line) for line in output.splitlines()]
    assert all(matches), output
    return [(m[1], int(m[2]), int(m[3]), int(m[4] or 0)) for m in matches if m]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_STEPS": 5, "_QUERIES": 20, "_TARGETS": 2}.items():
        monkeypatch.setattr(autoattack, name, value)


@pytest.mark.slow
def test_every_attack_says_how_many_images_are_through_and_robust(
    tiny_values: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = evaluate(tiny_values).figures
    seen = lines(capsys.readouterr().out)
    standard = {
        figures[key]["name"]: (IMAGES, IMAGES, figures[key]["correct"]) for key in ("clean", "fgsm", "pgd", "cw")
    }
    assert {name: tuple(counts) for name, *counts in seen[:4]} == standard
    images = [count for _, count, _, _ in seen[4:]]
    robust = [count for _, _, _, count in seen[4:]]
    assert [name for name, *_ in seen[4:]] == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert images[1:] == robust[:-1], "each attack takes what is robust to the one before"
    assert robust == [round(stage["accuracy"] * 40) for stage in figures["autoattack"]["stages"]]


@pytest.mark.slow
def test_a_long_attack_says_so_again_and_again(
    tiny_values: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    evaluate(tiny_values)
    output = capsys.readouterr().out
    for name in ("PGD-3", "APGD-CE", "Square"):
        through = [finished for attack, finished, *_ in lines(output) if attack == name]
        assert through == sorted(through)
        assert len(through) > len(set(through)) > 1, "within batches, and after each"


class Slow(nn.Module):
    """Takes a hundredth of a second for each image."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(len(images) / 100)
        return images.flatten(1)[:, :10] + torch.zeros(10).index_fill_(0, torch.tensor([0]), 9.0)


def test_the_time_left_is_that_of_the_passes_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    model = Slow()
    plan = [Step("first", 100, 1), Step("second", 100, 4)]
    with Progress("target", model, plan, show=True) as shown:
        shown.begin("first", 100, 100)
        model(torch.zeros(50, 3, 2, 2))
        shown.advance(50, 50)
        left = shown.line()
        model(torch.zeros(50, 3, 2, 2))
        shown.advance(50, 25)
    assert re.fullmatch(r"target: first, 50 of 100 images, 50 still robust, about [45] s left", left)
    assert re.fullmatch(
        r"target: first, 100 of 100 images, 75 still robust, about [34] s left\n", capsys.readouterr().out
    )


class StopsAtThird:
    """PGD that is interrupted in its third batch."""

    name, passes = "PGD-3", 6

    def __init__(self) -> None:
        self.batches = 0
        self.attack = PGD(eps=digits.EPS, step_size=0.05, steps=3)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return self.attack(model, x, y, noise)


def test_a_resumed_attack_counts_what_is_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    config = EvaluationConfig(batch_size=BATCH, seed=0, device=torch.device("cpu"), cache_folder=tmp_path)
    model, split, attack = digits.model(), digits.unseen(100), StopsAtThird()
    plan = [Step(attack.name, 100, attack.passes)]
    for stops in (True, False):
        with Progress("target", model, plan, show=True) as shown:
            shown.begin(attack.name, 100, 100)
            if stops:
                with pytest.raises(KeyboardInterrupt):
                    run_attack(model, split, attack, config, progress=shown)
                capsys.readouterr()
            else:
                result = run_attack(model, split, attack, config, progress=shown)
    seen = lines(capsys.readouterr().out)
    robust = int(result.correct(split.labels).sum())
    assert seen[-1] == ("PGD-3", 100, 100, robust)
    assert next(finished for _, finished, *_ in seen if finished) == BATCH, (
        "cached batches are counted as they are read"
    )


@pytest.mark.slow
def test_a_terminal_shows_the_same() -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import digits, project\n"
        "from tasks.evaluation.evaluate_model import evaluate_model\n"
        "changes = {'batch_size': 25, 'eps': 0.15, 'step_size': 0.01, 'steps': 60, 'autoattack_images': 0}\n"
        "settings = project.settings_from(project.params(), evaluate=changes).evaluate\n"
        "evaluate_model(digits.model(), digits.unseen(300), settings, classes=10, seed=0, description='target')\n"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, text=True
    ) as process:
        os.close(slave)
        screen = ""
        with suppress(OSError):  # the terminal has no writer left
            while chunk := os.read(master, 65536):
                screen += chunk.decode()
        output, _ = process.communicate()
    os.close(master)
    assert (process.returncode, output) == (0, "")
    bars = [line.split("%")[0] for line in screen.split("\r") if "images" in line]
    assert any(re.search(r"target: PGD-60, \d+ of 300 images, \d+ still robust", bar) for bar in bars), bars
    assert re.search(r"target: CW-60, 300 of 300 images, \d+ still robust", bars[-1])
