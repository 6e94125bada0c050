"""The stage `report`: all figures of the chain on one self-contained page, and the model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file

from d2r_core import checkpoint
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import ChampionComparison, RobustnessReport
from tasks.reporting import gallery, literature, rendering, robustness_figures, training_figures

T = TypeVar("T")


class EvaluationArtifacts(NamedTuple):
    """What an evaluation has written."""

    robustness: RobustnessReport
    examples: pd.DataFrame
    gallery: dict[str, npt.NDArray[Any]]


class Chain(NamedTuple):
    """What the chain knows of the models beyond their evaluation."""

    manifest: dict[str, Any]
    expectations: list[dict[str, Any]]
    pretrain_history: pd.DataFrame
    train_history: pd.DataFrame
    metadata: dict[str, dict[str, Any]]  # guidance, target
    comparison: ChampionComparison | None  # None: not made


def run(settings: Settings, paths: Paths) -> None:
    """Write `report.html` and `model_card.md` from the other stages' artifacts; the same inputs give the same bytes.

    Raises:
        UserError: an artifact is missing or damaged, or the figures were measured on other weights or other data
            than the present ones.
    """
    manifest = _read(paths.manifest, "prepare", _json)
    validation = _read(paths.validation / "validation.json", "validate", _json)
    artifacts = read(paths.reports)
    chain = Chain(
        manifest=manifest,
        expectations=validation["expectations"],
        pretrain_history=_read(paths.pretrain_history, "pretrain", pd.read_csv),
        train_history=_read(paths.train_history, "train", pd.read_csv),
        metadata={name: checkpoint.read_metadata(getattr(paths, name)) for name in ("guidance", "target")},
        comparison=_comparison(paths, artifacts.robustness),
    )
    _check_belonging(paths, chain, artifacts.robustness)
    page, card = render(artifacts, settings, chain), _card(artifacts, settings, chain)
    write_text(paths.report, page)
    write_text(paths.model_card, card)


def read(folder: Path) -> EvaluationArtifacts:
    """What an evaluation has written into `folder`. Raises UserError if a file is missing or damaged."""
    return EvaluationArtifacts(
        robustness=RobustnessReport.read(folder / "robustness.json"),
        examples=_read(folder / "examples.parquet", "evaluate", pd.read_parquet),
        gallery=_read(folder / "gallery.safetensors", "evaluate", load_file),
    )


def render(artifacts: EvaluationArtifacts, settings: Settings, chain: Chain | None = None) -> str:
    """The report as HTML, which needs no other file; without a chain, of one checkpoint and its figures alone."""
    script, policy = rendering.script("sort.js.j2")
    context = _context(artifacts, settings, chain)
    return rendering.render("report.html.j2", context | {"script": script, "script_policy": policy})


def _card(artifacts: EvaluationArtifacts, settings: Settings, chain: Chain) -> str:
    return rendering.render("model_card.md.j2", _context(artifacts, settings, chain))


def _context(artifacts: EvaluationArtifacts, settings: Settings, chain: Chain | None) -> dict[str, Any]:
    robustness = artifacts.robustness
    image_size = artifacts.gallery["clean"].shape[2]
    target = robustness.target.attacks
    attacks = robustness_figures.attacks(robustness)
    checks, check_counts = robustness_figures.checks(robustness)
    clean = artifacts.examples.query("model == 'target' and attack == 'clean'")
    images = np.bincount(clean["label"], minlength=len(robustness.data.classes)).tolist()
    return {
        "settings": settings,
        "robustness": robustness,
        "norm": rendering.norm_symbol(robustness.norm),
        "image_size": image_size,
        "models": [name for name in robustness_figures.MODELS if name in robustness.models],
        "figures": {name: model.attacks for name, model in robustness.models.items()},
        "attacks": attacks,
        "everywhere": [row.target.name for row in attacks if row.everywhere and row.key not in ("clean", "worst")],
        "summary": robustness_figures.summary(attacks),
        "checks": checks,
        "check_counts": check_counts,
        "curves": robustness_figures.curves(robustness),
        "per_class": robustness_figures.per_class(robustness, images),
        "confusion": robustness_figures.confusion(robustness),
        "gallery": gallery.rows(
            artifacts.gallery, artifacts.examples, robustness.data.classes, settings.report.gallery_images
        ),
        "magnified": gallery.MAGNIFIED,
        "published": literature.find_published(robustness.data.source, image_size, robustness.norm, target["pgd"].eps),
        "chain": chain and _of_chain(chain),
    }


def _of_chain(chain: Chain) -> dict[str, Any]:
    return {
        **chain._asdict(),
        "guidance_charts": training_figures.guidance(chain.pretrain_history, chain.metadata["guidance"]),
        "target_charts": training_figures.target(chain.train_history, chain.metadata["target"]),
        "differences": robustness_figures.differences(chain.comparison) if chain.comparison else [],
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: Path, made_by: str, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `dvc repro {made_by}` makes it.") from None


def _check_belonging(paths: Paths, chain: Chain, robustness: RobustnessReport) -> None:
    """Figures of other weights or other data must never be shown beside these."""
    for model, weights in (("guidance", paths.guidance), ("target", paths.target)):
        if robustness.models[model].weights_sha256 != chain.metadata[model]["weights_sha256"]:
            raise UserError(
                f"{paths.robustness}: was measured on other weights than {weights}. Run `dvc repro evaluate`."
            )
    if robustness.data.hash != chain.manifest["hash"]:
        raise UserError(
            f"{paths.robustness}: was measured on other data than {paths.prepared}. Run `dvc repro evaluate`."
        )


def _comparison(paths: Paths, robustness: RobustnessReport) -> ChampionComparison | None:
    """What `d2r run` has written beside the stages (registry/champion_comparison.py), if it is about these figures."""
    if not paths.comparison.exists():
        return None
    comparison = ChampionComparison.read(paths.comparison)
    if comparison.identity == robustness.identity:
        return comparison
    reason = "Not compared yet: the last comparison was of other figures. `d2r run` makes a new one."
    return comparison.model_copy(update={"champion": None, "attacks": None, "reason": reason})


if __name__ == "__main__":
    entry_point.main(run)
