"""The target beside the champion, whose predictions come out of a real sqlite store."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import robustness_json
import torch
from registry_project import NAME, copy_store

from d2r_core.evaluation.statistics import paired_bootstrap
from d2r_core.files import sha256
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import VERSION, RobustnessReport
from tasks.registry import champion_comparison, integrity, versions
from tasks.tracking import connection, errors

pytestmark = pytest.mark.slow

IMAGES = 40
ATTACKS = {"clean": ("clean", IMAGES), "pgd": ("PGD-2", IMAGES), "autoattack": ("APGD-CE (quick)", 10)}
CORRECT = {"clean": 36, "pgd": 20, "autoattack": 6}


class Project:
    """A checkout with a target's predictions; its registry is real."""

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths

    def evaluate(self, weights: str, *, seed: int = 0, data: str = "data", evaluation: str = "evaluation") -> None:
        """Write what the stage `evaluate` would of a target with these weights and predictions drawn with `seed`."""
        generator = np.random.default_rng(seed)
        frames = []
        for model in ("guidance", "target"):
            for attack, (_, images) in ATTACKS.items():
                correct = generator.permutation(np.arange(images) < CORRECT[attack])
                rows = {"model": model, "attack": attack, "index": np.arange(images) * (IMAGES // images)}
                frames.append(pd.DataFrame({**rows, "correct": correct}))
        # In another order: images belong together by their number.
        examples = pd.concat(frames, ignore_index=True).sample(frac=1, random_state=seed)
        figures = {attack: robustness_json.figures(name) for attack, (name, _) in ATTACKS.items()}
        models = {"target": robustness_json.model(weights, figures)}
        content = robustness_json.content(models, data=data, seed=7, settings_hash=evaluation)
        robustness_json.write(self.paths.robustness, content)
        examples.to_parquet(self.paths.examples)

    def correct(self, attack: str) -> "pd.Series[bool]":
        """Whether the target is correct, by image, in the order of their numbers."""
        examples = pd.read_parquet(self.paths.examples)
        rows = examples[(examples["model"] == "target") & (examples["attack"] == attack)]
        return rows.set_index("index")["correct"].sort_index()

    def crown(self, weights: str, *, files: bool = True, release: int = VERSION) -> int:
        """Make the evaluated target champion, with its figures in the format of a release."""
        connection.configure(self.settings, self.paths)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tests")
        assert experiment is not None
        run_id = client.create_run(experiment.experiment_id).info.run_id
        identity = RobustnessReport.read(self.paths.robustness).identity
        model_id = client.create_logged_model(experiment.experiment_id, "model", run_id).model_id
        folder = self.paths.root / "logged" / model_id
        (folder / integrity.CONTENT).mkdir(parents=True)
        for path in (self.paths.robustness, self.paths.examples) if files else ():
            shutil.copy(path, folder / integrity.CONTENT)
        if release != VERSION:
            content = robustness_json.content(version=release)
            robustness_json.write(folder / integrity.CONTENT / "robustness.json", content)
        manifest = integrity.write_manifest(folder)
        client.log_model_artifacts(model_id, str(folder))
        name = self.settings.promote.model_name
        if versions.champion(self.settings, self.paths) is None:
            client.create_registered_model(name)
        tags = {**dict(identity), integrity.TAG: sha256(manifest)}
        version = client.create_model_version(name, f"models:/{model_id}", run_id, tags=tags, model_id=model_id)
        client.set_registered_model_alias(name, "champion", version.version)
        return int(version.version)

    def compare(self) -> str:
        return champion_comparison.compare(self.settings, self.paths)

    def written(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.paths.comparison.read_text(encoding="utf-8"))
        return content


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    copy_store(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    tracking = {"uri": "sqlite:///mlflow.db", "experiment": "tests"}
    return Project(tiny_settings(tracking=tracking, promote={"model_name": NAME}), Paths(tmp_path))


def test_images_are_compared_one_by_one(project: Project) -> None:
    project.evaluate("champion", seed=1)
    champion = {attack: project.correct(attack) for attack in ATTACKS}
    version = project.crown("champion")
    project.evaluate("challenger", seed=2)
    challenger = {attack: project.correct(attack) for attack in ATTACKS}

    message = project.compare()

    comparison = project.written()
    attacks = comparison.pop("attacks")
    assert comparison == {
        "champion": {"version": version, "weights_sha256": "champion"},
        "challenger": {"weights_sha256": "challenger"},
        "data_hash": "data",
        "evaluation_hash": "evaluation",
    }
    assert list(attacks) == ["clean", "pgd", "autoattack", "worst"]
    for correct in (champion, challenger):  # AutoAttack ran on a subset only
        correct["worst"] = correct["clean"] & correct["pgd"]
    for key, figures in attacks.items():
        ours, theirs = challenger[key], champion[key]
        interval = paired_bootstrap(torch.tensor(ours.to_numpy()), torch.tensor(theirs.to_numpy()), seed=7)
        assert figures == {
            "name": "worst" if key == "worst" else ATTACKS[key][0],
            "images": len(ours),
            "challenger": ours.mean(),
            "champion": theirs.mean(),
            "difference": pytest.approx(ours.mean() - theirs.mean()),
            "interval": list(interval),
            "only_challenger": (ours & ~theirs).sum(),
            "only_champion": (theirs & ~ours).sum(),
        }
        assert figures["only_challenger"] > 0, "the two models must differ"
        assert figures["only_champion"] > 0, "the two models must differ"
    worst = attacks["worst"]
    assert message == (
        f"Worst case {worst['challenger']:.2%}, the champion's (version {version}) {worst['champion']:.2%}; "
        f"95 % interval of the difference: {worst['interval'][0]:+.2%} to {worst['interval'][1]:+.2%}."
    )

    before = project.paths.comparison.read_bytes()
    project.compare()
    assert project.paths.comparison.read_bytes() == before


def test_without_a_champion_there_is_no_file(project: Project) -> None:
    project.evaluate("first")

    assert project.compare() == "There is no champion to compare with."

    assert project.paths.comparison.parent.is_dir(), "the stage `report` depends on it"
    assert not project.paths.comparison.exists()
    # Nor does one stay when the champion is taken away.
    project.crown("first")
    project.evaluate("second")
    project.compare()
    assert project.paths.comparison.exists()
    mlflow.MlflowClient().delete_registered_model_alias(project.settings.promote.model_name, "champion")
    project.compare()
    assert not project.paths.comparison.exists()


@pytest.mark.parametrize(
    ("changes", "files", "reason"),
    [
        ({"data": "other"}, True, "The figures of version 1 were measured on other data."),
        (
            {"evaluation": "other"},
            True,
            "The figures of version 1 were measured with another seed or other `evaluate` settings.",
        ),
        ({}, False, "The figures of version 1 are in a format that this release does not read."),
    ],
    ids=["data", "evaluation", "files"],
)
def test_what_cannot_be_compared_has_a_reason_and_no_figures(
    project: Project, changes: dict[str, Any], files: bool, reason: str
) -> None:
    project.evaluate("champion", **changes)
    project.crown("champion", files=files)
    project.evaluate("challenger")

    assert project.compare() == f"Not compared image by image: {reason}"

    assert project.written() == {
        "champion": {"version": 1, "weights_sha256": "champion"},
        "challenger": {"weights_sha256": "challenger"},
        "data_hash": "data",
        "evaluation_hash": "evaluation",
        "reason": reason,
    }


def test_a_champion_of_another_release_has_a_reason_too(project: Project) -> None:
    project.evaluate("champion")
    project.crown("champion", release=VERSION + 1)
    project.evaluate("challenger")
    message = "Not compared image by image: The figures of version 1 are in a format that this release does not read."
    assert project.compare() == message
    assert "attacks" not in project.written()


def test_a_promoted_challenger_keeps_its_comparison(project: Project) -> None:
    """Else the report would be out of date as soon as its model is promoted."""
    project.evaluate("champion", seed=1)
    project.crown("champion")
    project.evaluate("challenger", seed=2)
    project.compare()
    before = project.paths.comparison.read_bytes()
    project.crown("challenger")

    assert project.compare() == "The champion, version 2, is this very model."

    assert project.paths.comparison.read_bytes() == before
    # Measured otherwise, it is the same model still, and the file is about other figures.
    project.evaluate("challenger", seed=2, evaluation="other")
    project.compare()
    assert not project.paths.comparison.exists()


def test_a_server_that_is_away_leaves_no_file_about_another_target(project: Project) -> None:
    project.evaluate("champion", seed=1)
    project.crown("champion")
    project.evaluate("challenger", seed=2)
    project.compare()
    before = project.paths.comparison.read_bytes()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        away = project.settings.tracking.model_copy(update={"uri": uri})
        project.settings = project.settings.model_copy(update={"tracking": away})

        with pytest.raises(errors.UnavailableError):
            project.compare()
        assert project.paths.comparison.read_bytes() == before

        project.evaluate("another", seed=3)
        with pytest.raises(errors.UnavailableError):
            project.compare()
        assert not project.paths.comparison.exists()
