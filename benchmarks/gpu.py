"""The GPU list: measurements for a rented GPU, in slices that may end at any moment; see gpu.sh."""

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gpu_figures
import gpu_luggage
import gpu_miniature
import gpu_programs
import gpu_recipe
import gpu_results
import torch
from gpu_recipe import Recipe, Stop

from d2r_core.data import Split
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted, stop_requests

CIFAR10 = {
    "cifar10-d2r": ("CIFAR-10, PreActResNet-18, D2R as published", Recipe()),
    "cifar10-d2r-awp-ema": (
        "CIFAR-10, PreActResNet-18, D2R with AWP (0.005 from epoch 11) and averaged weights (EMA 0.999)",
        Recipe(awp_gamma=0.005, average="ema"),
    ),
    "cifar10-trades": ("CIFAR-10, PreActResNet-18, TRADES (beta 6) at the same budget", Recipe(method="trades")),
    "cifar10-wide": (
        "CIFAR-10, WideResNet-34-10, D2R as published, as far as the time went",
        Recipe(target={"name": "wide_resnet", "depth": 34, "widen_factor": 10}),
    ),
}


@dataclass(frozen=True)
class Measurement:
    """`work` goes on until it is done, or raises Interrupted; `figures` says what there is so far ("" for nothing)."""

    key: str
    title: str
    where: Path  # its state
    work: Callable[[Stop, float | None], None]  # why to stop now, and after how many minutes
    figures: Callable[[], str]
    open_ended: bool = False  # its figures count however far it came


def measurements(
    state: Path, data: Mapping[str, Split], prepared: Path, device: torch.device, *, miniature: bool
) -> list[Measurement]:
    """The list, in its order. In miniature it takes the same ways with tiny models and few images."""
    size = ["--batch", "1", "--rounds", "1"] if miniature else ["--batch", "128", "--rounds", "5", "--compile"]
    steps = {
        "GPU tests": ["tests/d2r_core/test_gpu.py"],
        "The step, PreActResNet-18": ["benchmarks/step.py", "--model", "preact_resnet18", *size],
    }
    if not miniature:
        steps["The step, WideResNet-34-10"] = ["benchmarks/step.py", "--model", "wide_resnet", *size]
    short = ["--help"] if miniature else ["--data", str(prepared), "--epochs", "1"]
    precisions = {"One step and a short training": ["benchmarks/precision.py", *short]}
    *trainings, wide = (
        trained(
            key,
            title,
            gpu_miniature.recipe(recipe) if miniature else recipe,
            state,
            data,
            device,
            evaluates=key != "cifar10-wide",
        )
        for key, (title, recipe) in CIFAR10.items()
    )
    return [
        programs("programs", "GPU tests and the step", steps, state),
        *trainings,
        programs("precision", "How far the faster settings are from fp32", precisions, state),
        wide,
    ]


def programs(key: str, title: str, commands: Mapping[str, list[str]], state: Path) -> Measurement:
    """What these programs print."""
    where = state / f"{key}-{gpu_luggage.commit().split()[0]}"
    return Measurement(
        key,
        title,
        where,
        lambda stop, minutes: gpu_programs.run(commands, where, stop),
        lambda: gpu_programs.figures(commands, where),
    )


def trained(
    key: str,
    title: str,
    recipe: Recipe,
    state: Path,
    data: Mapping[str, Split],
    device: torch.device,
    *,
    evaluates: bool,
) -> Measurement:
    """A recipe's training and, if it `evaluates`, its evaluation."""
    where = gpu_recipe.folder(state, key, recipe, data)

    def work(stop: Stop, minutes: float | None) -> None:
        gpu_recipe.train(recipe, data, where, device, minutes)
        if evaluates:
            gpu_recipe.evaluate(recipe, data["test"], where, device, stop)

    return Measurement(key, title, where, work, lambda: gpu_figures.of(recipe, where, data), open_ended=not evaluates)


