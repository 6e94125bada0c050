"""The end of a retraining: registered, gated and promoted; and what of it is tried again."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from prefect import Task
from prefect.client.schemas.objects import State
from prefect.states import Failed
from registry_project import Project, make_project

from d2r_core.errors import UserError
from flows import promotion
from tasks import prefect_tasks
from tasks.config.settings import Settings
from tasks.tracking import errors

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    return make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)


def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks' functions themselves: no server, no retries."""
    for name in ("register", "gate", "promote"):
        monkeypatch.setattr(promotion, name, getattr(promotion, name).fn)


def test_promotion_lets_better_models_through(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    without_prefect(monkeypatch)
    results = []
    for seed, worst in ((0, 0.6), (0, 0.6), (1, 0.65), (2, 0.9)):
        project.train(seed)
        project.evaluate(worst=worst)
        results.append(promotion.promotion(project.settings, project.paths))
    assert [(result.version, result.alias, result.verdict.passed) for result in results] == [
        (1, "champion", True),
        (1, "champion", True),
        (2, "challenger", False),
        (3, "champion", True),
    ]
    assert project.champion() == project.challenger() == 3


@pytest.mark.parametrize(
    "task", [prefect_tasks.compare, prefect_tasks.register, prefect_tasks.gate, prefect_tasks.promote]
)
def test_only_a_server_that_is_away_is_tried_again(task: Task[..., object]) -> None:
    assert task.retries
    condition = cast(Callable[..., bool], task.retry_condition_fn)

    async def answers() -> tuple[bool, bool]:
        # Within a running event loop, where `State.result` is a coroutine.
        away: State[object] = Failed(data=errors.UnavailableError("away"))
        refused: State[object] = Failed(data=UserError("refused"))
        return condition(task, None, away), condition(task, None, refused)

    assert asyncio.run(answers()) == (True, False)
