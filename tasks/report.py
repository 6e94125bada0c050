"""The stage `report`: all figures of the chain on one self-contained page, and the model card."""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from d2r_core import checkpoint
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks import charts, stage
from tasks.charts import Mark, Series
from tasks.paths import Paths
from tasks.settings import Method, Settings

# The attacks of robustness.json in the order of the report's rows, each with what a reader must know about it.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one signed gradient step",
    "pgd": "projected gradient descent on the cross-entropy, random start",
    "cw": "the same on the margin of the logits",
    "worst": "an image is right only if it is right in every row above",
    "autoattack": "standard version, on a class-balanced subset",
}
MODELS = ("guidance", "target")
_NOTHING = "—"

Pixels = npt.NDArray[np.uint8]  # (3, H, W)
T = TypeVar("T")


def run(settings: Settings, paths: Paths) -> None:
    """Write `report.html` and `model_card.md` from the other stages' artifacts; the same inputs give the same bytes.

    Raises:
        UserError: an artifact is missing or damaged, or the figures were measured on other weights or other data
            than the ones that lie here.
    """
    manifest = _read(paths.manifest, "prepare", _json)
    validation = _read(paths.validation / "validation.json", "validate", _json)
    pretrain_history = _read(paths.pretrain_history, "pretrain", pd.read_csv)
    train_history = _read(paths.train_history, "train", pd.read_csv)
    robustness = _read(paths.robustness, "evaluate", _json)
    examples = _read(paths.examples, "evaluate", pd.read_parquet)
    gallery = _read(paths.gallery, "evaluate", load_file)
    metadata = {"guidance": checkpoint.read_metadata(paths.guidance), "target": checkpoint.read_metadata(paths.target)}
    _check_belonging(paths, manifest, metadata, robustness)

    figures = {model: robustness["models"][model]["attacks"] for model in MODELS}
    attacks = [key for key in ATTACKS if key in figures["target"]]
    assert set(attacks) == set(figures["target"]) == set(figures["guidance"]), (
        "an attack that ATTACKS does not describe"
    )
    checks = validation if isinstance(validation, list) else validation["expectations"]
    context = {
        "settings": settings,
        "manifest": manifest,
        "checks": checks,
        "check_columns": [key for key in checks[0] if key != "ok" and any(check[key] for check in checks)],
        "robustness": robustness,
        "norm": robustness["norm"].replace("inf", "∞"),
        "metadata": metadata,
        "figures": figures,
        "attacks": [{"key": key, "note": ATTACKS[key], **figures["target"][key]} for key in attacks],
        "pretrained": len(pretrain_history) > 0,
        "robustness_strips": {key: _robustness_strip(figures, key) for key in attacks},
        "per_class": _per_class(manifest, figures["target"]),
        "guidance_charts": _guidance_charts(pretrain_history, metadata["guidance"]),
        "target_charts": _target_charts(train_history, metadata["target"]),
        "gallery": _gallery(gallery, examples, figures["target"], manifest["classes"], settings.report.gallery_images),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "distance": distance,
        "value": value,
        "name": name,
        "method": method,
        "markdown": markdown,
    }
    page = environment.get_template("report.html.j2").render(context)
    card = environment.get_template("model_card.md.j2").render(context)
    write_text(paths.report, page)
    write_text(paths.model_card, card)


def percent(share: float | None) -> str:
    """An accuracy in [0, 1] as it is printed; None (no images) is a dash."""
    return _NOTHING if share is None else f"{100 * share:.1f}%"


def distance(eps: float) -> str:
    """A distance in [0, 1] as a decimal and, if it is one, as a number of grey levels: "0.03137 (8/255)"."""
    levels = 255 * eps
    fraction = f" ({round(levels)}/255)" if round(levels) and abs(levels - round(levels)) < 0.01 else ""
    return f"{eps:.4g}{fraction}"


def value(found: object) -> str:
    """What a data check observed or allows, for people."""
    match found:
        case None | []:
            return _NOTHING
        case bool():
            return "yes" if found else "no"
        case float():
            return f"{found:.4g}"
        case dict():
            return ", ".join(f"{key}: {value(part)}" for key, part in found.items())
        case list():
            return ", ".join(value(part) for part in found)
    return str(found)


def name(architecture: Mapping[str, Any]) -> str:
    """The name that the field uses for an architecture."""
    match architecture["name"]:
        case "wide_resnet":
            return f"WideResNet-{architecture['depth']}-{architecture['widen_factor']}"
        case "preact_resnet18":
            return "PreActResNet-18"
        case "resnet18":
            strides = ", ".join(map(str, architecture["strides"]))
            return f"ResNet-18 (width {architecture['width']}, strides {strides})"
    return str(architecture["name"])


def method(found: Method) -> str:
    """A training method and its weights: "D2R + CAG (clean_weight 20, adv_weight 30)"."""
    names = {
        "d2r": "D2R + CAG",
        "lbgat": "LBGAT",
        "trades": "TRADES",
        "at": "PGD adversarial training",
        "standard": "standard training",
    }
    options = ", ".join(f"{key} {value(found)}" for key, found in found if key != "name")
    return f"{names[found.name]} ({options})" if options else names[found.name]


def markdown(text: object) -> Markup:
    """Text as it is, wherever it stands in Markdown: neither HTML nor Markdown in it is interpreted."""
    return Markup(re.sub(r"([\\`*_\[\]|~!#])", r"\\\1", str(escape(" ".join(str(text).split())))))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: Path, made_by: str, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `dvc repro {made_by}` makes it.") from None


