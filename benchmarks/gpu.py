"""Measurements on a GPU machine, in slices that may end at any moment; the figures go into docs/results.md.

    PYTHONPATH=. python benchmarks/gpu.py --pack
        where the project is installed: writes what the GPU machine lacks into .gpu/1, .gpu/2, ..., each below 64 MiB
    PYTHONPATH=. python benchmarks/gpu.py --minutes 9
        on the GPU machine, in a checkout with .gpu: one slice. Repeat it until everything is measured; then copy
        docs/results.md back

It needs PyTorch 2.11 or later, torchvision, numpy and safetensors. Finished epochs
and attacked batches lie in .gpu/state, so an interruption costs minutes at most. `--miniature` does the same with a
tiny network on a CPU. Exit codes: 0 everything is measured, 130 stopped with something left, 1 something is missing or
failed, with a message.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import gpu_bundle
import gpu_training
import torch
from gpu_training import Recipe, StopReason

from d2r_core import files
from d2r_core.data import Split, content_hash
from d2r_core.errors import UserError
from d2r_core.interruption import Interrupted, stop_requests
from d2r_core.training.config import Averaging, WeightPerturbation

ROOT = Path(__file__).parents[1]
NEVER, UNFINISHED = "never", "unfinished"  # in docs/results.md, in the place of the commit and its date

CLIPPED = Recipe().with_training(gradient_clip=1.0)
TRAININGS = {
    "cifar10-d2r": ("CIFAR-10, PreActResNet-18, D2R as published", Recipe()),
    "cifar10-d2r-clip": ("CIFAR-10, PreActResNet-18, D2R with gradient_clip 1.0", CLIPPED),
    "cifar10-d2r-awp-ema": (
        "CIFAR-10, PreActResNet-18, D2R with gradient_clip 1.0, AWP (0.005) and EMA (0.999)",
        CLIPPED.with_training(
            weight_perturbation=WeightPerturbation(gamma=0.005, from_epoch=11), averaging=Averaging(name="ema")
        ),
    ),
    "cifar10-trades": ("CIFAR-10, PreActResNet-18, TRADES (beta 6)", Recipe(method="trades")),
    "cifar10-wide": (
        "CIFAR-10, WideResNet-34-10, D2R with gradient_clip 1.0, without evaluation",
        dataclasses.replace(CLIPPED, target={"name": "wide_resnet", "depth": 34, "widen_factor": 10}, autoattack=None),
    ),
}
PROGRAMS = {
    "tests": ("GPU tests", ["tests/d2r_core/test_gpu.py"]),
    "step": ("The step, PreActResNet-18", ["benchmarks/step.py", "--batch", "128", "--rounds", "5", "--compile"]),
    "step-wide": (
        "The step, WideResNet-34-10",
        ["benchmarks/step.py", "--model", "wide_resnet", "--batch", "128", "--rounds", "5", "--compile"],
    ),
    "precision": (
        "How far the faster settings are from fp32",
        ["benchmarks/precision.py", "--epochs", "1", "--data", "{data}"],
    ),
}
TITLES = {key: title for key, (title, _) in (PROGRAMS | TRAININGS).items()}


def run_program(arguments: list[str], folder: Path, stop_reason: StopReason) -> None:
    """Run a program of this project and write what it prints; one that fails is noted with its last line.

    Raises Interrupted: it is ended, and starts anew in the next slice.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("w+") as output:
        command = [sys.executable, *(argument.format(data=_prepared()) for argument in arguments)]
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                if reason := stop_reason():
                    raise Interrupted(f"{reason}; {arguments[0]} starts anew when this is run again.")
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0)
        text = output.read().strip()
    if child.returncode:
        text = f"**Failed** (exit code {child.returncode}): `{text.splitlines()[-1][:300] if text else 'no output'}`"
    files.write_text(folder / "figures.md", text + "\n")


def _prepared() -> Path:
    return gpu_bundle.prepared_folder(ROOT / "data/prepared")


def stamps(results: Path) -> dict[str, str]:
    """By measurement, the commit and its date that its figures belong to; those without are absent."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    blocks = re.findall(r"^<!-- gpu:(\S+) (.*?) -->$", text, re.MULTILINE)
    return {key: stamp for key, stamp in blocks if stamp not in (NEVER, UNFINISHED)}


def write_block(results: Path, key: str, stamp: str, block: str) -> None:
    """Replace the measurement's block, or append it; the rest of the file stays byte for byte."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    block = f"<!-- gpu:{key} {stamp} -->\n{block.strip()}\n<!-- /gpu:{key} -->\n"
    old = re.compile(rf"^<!-- gpu:{re.escape(key)} .*?^<!-- /gpu:{re.escape(key)} -->\n", re.DOTALL | re.MULTILINE)
    text = old.sub(lambda match: block, text, count=1) if old.search(text) else f"{text.rstrip()}\n\n{block}".lstrip()
    files.write_text(results, text)


