"""Fixtures that several test files share: small settings, a finished project, a Prefect server, a browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scratch_project
from project import params, settings_from

from tasks.config.settings import Settings

# On busy cores, threads that wait for each other spin, and one is faster. Set before PyTorch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The values of a complete parameter file that trains in seconds."""
    values = params()
    values["prepare"].update(train_per_class=12, test_per_class=4)
    values["pretrain"].update(architecture={"name": "resnet18", "width": 4, "strides": [1, 2, 2, 2]}, epochs=1)
    values["train"].update(epochs=1, steps=2, batch_size=32)
    values["evaluate"].update(steps=2, autoattack_images=0, check_images=20)
    values["promote"].update(min_clean_accuracy=0.0, min_robust_accuracy=0.0, onnx=False)
    values["validate"].update(min_images_per_class=1)
    return values


@pytest.fixture
def tiny_settings(tiny_values: dict[str, Any]) -> Callable[..., Settings]:
    """`tiny_settings(train={"epochs": 2}, seed=3)`: the tiny settings with these values instead."""
    return partial(settings_from, tiny_values)


@pytest.fixture(scope="session")
def finished_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch_project.make_finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def finished_project(finished_template: Path, tmp_path: Path) -> Path:
    """A scratch project whose two stages have run, and whose stage `second` is outdated."""
    return shutil.copytree(finished_template, tmp_path / "project")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by Playwright.

    Ended with its module: as long as Playwright runs, it keeps an event loop in this thread, in which no test of
    another module could call `asyncio.run`.
    """
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    disabled = ["background-networking", "component-update", "gpu", "quic", "sync"]
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in disabled)]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()
