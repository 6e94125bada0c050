"""The evaluation: attacks that look at every iterate, figures independent of how it is run, and its continuation."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits
import pandas as pd
import pytest
import torch
from digits import FunctionAttack
from torch import Tensor, nn

from d2r_core import checkpoint
from d2r_core.attacks import PGD, Clean, cw, fgsm, norms, pgd
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import LossName, Noise
from d2r_core.attacks.run import Attack, AttackCost, AttackResult, run_attack
from d2r_core.data import to_float
from d2r_core.interruption import Interrupted
from tasks import evaluate, prepare
from tasks.config.paths import Paths
from tasks.config.settings import Settings

BALLS: list[tuple[Norm, float]] = [("Linf", digits.EPS), ("L2", 0.9)]
ARCHITECTURE = {"name": "wide_resnet", "num_classes": 10, "image_size": 8, "depth": 10, "widen_factor": 1}


def config(**changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {"batch_size": 60, "seed": 0, "device": torch.device("cpu")}
    return EvaluationConfig(**values | changes)


def run(attack: Attack, count: int = 60, **changes: Any) -> tuple[AttackResult, Tensor]:
    """The result and what is correct, on images that the model has not seen."""
    split = digits.unseen(count)
    result = run_attack(digits.model(), split, attack, config(**changes))
    return result, result.correct(split.labels)


@pytest.mark.parametrize(("norm", "eps"), BALLS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_counts_every_iterate_that_misleads_and_stays_in_the_ball(norm: Norm, eps: float, loss: LossName) -> None:
    _, clean = run(Clean())
    attack = PGD(eps=eps, step_size=eps / 4, steps=10, norm=norm, loss=loss)
    adversarial: list[Tensor] = []

    def recorded(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        adversarial.append(attack(model, x, y, noise))
        assert adversarial[0].min() >= 0
        assert adversarial[0].max() <= 1
        return adversarial[0]

    result, robust = run(FunctionAttack(recorded), norm=norm)
    x = to_float(digits.unseen(60).images)
    assert torch.equal(result.distances, norms.norm(adversarial[0].double() - x.double(), norm))
    assert result.distances.max() <= eps + 1e-6
    assert torch.all(result.distances[~clean] == 0), "what is wrong anyway is not attacked"
    assert result.distances[robust].min() > eps / 2
    assert robust.sum() < clean.sum()

    _, once = run(attack, norm=norm)
    _, thrice = run(replace(attack, restarts=3), norm=norm)
    assert torch.equal(once, robust)
    assert not torch.any(thrice & ~once), "a restart takes nothing back"


def test_every_iterate_is_never_weaker_than_the_last_one() -> None:
    def published(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return pgd(model, x, y, eps=0.15, step_size=0.06, steps=10, noise=noise(0))

    attack = PGD(eps=0.15, step_size=0.06, steps=10)
    _, last = run(FunctionAttack(published), count=200, batch_size=200)
    _, every = run(attack, count=200, batch_size=200)
    assert not torch.any(every & ~last)
    _, same_last = run(replace(attack, any_iterate=False), count=200, batch_size=200)
    assert (same_last != last).sum() <= 1, "the published attack, but for rounding"


def test_fgsm_is_one_step_from_the_clean_image() -> None:
    model, split = digits.model(), digits.unseen(60)
    x, y = to_float(split.images), split.labels
    result, robust = run(fgsm(0.15))
    one_step = pgd(model, x, y, eps=0.15, step_size=0.15, steps=1, noise=torch.zeros_like(x))
    assert torch.equal(robust, (model(one_step).argmax(1) == y) & (model(x).argmax(1) == y))
    assert result.distances.max() <= 0.15 + 1e-6


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (Clean(), "clean"),
        (fgsm(0.001), "FGSM"),
        (PGD(eps=0.001, step_size=0.001, steps=20), "PGD-20"),
        (PGD(eps=0.001, step_size=0.001, steps=3, restarts=2), "PGD-3"),
        (PGD(eps=0.001, step_size=0.001, steps=3, any_iterate=False), "PGD-3"),
        (cw(eps=0.001, step_size=0.001, steps=5), "CW-5"),
    ],
)
def test_an_attack_knows_its_name_and_what_a_robust_image_costs(attack: Attack, name: str) -> None:
    model, split = digits.model(), digits.unseen(60)
    correct = run_attack(model, split, Clean(), config()).correct(split.labels)
    passes: list[int] = []
    model.register_forward_hook(
        lambda model, inputs, logits: passes.append(len(logits) * (2 if inputs[0].requires_grad else 1))
    )
    result = run_attack(model, split.take(correct.nonzero().squeeze(1)), attack, config())
    assert (result.margins > 0).all(), "so small a radius leaves all robust"
    assert sum(passes) == attack.passes * len(result.margins)
    assert attack.name == name


@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_no_image_depends_on_its_company(norm: Norm, eps: float) -> None:
    attack = PGD(eps=eps, step_size=eps / 4, steps=5, norm=norm, restarts=2)
    whole, _ = run(attack, norm=norm)
    for size in (1, 7):
        same(run(attack, norm=norm, batch_size=size)[0], whole)
    few = torch.tensor([31, 2, 17, 8, 25])
    part = run_attack(
        digits.model(), digits.unseen(60).take(few), attack, config(batch_size=2, norm=norm), image_ids=few
    )
    same(part, AttackResult(*(column[few] for column in whole)))
    other, _ = run(attack, norm=norm, seed=1)
    assert not torch.equal(other.distances, whole.distances)


def same(one: AttackResult, other: AttackResult) -> None:
    assert torch.equal(one.predictions, other.predictions)
    torch.testing.assert_close(one.margins, other.margins, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-3, atol=1e-3)


def test_finished_batches_are_not_attacked_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    attacked: list[int] = []
    stop_at = 3

    def interrupted(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        if len(attacked) == stop_at:
            raise KeyboardInterrupt
        attacked.append(len(x))
        return fgsm(0.15)(model, x, y, noise)

    attack = FunctionAttack(interrupted)
    whole, _ = run(fgsm(0.15), batch_size=10)
    with pytest.raises(KeyboardInterrupt):
        run(attack, batch_size=10, cache_folder=tmp_path)
    (tmp_path / "00001.safetensors").write_bytes(b"torn")
    stop_at = 100
    again, _ = run(attack, batch_size=10, cache_folder=tmp_path)
    assert len(attacked) == 3 + 1 + 3, "three before, the damaged one, the other three"
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))


@pytest.mark.parametrize(
    ("attack", "forward", "backward"),
    [
        (fgsm(0.001), 3, 1),  # of an image that stays robust: clean, the step, its result
        (PGD(eps=0.001, step_size=0.001, steps=3, restarts=2), 1 + 2 * 4, 2 * 3),
        (PGD(eps=0.001, step_size=0.001, steps=3, any_iterate=False), 3, 3),
        (Clean(), 0, 0),
    ],
)
def test_the_passes_of_an_attack_are_counted(attack: Attack, forward: int, backward: int, tmp_path: Path) -> None:
    model, split = digits.model(), digits.unseen(60)
    correct = run_attack(model, split, Clean(), config()).correct(split.labels)
    split = split.take(correct.nonzero().squeeze(1))
    costs = [AttackCost(), AttackCost()]
    for cost in costs:  # the second from the cache
        run_attack(model, split, attack, config(batch_size=10, cache_folder=tmp_path), cost=cost)
    assert costs[0] == costs[1]
    assert costs[0].forward_passes == forward * len(split)
    assert costs[0].backward_passes == backward * len(split)
    assert (costs[0].seconds > 0) or forward == 0
    assert not model._forward_hooks


@pytest.fixture
def project(tmp_path: Path, tiny_settings: Callable[..., Settings]) -> tuple[Settings, Paths]:
    """Prepared 8 x 8 digits, a model that has learned them as target, and one that has not as guidance."""
    section = {"eps": digits.EPS, "step_size": 0.04, "batch_size": 20, "check_images": 4}
    settings = tiny_settings(prepare={"image_size": 8, "test_per_class": 4}, evaluate=section)
    paths = Paths(tmp_path)
    paths.params.write_text(json.dumps(settings.model_dump(mode="json", by_alias=True)))
    prepare.run(settings, paths)
    for path, model in ((paths.target, digits.model()), (paths.guidance, digits.network())):
        checkpoint.save(path, model, {"architecture": ARCHITECTURE})
    return settings, paths


@pytest.mark.slow
def test_a_killed_evaluation_is_continued_by_other_processes_to_the_same_figures(
    project: tuple[Settings, Paths],
) -> None:
    settings, paths = project
    evaluate.run(settings, paths)
    figures, examples = paths.robustness.read_text(), pd.read_parquet(paths.examples)
    assert not list(paths.state.iterdir()), "the cache is cleared"
    for written in (paths.robustness, paths.examples, paths.gallery, paths.metrics):
        written.unlink()

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    stage = subprocess.Popen([sys.executable, "-m", "tasks.evaluate"], cwd=paths.root, env=environment)
    while stage.poll() is None and len(list(paths.state.rglob("*.safetensors"))) < 10:
        time.sleep(0.002)
    os.kill(stage.pid, signal.SIGKILL)
    assert stage.wait() == -signal.SIGKILL
    cached = {path: path.stat().st_mtime_ns for path in paths.state.rglob("[0-9]*.safetensors")}
    assert cached
    assert not paths.robustness.exists()

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "tasks.evaluate"]
    process = subprocess.run(command, cwd=paths.root, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("target: clean") == 2, "the first process alone speaks: a line of progress, the figures"
    assert strip(paths.robustness.read_text()) == strip(figures)
    # An image may be misclassified an iterate earlier or later where rounding differs.
    assert costs(paths.robustness.read_text()) == pytest.approx(costs(figures), rel=0.05)
    pd.testing.assert_frame_equal(pd.read_parquet(paths.examples), examples, rtol=1e-3, atol=1e-3)
    assert not list(paths.state.iterdir())


def strip(robustness: str) -> Any:
    """The figures without the sentences, which round them, and without what they cost."""
    content = json.loads(robustness)
    for model in content["models"].values():
        del model["costs"]
        model["checks"] = [(check["key"], check["passed"]) for check in model["checks"]]
    return content


def costs(robustness: str) -> dict[str, int]:
    """The passes of both models under each attack."""
    models = json.loads(robustness)["models"]
    assert all(cost["seconds"] > 0 for model in models.values() for cost in model["costs"].values())
    return {
        f"{name} {key} {passes}": cost[passes]
        for name, model in models.items()
        for key, cost in model["costs"].items()
        for passes in ("forward_passes", "backward_passes")
    }


def test_an_interruption_says_that_it_can_be_continued(
    project: tuple[Settings, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt  # what stage.main makes of SIGTERM, and Python of Ctrl-C

    monkeypatch.setattr(PGD, "__call__", stopped)
    with pytest.raises(Interrupted, match=r"finished batches are kept in .*state: run it again to continue"):
        evaluate.run(*project)
    assert list(project[1].state.rglob("clean/*.safetensors"))
    assert not project[1].robustness.exists()