def _check_belonging(
    paths: Paths, manifest: Mapping[str, Any], metadata: Mapping[str, Any], robustness: Mapping[str, Any]
) -> None:
    """Figures of other weights or other data must never stand beside these."""
    for model, weights in (("guidance", paths.guidance), ("target", paths.target)):
        if robustness["models"][model]["weights_sha256"] != metadata[model]["weights_sha256"]:
            raise UserError(
                f"{paths.robustness}: was measured on other weights than {weights}. Run `dvc repro evaluate`."
            )
    if robustness["data"]["hash"] != manifest["hash"]:
        raise UserError(
            f"{paths.robustness}: was measured on other data than {paths.prepared}. Run `dvc repro evaluate`."
        )


def _robustness_strip(figures: Mapping[str, Any], key: str) -> Markup:
    return charts.strip(
        [
            Mark("ring", "guidance", figures["guidance"][key]["accuracy"]),
            Mark("dot", "target", figures["target"][key]["accuracy"]),
        ]
    )


def _per_class(manifest: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per class: its name, test images, and the target's accuracies."""
    rows = []
    for index, label in enumerate(manifest["classes"]):
        shares = {key: figures[key]["per_class"][index] for key in ("clean", "pgd", "worst")}
        marks = [
            Mark("bar", "clean", shares["clean"]),
            Mark("bar", "worst", shares["worst"]),
            Mark("tick", "pgd", shares["pgd"]),
        ]
        images = manifest["splits"]["test"]["per_class"][index]
        rows.append({"label": label, "images": images, **shares, "strip": charts.strip(marks)})
    return rows


def _guidance_charts(history: pd.DataFrame, metadata: Mapping[str, Any]) -> list[Markup]:
    """Accuracy and loss over the epochs of pretraining; none if there was no epoch."""
    if history.empty:
        return []
    epochs = history["epoch"].tolist()
    last = history.iloc[-1]
    accuracy = charts.curves(
        epochs,
        [
            Series("training", "soft dashed", history["batch_accuracy"].tolist()),
            Series("validation", "guidance", history["accuracy"].tolist()),
        ],
        scale="percent",
        description=f"Accuracy of the guidance model over {len(epochs)} epochs: at the end "
        f"{percent(last['batch_accuracy'])} in training and {percent(last['accuracy'])} on the validation split.",
        kept=metadata["metrics"].get("epoch"),
    )
    loss = charts.curves(
        epochs,
        [Series("loss", "guidance", history["loss"].tolist())],
        scale="log",
        description=f"Training loss of the guidance model, from {history['loss'].iloc[0]:.3g} to {last['loss']:.3g}.",
    )
    return [accuracy, loss]


def _target_charts(history: pd.DataFrame, metadata: Mapping[str, Any]) -> list[Markup]:
    """Validation accuracies with the kept epoch, and the terms of the loss."""
    epochs = history["epoch"].tolist()
    kept, last = metadata["metrics"], history.iloc[-1]
    accuracy = charts.curves(
        epochs,
        [
            Series("clean", "target dashed", history["clean_accuracy"].tolist()),
            Series("robust", "target", history["robust_accuracy"].tolist()),
        ],
        scale="percent",
        description=f"Validation accuracy of the target model over {len(epochs)} epochs; epoch {kept['epoch']} was "
        f"kept, with {percent(kept['clean_accuracy'])} clean and {percent(kept['robust_accuracy'])} robust.",
        kept=kept["epoch"],
    )
    known = {
        "loss": "ink",
        "ce": "soft dashed",
        "logit": "soft dotted",
        "clean": "target dashed",
        "adv": "target",
        "robust": "target",
    }
    styles = {term: style for term, style in known.items() if term in history}
    loss = charts.curves(
        epochs,
        [Series(term, style, history[term].tolist()) for term, style in styles.items()],
        scale="log",
        description="Training loss and its terms; at the last epoch "
        + ", ".join(f"{term} {last[term]:.3g}" for term in styles)
        + ".",
    )
    return [accuracy, loss]


def _gallery(
    tensors: Mapping[str, npt.NDArray[Any]],
    examples: pd.DataFrame,
    figures: Mapping[str, Any],
    classes: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` images with their adversarial twins, predictions, and the attacks that the target falls to."""
    eps = figures["pgd"]["eps"]
    single = examples["attack"] != "worst"
    lost = examples[(examples["model"] == "target") & single & ~examples["correct"]]
    rows = []
    for i, (index, label) in enumerate(zip(tensors["index"][:count], tensors["labels"][:count], strict=True)):
        clean = tensors["clean"][i]
        attacked = []
        for model in MODELS:
            adversarial = tensors[f"{model}_adversarial"][i]
            perturbation = adversarial - clean.astype(np.float32) / 255
            before, after = (int(tensors[f"{model}_{kind}_prediction"][i]) for kind in ("clean", "adversarial"))
            attacked.append(
                {
                    "model": model,
                    "adversarial": _png(_grey_levels(adversarial)),
                    "perturbation": _png(_grey_levels(0.5 + perturbation / (2 * eps))),
                    "before": {"label": classes[before], "right": before == label},
                    "after": {"label": classes[after], "right": after == label},
                }
            )
        attacks = set(lost.loc[lost["index"] == index, "attack"])
        rows.append(
            {
                "index": int(index),
                "label": classes[label],
                "clean": _png(clean),
                "attacked": attacked,
                "wrong_unattacked": "clean" in attacks,
                "falls_to": [figures[key]["name"] for key in ATTACKS if key in attacks],
            }
        )
    return rows


def _grey_levels(image: npt.NDArray[np.float32]) -> Pixels:
    """An image in [0, 1] as uint8; what lies outside is clipped."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _png(image: Pixels) -> str:
    """A data URI of the image at its own size."""
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    stage.main(run)
