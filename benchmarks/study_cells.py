"""What the study compares: its cells, their settings, and the small search that each method gets."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasks.config import settings as settings_file
from tasks.config.settings import Settings

ROOT = Path(__file__).parents[1]

# Set one after the other, each to the value that does best on the validation split; the first ones are the start.
SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (0.1, 0.03, 0.01),
    "schedule": ("step", "one_cycle"),
    "weight_decay": (2e-4, 5e-4),
}
PUBLISHED: dict[str, Any] = {"learning_rate": 0.1, "schedule": "step", "weight_decay": 2e-4}
SEEDS = (0, 1, 2)
CLOSE = 0.02  # two cells that differ by less than this get all seeds

D2R: dict[str, Any] = {
    "name": "d2r",
    "clean_weight": 20.0,
    "adv_weight": 30.0,
    "attack": "cag",
    "guidance": "joint",
    "guidance_logit_weight": 0.0,
    "divergence_mean": "elements",
}
PRETRAINED: dict[str, Any] = {"pretrain.epochs": 10}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: the changes to the study's settings, by dotted key.

    Args:
        search: the cell whose search its learning rate, schedule and weight decay come from; "": as published.
        reference: the cell that it is compared with.
        gradients: whether the gradient of each loss term is recorded over the first steps.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    search: str
    reference: str
    gradients: bool = False


def _d2r(title: str, *, pretrained: bool = True, method: Mapping[str, Any] | None = None, **options: Any) -> Cell:
    """D2R with a pretrained guidance and these changes, compared with D2R with a pretrained guidance alone."""
    changes = {"train.method": {**D2R, **(method or {})}, **(PRETRAINED if pretrained else {})}
    changes |= options.pop("changes", {})
    return Cell(title=title, changes=changes, **{"search": "d2r-pretrained", "reference": "d2r-pretrained", **options})


# In the order in which they run: first what answers most.
CELLS: dict[str, Cell] = {
    "standard": Cell(
        title="standard training", changes={"train.method": {"name": "standard"}}, search="standard", reference="at"
    ),
    "at": Cell(title="AT", changes={"train.method": {"name": "at"}}, search="at", reference="trades"),
    "trades": Cell(
        title="TRADES, beta 6",
        changes={"train.method": {"name": "trades", "beta": 6.0}},
        search="trades",
        reference="at",
    ),
    "d2r": _d2r(
        "D2R, random guidance (as published)", pretrained=False, search="d2r", reference="trades", gradients=True
    ),
    "d2r-pretrained": _d2r("D2R, pretrained guidance", reference="trades"),
    "d2r-published-rate": _d2r(
        "D2R, random guidance, published rate, schedule and weight decay",
        pretrained=False,
        search="",
        reference="d2r",
        gradients=True,
    ),
    "d2r-frozen": _d2r("guidance pretrained and frozen", method={"guidance": "frozen"}),
    "lbgat": Cell(
        title="LBGAT, beta 6, random guidance",
        changes={"train.method": {"name": "lbgat", "beta": 6.0}},
        search="lbgat",
        reference="d2r",
    ),
    "attack-trades": _d2r("attack: TRADES' own", method={"attack": "trades"}),
    "attack-pgd": _d2r("attack: PGD on the label", method={"attack": "pgd"}),
    "clean-0": _d2r("clean term 0", method={"clean_weight": 0.0}),
    "clean-40": _d2r("clean term doubled", method={"clean_weight": 40.0}),
    "adv-0": _d2r("adversarial term 0", method={"adv_weight": 0.0}),
    "adv-60": _d2r("adversarial term doubled", method={"adv_weight": 60.0}),
    "divergence-images": _d2r("divergences averaged over B", method={"divergence_mean": "images"}),
    "guidance-adversarial": _d2r(
        "guidance on the adversarial images, detached (PeerAiD)", method={"guidance": "adversarial"}
    ),
    "guidance-adagat": _d2r("detached MSE for the guidance, 2.5 (AdaGAT)", method={"guidance_logit_weight": 2.5}),
    "guidance-ema": _d2r("guidance: EMA of the target (ADR)", pretrained=False, method={"guidance": "ema"}),
    "guidance-larger": _d2r(
        "guidance pretrained, twice as wide",
        changes={"pretrain.architecture": {"name": "resnet18", "width": 32, "strides": [1, 1, 2, 2]}},
    ),
    "warm-up": _d2r("warm-up of the regularisation, 2 epochs", changes={"train.warm_up.regularization_epochs": 2.0}),
    "warm-up-eps": _d2r("warm-up of eps, 2 epochs", changes={"train.warm_up.eps_epochs": 2.0}),
    "ema-awp": _d2r(
        "EMA (0.99) and AWP (0.005)",
        changes={"train.average.name": "ema", "train.average.decay": 0.99, "train.weight_perturbation.gamma": 0.005},
    ),
    "label-smoothing": _d2r("label smoothing 0.1", changes={"train.label_smoothing": 0.1}),
    "weight-decay": _d2r("weight decay 5e-4", changes={"train.weight_decay": 5e-4}),
    "one-cycle": _d2r("one-cycle", changes={"train.schedule": "one_cycle"}),
    "random-clipped": _d2r(
        "D2R, random guidance, gradient clipped at 1",
        pretrained=False,
        search="d2r",
        reference="d2r",
        changes={"train.gradient_clip": 1.0},
    ),
}


@dataclass(frozen=True)
class Study:
    """The study's folder and size. `folder` holds data, guidance models, searches, cells and MLflow's database."""

    folder: Path
    miniature: bool = False

    def settings(self, key: str, seed: int = 0, *, search: bool = False, **choice: Any) -> Settings:
        """The settings of a cell with the searched keys of `train` as chosen; with `search`, on fewer images.

        What a cell changes itself goes before the choice.
        """
        values = self._values()
        values["seed"] = seed
        if search:
            values["prepare"]["train_per_class"] = 12 if self.miniature else 120
        values["train"] |= choice
        for path, value in CELLS[key].changes.items():
            if not self.miniature or path != "pretrain.architecture":
                _set(values, path, copy.deepcopy(value))
        values["tracking"]["experiment"] = f"study {key}"
        return settings_file.parse(values)

    def _values(self) -> dict[str, Any]:
        """The preset for CIFAR-10 on a CPU, with other images, evaluation and length."""
        values: dict[str, Any] = yaml.safe_load((ROOT / "presets/cifar10_cpu.yaml").read_text(encoding="utf-8"))
        values["prepare"] |= {"source": "image_folder", "path": str(self.folder.resolve() / "raw")}
        values["prepare"] |= {"validation_fraction": 0.01, "train_per_class": 300, "test_per_class": 100}
        values["pretrain"] |= {"epochs": 0, "batch_size": 64, "learning_rate": 0.05, "schedule": "one_cycle"}
        values["train"] |= {"epochs": 5, "batch_size": 32}
        values["evaluate"] |= {"autoattack": "quick", "autoattack_images": 1000}
        values["tracking"] |= {"uri": f"sqlite:///{self.folder.resolve() / 'mlflow.db'}"}
        values["runtime"] |= {"device": "cpu", "save_minutes": 2.0}
        if self.miniature:
            values["prepare"] |= {"source": "digits", "image_size": 16, "validation_fraction": 0.1}
            values["prepare"] |= {"on_mismatch": "convert", "train_per_class": 20, "test_per_class": 3}
            tiny = {"name": "wide_resnet", "depth": 10, "widen_factor": 1}
            values["pretrain"] |= {"architecture": tiny, "batch_size": 32}
            values["train"] |= {"architecture": tiny, "epochs": 2, "steps": 1}
            values["evaluate"] |= {"steps": 2, "autoattack_images": 5, "batch_size": 30}
            values["runtime"] |= {"save_minutes": 0.001}
        return values


def similar(accuracies: Mapping[str, float]) -> list[str]:
    """The cells that need all seeds: those closer than `CLOSE` to their reference, and that reference."""
    pairs = [(key, CELLS[key].reference) for key in accuracies if CELLS[key].reference in accuracies]
    close = {key for pair in pairs if abs(accuracies[pair[0]] - accuracies[pair[1]]) < CLOSE for key in pair}
    return [key for key in CELLS if key in close]


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        values = values[section]
    values[key] = value


def describe(choice: Mapping[str, Any]) -> str:
    """The searched keys in a few words: "rate 0.03, step, decay 0.0002"."""
    return f"rate {choice['learning_rate']:g}, {choice['schedule']}, decay {choice['weight_decay']:g}"