def due(listed: list[Measurement], finished: Mapping[str, str], commit: str) -> list[Measurement]:
    """What there is to do: what was begun, then what was never measured, then the oldest; each in the list's order.

    Args:
        finished: by key, the commit and its date of the figures that stand.
    """
    waiting = [one for one in listed if one.where.exists() or finished.get(one.key) != commit]
    return sorted(waiting, key=lambda one: (not one.where.exists(), finished.get(one.key, "").rpartition(" ")[2]))


def slice_of(listed: list[Measurement], results: Path, machine: str, minutes: float | None) -> None:
    """Do what is due until the time is up; figures go into `results`.

    Raises:
        Interrupted: something is left.
        UserError: a measurement failed. The others were done before.
    """
    commit, begun, failures = gpu_luggage.commit(), time.monotonic(), []
    with stop_requests(minutes) as stop:
        for one in due(listed, gpu_results.finished(results), commit):
            print(one.title, flush=True)
            left = None if minutes is None else max(0.0, minutes - (time.monotonic() - begun) / 60)
            try:
                one.work(stop, left)
            except Interrupted:
                _report(one, results, machine, commit if one.open_ended else gpu_results.UNFINISHED, commit, "")
                raise
            except UserError as error:  # such as a loss that is not finite: a finding
                _report(one, results, machine, gpu_results.UNFINISHED, commit, f"**Failed**: {error}")
                failures.append(f"{one.title}: {error}")
                continue
            _report(one, results, machine, commit, commit, "")
            finished = one.where.parent / "finished" / one.where.name
            shutil.rmtree(finished, ignore_errors=True)
            finished.parent.mkdir(exist_ok=True)
            one.where.replace(finished)
    if failures:
        raise UserError("\n".join(failures))


def _report(one: Measurement, results: Path, machine: str, stamp: str, commit: str, failure: str) -> None:
    """Write the measurement's block, unless it is unfinished and figures of an older commit stand there."""
    text = "\n\n".join(part for part in (one.figures(), failure) if part)
    unfinished = stamp == gpu_results.UNFINISHED
    if not text or (unfinished and one.key in gpu_results.finished(results)):
        return
    head = f"### {one.title}\n{machine}, commit {commit}.{' Unfinished.' if unfinished else ''}"
    gpu_results.write(results, one.key, stamp, f"{head}\n\n{text}")


def check(data: Mapping[str, Split], folder: Path) -> None:
    """Raise UserError for anything but CIFAR-10, whose name the figures bear."""
    found = tuple(data["test"].images.shape)
    if found != (10000, 3, 32, 32):
        raise UserError(
            f"{folder}: holds {found[0]} test images of {found[-1]} pixels, which is not CIFAR-10. "
            "`d2r use cifar10_preact_resnet18` and `d2r stage prepare` prepare it."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bring", action="store_true", help="pack what a rented machine lacks into .gpu/, and stop")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next slice carries on")
    parser.add_argument("--state", type=Path, default=gpu_luggage.LUGGAGE / "state", help="folder of the state")
    parser.add_argument("--results", type=Path, default=gpu_luggage.ROOT / "docs/results.md", help="where figures go")
    parser.add_argument("--miniature", action="store_true", help="the whole list, tiny, on a CPU")
    arguments = parser.parse_args()
    prepared = gpu_luggage.ROOT / "data/prepared"  # where the project is installed
    try:
        if arguments.bring:
            check(gpu_luggage.data(prepared), prepared)
            gpu_luggage.pack(prepared)
            return
        device = torch.device("cpu" if arguments.miniature else "cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("PyTorch sees no GPU here. `--miniature` tries the list on a CPU.")
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
        if arguments.miniature:
            data = gpu_miniature.data()
        else:
            prepared = gpu_luggage.prepared(prepared)
            data = gpu_luggage.data(prepared)
            check(data, prepared)
        gpu_luggage.provide_autoattack()  # now, not after the first training
        listed = measurements(arguments.state, data, prepared, device, miniature=arguments.miniature)
        slice_of(listed, arguments.results, f"{machine}, torch {torch.__version__}", arguments.minutes)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        sys.exit(130)
    print(f"everything on the list is measured; see {arguments.results}")


if __name__ == "__main__":
    main()
