"""What a recipe's state says so far, as Markdown: the training's curve and the accuracies under attack."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_recipe
from gpu_recipe import Recipe

from d2r_core.data import Split
from d2r_core.evaluation.statistics import wilson

GOAL = {"clean": 0.8571, "AutoAttack standard": 0.5248}  # the best published (PreAct)ResNet-18 without extra data

_EPOCHS = {1, 2, 3, 5, 10, 20, 30, 50, 75, 76, 80, 90, 91}  # that the curve shows, besides the best and the last


def of(recipe: Recipe, where: Path, data: Mapping[str, Split]) -> str:
    """The figures that lie in `where`; "" before the first epoch has ended."""
    done = gpu_recipe.epochs(where)
    if not done:
        return ""
    return "\n\n".join(part for part in (_training(recipe, done, data), _attacks(recipe, where)) if part)


def _training(recipe: Recipe, done: list[dict[str, Any]], data: Mapping[str, Split]) -> str:
    best = max(done, key=lambda line: (line["robust_accuracy"], line["epoch"]))
    how = f"{done[-1]['precision']}, {'compiled' if done[-1]['compiled'] else 'eager'}"
    seconds, rate = (statistics.median(line[name] for line in done) for name in ("seconds", "images_per_second"))
    summary = (
        f"Training: {len(done)} of {recipe.epochs} epochs, batch {recipe.batch_size}, {recipe.steps} attack steps, "
        f"seed {recipe.seed}, {how}; {seconds:.1f} s an epoch (median, with validation and "
        f"saved state), its steps alone {len(data['train']) / rate:.1f} s ({rate:.0f} images/s). On "
        f"{len(data['validation'])} validation images epoch {best['epoch']} is the best. "
        f"It took {sum(line['seconds'] for line in done) / 60:.1f} min."
    )
    shown = _EPOCHS | {best["epoch"], done[-1]["epoch"]}
    rows = [
        [f"{line['epoch']}", f"{line['loss']:.3f}", f"{line['clean_accuracy']:.2%}", f"{line['robust_accuracy']:.2%}"]
        for line in done
        if line["epoch"] in shown
    ]
    return f"{summary}\n\n{_table(['epoch', 'loss', 'clean, validation', 'PGD-10, validation'], rows)}"


def _attacks(recipe: Recipe, where: Path) -> str:
    found, rows = gpu_recipe.evaluated(where), []
    for name, shards in found.items():
        images = sum(shard["images"] for shard in shards.values())
        *before, last = next(iter(shards.values()))["stood"]
        whole = f"{name} {recipe.autoattack}" if before else name
        for stage in (*before, last):
            stood = sum(shard["stood"][stage] for shard in shards.values())
            label = whole if stage == last else f"{name}, after {stage}"
            low, high = wilson(stood, images)
            goal = f"{GOAL[label]:.2%}" if label in GOAL else ""
            rows.append([label, f"{stood} of {images}", f"{stood / images:.2%}", f"{low:.2%} to {high:.2%}", goal])
    if not rows:
        return ""
    minutes = sum(shard["seconds"] for shards in found.values() for shard in shards.values()) / 60
    head = ["Linf 8/255, fp32", "test images right", "accuracy", "95 % interval", "goal"]
    return f"{_table(head, rows)}\n\nThe attacks took {minutes:.1f} min."


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