def measure(
    key: str, data: Mapping[str, Split], folder: Path, device: torch.device, stop_reason: StopReason, end: float
) -> None:
    """Do what is left of one measurement. Raises Interrupted; UserError if it failed, such as a non-finite loss."""
    if key in PROGRAMS:
        run_program(PROGRAMS[key][1], folder, stop_reason)
        return
    recipe = recipes(device)[key]
    gpu_training.train(recipe, data, folder, device, max(0.0, end - time.monotonic()) / 60)
    if recipe.autoattack:
        gpu_training.evaluate(recipe, data["test"], folder, device, stop_reason)


def figures(key: str, data: Mapping[str, Split], folder: Path, device: torch.device) -> str:
    """The measurement's figures so far, as Markdown; "" without any."""
    if key in PROGRAMS:
        path = folder / "figures.md"
        return path.read_text(encoding="utf-8") if path.exists() else ""
    return gpu_training.figures(recipes(device)[key], folder, len(data["test"]))


def recipes(device: torch.device) -> dict[str, Recipe]:
    """The trainings; on a CPU in miniature."""
    listed = {key: recipe for key, (_, recipe) in TRAININGS.items()}
    return listed if device.type == "cuda" else {k: gpu_training.in_miniature(recipe) for k, recipe in listed.items()}


def state_folder(state: Path, key: str, data: Mapping[str, Split], device: torch.device) -> Path:
    """Where the measurement's state lies, named after all that it depends on: another state is never continued."""
    code = files.code_fingerprint("d2r_core", "benchmarks", "tasks/evaluation/autoattack.py")
    parts = [dataclasses.asdict(recipes(device)[key]) if key in TRAININGS else PROGRAMS[key], content_hash(data), code]
    return state / f"{key}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def due(folders: Mapping[str, Path], measured: Mapping[str, str], commit: str) -> list[str]:
    """What there is to measure: what was begun, then what never was measured, then the oldest; in the list's order.

    Args:
        measured: by key, the commit and its date of the figures in docs/results.md.
    """
    waiting = [key for key in folders if measured.get(key) != commit]
    return sorted(waiting, key=lambda key: (not folders[key].exists(), measured.get(key, "").rpartition(" ")[2]))


def run_slice(data: Mapping[str, Split], arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure what is due until the time is up.

    Raises:
        Interrupted: something is left.
        UserError: a measurement failed; the others were done.
    """
    commit, failures = gpu_bundle.commit(), []
    end = time.monotonic() + 60 * (arguments.minutes or 1e6)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = f"{name}, torch {torch.__version__}"
    keys = TITLES if device.type == "cuda" else TRAININGS
    folders = {key: state_folder(arguments.state, key, data, device) for key in keys}
    with stop_requests(arguments.minutes) as stop_reason:
        for key in due(folders, stamps(arguments.results), commit):
            print(TITLES[key], flush=True)
            stamp, failure = UNFINISHED, ""
            try:
                if reason := stop_reason():
                    raise Interrupted(f"{reason}; run it again to continue.")
                measure(key, data, folders[key], device, stop_reason, end)
                stamp = commit
            except UserError as error:  # a finding, and not one that waiting mends
                stamp, failure = commit, f"**Failed**: {error}"
                failures.append(f"{TITLES[key]}: {error}")
            finally:
                text = "\n\n".join(part for part in (figures(key, data, folders[key], device), failure) if part)
                if text and (stamp == commit or key not in stamps(arguments.results)):
                    note = " Unfinished." if stamp == UNFINISHED else ""
                    head = f"### {TITLES[key]}\n{machine}, commit {commit}.{note}"
                    write_block(arguments.results, key, stamp, f"{head}\n\n{text}")
    if failures:
        raise UserError("\n".join(failures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", action="store_true", help="write what a GPU machine lacks into .gpu/, and stop")
    parser.add_argument("--minutes", type=float, help="stop after this time; the next slice continues")
    parser.add_argument("--state", type=Path, default=gpu_bundle.FOLDER / "state", help="folder of unfinished work")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results.md", help="file of the figures")
    parser.add_argument("--miniature", action="store_true", help="the trainings with a tiny network, on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.miniature else "cuda")
    try:
        if arguments.pack:
            gpu_bundle.pack(ROOT / "data/prepared")
            return
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("PyTorch sees no GPU here. `--miniature` tries the trainings on a CPU.")
        data = gpu_bundle.miniature() if arguments.miniature else gpu_bundle.cifar10(_prepared())
        gpu_bundle.provide_autoattack()
        run_slice(data, arguments, device)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        sys.exit(130)
    print(f"everything on the list is measured; see {arguments.results}")


if __name__ == "__main__":
    main()
