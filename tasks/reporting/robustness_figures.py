"""What the report says of robustness.json, in rows and charts: attacks, self-checks, curves, classes, confusions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tasks.reporting import charts
from tasks.reporting.charts import Mark, Series
from tasks.reporting.rendering import distance, interval, percent

MODELS = ("target", "guidance")
# The attacks in the order of the report's rows, each with what a reader must know about it.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one signed gradient step",
    "pgd": "projected gradient descent on the cross-entropy, from a random start",
    "cw": "the same on the margin of the logits",
    "autoattack": "each stage attacks what the one before left standing",
    "worst": "right only if right in every row that stands on all test images",
}
# What each self-check asks, for those who have no more than this page.
CHECKS = {
    "more_steps": "Where the gradients lead to errors, a longer search finds at least what a shorter one does.",
    "large_eps": "Within a large enough distance lies an image of another class; what still stands was not searched.",
    "black_box": "Square asks for answers alone; if it beats PGD, the gradients that PGD follows are misleading.",
    "transfer": "Images made against another model must not fool this one better than its own gradients do.",
    "losses": "If one of the two losses fools far more images, the other one's gradients were bent or scaled away.",
    "gradients": "Where the loss is flat or not a number, every attack that follows gradients is blind.",
    "noise": "A random step of the same size is a feeble attack; if it beats a small PGD, then PGD is broken.",
    "logits": "Of probabilities or saturated scores the gradients vanish, and robustness is only apparent.",
    "eval_mode": "Answers that change from call to call make a moving target, not a robust model.",
    "perturbation": "Re-measured in double precision from the saved images: no attack has cheated.",
}
_STYLES = {"target": "target", "guidance": "guidance dashed"}
_MATRIX = 20  # classes; of more than these, the most frequent confusions are listed instead
_FREQUENT = (8, 20)  # confusions listed beside the matrix, and without it


def attacks(robustness: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per attack: its figures by model, their plot, and `everywhere`: whether it met all test images."""
    figures = {name: found["attacks"] for name, found in robustness["models"].items()}
    keys = [key for key in ATTACKS if key in figures["target"]]
    assert all(set(keys) == set(found) for found in figures.values()), "an attack that ATTACKS does not describe"
    return [
        {
            "key": key,
            "note": ATTACKS[key],
            **figures["target"][key],
            "everywhere": figures["target"][key]["images"] == robustness["data"]["test_images"],
            "figures": {name: found[key] for name, found in figures.items()},
            "plot": charts.strip(
                [
                    Mark("dot" if name == "target" else "ring", name, found[key]["accuracy"], found[key]["interval"])
                    for name, found in sorted(figures.items())
                ]
            ),
        }
        for key in keys
    ]


def checks(robustness: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Counter[bool | None]]]:
    """Every self-check with what it found of each model; and how many each model passed, failed, was not asked."""
    models = robustness["models"]
    rows = [
        {**check, "asks": CHECKS[check["key"]], "results": {name: found["checks"][i] for name, found in models.items()}}
        for i, check in enumerate(models["target"]["checks"])
    ]
    return rows, {name: Counter(check["passed"] for check in found["checks"]) for name, found in models.items()}


def curves(robustness: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Robust accuracy against eps and against the number of steps: the chart, and its figures as rows."""
    norm, pgd = robustness["norm"].replace("inf", "∞"), robustness["models"]["target"]["attacks"]["pgd"]
    return [
        _curve(robustness, "eps", norm, (pgd["eps"], f"the attacks above: {pgd['eps']:.4g}")),
        _curve(robustness, "steps", norm, (pgd["steps"], f"the attacks above: {pgd['steps']}")),
    ]


def _curve(robustness: Mapping[str, Any], key: str, norm: str, marked: tuple[float, str]) -> dict[str, Any]:
    measured = {
        name: {point[key]: point for point in robustness["models"][name]["curves"][key]}
        for name in MODELS
        if name in robustness["models"]
    }
    places = sorted(set().union(*measured.values()))
    # A curve against eps ends where nothing stands, and nothing does at any larger eps.
    found = {name: [points.get(place, points[max(points)]) for place in places] for name, points in measured.items()}
    series = [
        Series(name, _STYLES[name], [p["accuracy"] for p in points], [p["interval"] for p in points])
        for name, points in found.items()
    ]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{percent(p['accuracy'])} at {place:.4g}" for place, p in points.items())
        for name, points in measured.items()
    )
    axis = charts.radii(places, norm) if key == "eps" else charts.steps(places)
    return {
        "key": key,
        "images": next(iter(measured["target"].values()))["images"],
        "chart": charts.curves(
            axis,
            series,
            scale="percent",
            description=f"Accuracy under PGD against {axis.title}. {said}.",
            marked=marked,
        ),
        "rows": [
            {
                "place": place,
                "text": distance(place) if key == "eps" else str(place),
                "points": {name: points[i] for name, points in found.items()},
            }
            for i, place in enumerate(places)
        ],
    }


def per_class(robustness: Mapping[str, Any], images: Sequence[int]) -> list[dict[str, Any]]:
    """One row per class: its name, its test images, and the target's accuracies.

    Args:
        images: test images of each class.
    """
    figures = robustness["models"]["target"]["attacks"]
    rows = []
    for index, (label, count) in enumerate(zip(robustness["data"]["classes"], images, strict=True)):
        shares = {key: figures[key]["per_class"][index] for key in ("clean", "pgd", "worst")}
        marks = [
            Mark("bar", "clean", shares["clean"]),
            Mark("bar", "worst", shares["worst"]),
            Mark("tick", "pgd", shares["pgd"]),
        ]
        rows.append({"label": label, "images": count, **shares, "plot": charts.strip(marks)})
    return rows


def confusion(robustness: Mapping[str, Any]) -> dict[str, Any]:
    """What the target says under attack.

    Returns:
        `attack`, `matrix` (rows of label and cells, each with count, share of its row, and whether it is right; empty
        if there are too many classes) and `frequent` (the most frequent confusions: label, prediction, count, share).
    """
    target, classes = robustness["models"]["target"], robustness["data"]["classes"]
    counts = target["confusion"]["counts"]
    rows = [
        {
            "label": classes[label],
            "cells": [
                {"count": count, "share": count / max(1, sum(row)), "right": prediction == label}
                for prediction, count in enumerate(row)
            ],
        }
        for label, row in enumerate(counts)
    ]
    wrong = [
        {"label": row["label"], "prediction": classes[prediction], **cell}
        for row in rows
        for prediction, cell in enumerate(row["cells"])
        if cell["count"] and not cell["right"]
    ]
    few = len(classes) <= _MATRIX
    return {
        "attack": target["attacks"][target["confusion"]["attack"]],
        "matrix": rows if few else [],
        "frequent": sorted(wrong, key=lambda cell: -cell["count"])[: _FREQUENT[0 if few else 1]],
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The target's few figures that say most, each with its interval."""
    return [
        {
            **row,
            "plot": charts.strip([Mark("dot", "target", row["accuracy"], row["interval"])]),
            "said": f"{percent(row['accuracy'])} ({interval(row['interval'])})",
        }
        for row in rows
        if row["key"] in ("clean", "pgd", "autoattack", "worst")
    ]


def differences(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per attack that both models met on the same images, with a plot of the difference."""
    found = [{"key": key, **comparison["attacks"][key]} for key in ATTACKS if key in comparison["attacks"]]
    reach = max((abs(bound) for row in found for bound in row["interval"]), default=0.0) or 1.0
    return [
        {**row, "plot": Markup(charts.difference(row["difference"], row["interval"], 1.1 * reach))} for row in found
    ]
