"""`params.yaml`: valid files, and the error message for every kind of mistake."""

import copy
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.settings import D2RMethod

FROZEN = {
    "name": "d2r",
    "clean_weight": 20.0,
    "adv_weight": 30.0,
    "attack": "cag",
    "guidance": "frozen",
    "divergence_mean": "elements",
}
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def changed(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(values)
    *sections, key = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_parameter_file_of_the_project_is_complete(path: Path) -> None:
    settings_file.load(path)


def test_the_presets_hold_the_published_recipe() -> None:
    for name in ("cifar10", "cifar100"):
        for model in ("wide_resnet_34_10", "preact_resnet18"):
            settings = settings_file.load(ROOT / f"presets/{name}_{model}.yaml")
            train = settings.train
            assert (train.eps, train.step_size, train.steps) == (0.031, 0.007, 10)
            assert (train.learning_rate, train.momentum, train.weight_decay) == (0.1, 0.9, 2e-4)
            assert (train.batch_size, train.epochs, train.schedule) == (128, 100, "step")
            assert train.method == D2RMethod(
                name="d2r",
                clean_weight=20.0,
                adv_weight=30.0,
                attack="cag",
                guidance="joint",
                guidance_logit_weight=0.0,
                divergence_mean="elements",
            )
            assert (train.warm_up.eps_epochs, train.warm_up.regularization_epochs) == (0.0, 0.0)
            assert (train.label_smoothing, train.gradient_clip, train.weight_perturbation.gamma) == (0.0, None, 0.0)
            assert train.average.name == "none"
            assert (train.crop_padding, train.flip) == (4, True)
            assert settings.pretrain.epochs == 0, "the published guidance starts from random weights"
            assert settings.prepare.source == name


def test_a_distance_may_be_a_fraction(tiny_values: dict[str, Any]) -> None:
    settings = settings_file.parse(changed(tiny_values, "evaluate.eps", "8/255"))
    assert settings.evaluate.eps == 8 / 255
    assert settings.flat()["evaluate.eps"] == 8 / 255
    in_l2 = settings_file.parse(changed(changed(tiny_values, "evaluate.norm", "L2"), "evaluate.eps", "3/2"))
    assert in_l2.evaluate.eps == 1.5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.epoch", 3, "train.epoch is not a known key. Did you mean 'epochs'?"),
        ("trian", {}, "trian is not a known key. Did you mean 'train'?"),
        ("train.epochs", -1, "train.epochs is -1; input should be greater than or equal to 1"),
        ("train.epochs", "ten", "train.epochs is 'ten'; input should be a valid integer"),
        ("train.epochs", True, "train.epochs is True; input should be a valid integer"),
        ("train.eps", 8, "train.eps is 8; input should be less than or equal to 1"),
        ("train.eps", "8/0", "train.eps is '8/0'; input should be a valid number"),
        ("train.eps", float("nan"), "train.eps is nan"),
        ("evaluate.eps", 8, "evaluate.eps is 8; at most 1 in Linf, since images are in [0, 1]"),
        ("evaluate.norm", "L1", "evaluate.norm is 'L1'; allowed: Linf, L2"),
        ("train.weight_decay", "2e-4", "YAML reads 2e-4 as text: write 0.0002 or 2.0e-4"),
        (
            "train.schedule",
            "steps",
            "train.schedule is 'steps'; allowed: step, constant, cosine, one_cycle. Did you mean 'step'?",
        ),
        ("prepare.source", "cifar", "prepare.source is 'cifar'; allowed: digits, image_folder, cifar10, cifar100"),
        ("train.architecture.name", "wide_resnt", "Did you mean 'wide_resnet'?"),
        ("train.architecture.depth", 33, "train.architecture.depth is 33; allowed are 10, 16, 22, 28, 34"),
        ("train.architecture.widen", 2, "train.architecture.widen is not a known key. Did you mean 'widen_factor'?"),
        ("train.method.beta", 6.0, "train.method.beta is not a known key. Known here: name, clean_weight"),
        (
            "train.method",
            {**FROZEN, "guidance_logit_weight": 2.5},
            "train.method.guidance_logit_weight is 2.5; at most 0 unless guidance is 'joint'",
        ),
        (
            "train.method",
            {"name": "lbgt", "beta": 6.0},
            "allowed: d2r, lbgat, trades, at, standard. Did you mean 'lbgat'?",
        ),
        (
            "train.architecture",
            {"depth": 10},
            "train.architecture.name is missing; allowed: wide_resnet, preact_resnet18, resnet18",
        ),
        ("train", None, "train is None; it must be a section of keys"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(
    tiny_values: dict[str, Any], path: str, value: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        settings_file.parse(changed(tiny_values, path, value))
    assert str(caught.value).startswith("params.yaml: ")
    assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_all_mistakes_come_in_one_message(tiny_values: dict[str, Any]) -> None:
    values = changed(changed(tiny_values, "train.epochs", 0), "seed", -1)
    del values["report"]
    with pytest.raises(UserError) as caught:
        settings_file.parse(values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "params.yaml: report is missing" in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: cannot be read .* `d2r use digits`"):
        settings_file.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("seed: [1")
    with pytest.raises(UserError, match=r"params\.yaml: is not valid YAML"):
        settings_file.load(tmp_path / "params.yaml")


def test_settings_are_frozen_and_hashed_by_section(tiny_values: dict[str, Any]) -> None:
    settings = settings_file.parse(tiny_values)
    with pytest.raises(ValueError, match="frozen"):
        settings.train.epochs = 3  # type: ignore[misc]
    other = settings_file.parse(changed(tiny_values, "train.epochs", 7))
    assert settings.hash("seed", "pretrain") == other.hash("seed", "pretrain")
    assert settings.hash("train") != other.hash("train")
    assert settings.hash() != other.hash()
