"""D2R beside its baselines and with each of its options: same images, budget, augmentation and evaluation.

    PYTHONPATH=. python benchmarks/study.py --data ../shared/data --minutes 30
        one slice; repeat it until everything is measured. A second process may work at the same folder
    PYTHONPATH=. python benchmarks/study.py --write
        writes the table into docs/results.md, and all figures beside it into study.json

CIFAR-10 as zip archives of train/<class>/<image> and test/<class>/<image>: 3,000 images to train, WideResNet-10-2, 5
epochs; 1,000 test images. Learning rate, schedule and weight decay of each method come from the same small search on
the validation split. Each training is an MLflow run of the folder's own database. Exit codes: 0 everything is measured,
130 stopped with something left, 1 something is missing, with a message.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import study_table
import study_training
from study_cells import CELLS, ROOT, SEEDS, Study, similar
from study_training import BusyError

from d2r_core import files
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted

_ARCHIVES = "cifar10-*.zip"


def link_archives(study: Study, data: Path) -> None:
    """Make the study's raw data: links to CIFAR-10's archives. Raises UserError without any."""
    raw = study.folder / "raw"
    archives = sorted(data.glob(_ARCHIVES))
    if not archives and not list(raw.glob(_ARCHIVES)):
        raise UserError(f"{data}: has no {_ARCHIVES} with train/<class>/<image> and test/<class>/<image>.")
    raw.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        if not (raw / archive.name).exists():
            (raw / archive.name).symlink_to(archive.resolve())


def read_results(study: Study) -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured so far: cell -> seed -> result."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((study.folder / "cells").glob("*.json")):
        key, _, seed = path.stem.rpartition("-seed")
        if key in CELLS:
            results.setdefault(key, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return {key: results[key] for key in CELLS if key in results}


def run_slice(study: Study, keys: Sequence[str], end: float) -> None:
    """Measure these cells with the first seed, then the close ones with all seeds.

    Raises Interrupted if something is left, at `end` or because other processes work at it.
    """
    busy = [key for key in keys if not _measure(study, key, SEEDS[0], end)]
    accuracies = {
        key: run["accuracies"]["autoattack"]["accuracy"]
        for key, by_seed in read_results(study).items()
        if "accuracies" in (run := by_seed[str(SEEDS[0])])
    }
    for key in similar(accuracies):
        if key in keys:
            busy += [key for seed in SEEDS[1:] if not _measure(study, key, seed, end)]
    if busy:
        raise Interrupted(f"another process works at {', '.join(dict.fromkeys(busy))}.")


def _measure(study: Study, key: str, seed: int, end: float) -> bool:
    """Whether the cell is measured now. Raises Interrupted at `end`."""
    result_file = study.folder / f"cells/{key}-seed{seed}.json"
    if result_file.exists():
        return True
    if time.monotonic() >= end:
        raise Interrupted("the time is over: run it again to continue.")
    print(f"{CELLS[key].title}, seed {seed}", flush=True)
    try:
        result = study_training.measure(study, key, seed, end)
    except BusyError:
        return False
    files.write_text(result_file, json.dumps({**result, "title": CELLS[key].title}, indent=1) + "\n")
    return True


def describe(study: Study) -> str:
    """The list of all cells and what is measured."""
    results = read_results(study)
    lines = [f"{'cell':24}{'seeds':10}title"]
    for key, cell in CELLS.items():
        seeds = ", ".join(sorted(results.get(key, {}))) or "-"
        lines.append(f"{key:24}{seeds:10}{cell.title}")
    return "\n".join(lines)


def report(study: Study) -> str:
    """The figures so far, as Markdown."""
    results = read_results(study)
    gradients = {}
    for key in results:
        choice = results[key][str(SEEDS[0])]["choice"]
        path = study_training.run_folder(study, study.settings(key, **choice)) / "gradients.jsonl"
        if CELLS[key].gradients and path.exists():
            gradients[key] = path
    commits = sorted({run["commit"][:7] for by_seed in results.values() for run in by_seed.values() if "commit" in run})
    return study_table.text(results, gradients, _conditions(study, len(results), commits))


def _conditions(study: Study, measured: int, commits: Sequence[str]) -> str:
    settings = study.settings("d2r")
    train, evaluate = settings.train, settings.evaluate
    return (
        f"{settings.prepare.train_per_class} training images a class, {train.epochs} epochs, batch {train.batch_size}, "
        f"Linf eps {train.eps} with {train.steps} steps; the epoch that is best under PGD-10 on the validation split; "
        f"fp32, one CPU thread; attacked at {evaluate.eps:.4f}. Rows without a method's name are changes of D2R with a "
        "pretrained guidance. In parentheses Wilson's 95 % interval of one seed, in brackets the range of several. "
        f"{measured} of {len(CELLS)} cells; commit {', '.join(commits) or 'none'}.\n"
    )


def _json(study: Study) -> str:
    return json.dumps(read_results(study), indent=1) + "\n"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped: run it again to continue.")


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return output.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of cifar10-*.zip")
    parser.add_argument("--folder", type=Path, default=ROOT / "state/study", help="everything that the study makes")
    parser.add_argument("--minutes", type=float, help="stop after this time; the next slice continues")
    parser.add_argument("--only", action="append", choices=CELLS, metavar="CELL", help="this cell; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the cells and what is measured, and stop")
    parser.add_argument("--write", action="store_true", help="write what is measured to the project, and stop")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results.md", help="where --write puts the table")
    parser.add_argument("--miniature", action="store_true", help="tiny networks on scikit-learn's digits")
    arguments = parser.parse_args()
    study = Study(arguments.folder, arguments.miniature)
    if arguments.list:
        print(describe(study))
        return
    if arguments.write:
        study_table.write(arguments.results, report(study))
        files.write_text(arguments.results.with_name("study.json"), _json(study))
        return
    os.environ.setdefault("D2R_GIT_COMMIT", _commit())  # the stages run outside the checkout
    signal.signal(signal.SIGTERM, _interrupt)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    try:
        if not arguments.miniature:
            link_archives(study, arguments.data)
        run_slice(study, arguments.only or list(CELLS), end)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        sys.exit(130)
    finally:
        files.write_text(study.folder / "results.json", _json(study))
    print(report(study))


if __name__ == "__main__":
    main()
