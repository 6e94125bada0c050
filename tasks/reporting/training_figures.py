"""The trainings as charts of the report: accuracies and losses over the epochs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from tasks.reporting import charts
from tasks.reporting.charts import Series
from tasks.reporting.rendering import percent

_TERMS = {
    "loss": "ink",
    "ce": "soft dashed",
    "logit": "soft dotted",
    "clean": "target dashed",
    "adv": "target",
    "robust": "target",
}


def guidance(history: pd.DataFrame, metadata: Mapping[str, Any]) -> list[Markup]:
    """Accuracy and loss over the epochs of pretraining; none if there was no epoch."""
    if history.empty:
        return []
    axis = charts.epochs(history["epoch"].tolist())
    last = history.iloc[-1]
    accuracy = charts.curves(
        axis,
        [
            Series("training", "soft dashed", history["batch_accuracy"].tolist()),
            Series("validation", "guidance", history["accuracy"].tolist()),
        ],
        scale="percent",
        description=f"Accuracy of the guidance model over {len(history)} epochs: at the end "
        f"{percent(last['batch_accuracy'])} in training and {percent(last['accuracy'])} on the validation split.",
        marked=_best_checkpoint(metadata),
    )
    loss = charts.curves(
        axis,
        [Series("loss", "guidance", history["loss"].tolist())],
        scale="log",
        description=f"Training loss of the guidance model, from {history['loss'].iloc[0]:.3g} to {last['loss']:.3g}.",
    )
    return [accuracy, loss]


def target(history: pd.DataFrame, metadata: Mapping[str, Any]) -> list[Markup]:
    """Validation accuracies with the epoch of the best checkpoint, and the terms of the loss."""
    axis = charts.epochs(history["epoch"].tolist())
    best, last = metadata["metrics"], history.iloc[-1]
    accuracy = charts.curves(
        axis,
        [
            Series("clean", "target dashed", history["clean_accuracy"].tolist()),
            Series("robust", "target", history["robust_accuracy"].tolist()),
        ],
        scale="percent",
        description=f"Validation accuracy of the target model over {len(history)} epochs; the best checkpoint is of "
        f"epoch {best['epoch']}, with {percent(best['clean_accuracy'])} clean and {percent(best['robust_accuracy'])} "
        "robust.",
        marked=_best_checkpoint(metadata),
    )
    styles = {term: style for term, style in _TERMS.items() if term in history}
    loss = charts.curves(
        axis,
        [Series(term, style, history[term].tolist()) for term, style in styles.items()],
        scale="log",
        description="Training loss and its terms; at the last epoch "
        + ", ".join(f"{term} {last[term]:.3g}" for term in styles)
        + ".",
    )
    return [accuracy, loss]


def _best_checkpoint(metadata: Mapping[str, Any]) -> tuple[int, str] | None:
    epoch = metadata["metrics"].get("epoch")
    return None if epoch is None else (epoch, f"best checkpoint: epoch {epoch}")
