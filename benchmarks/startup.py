"""How long each way into the project takes before it does any work, on a finished project with little data.

    python benchmarks/startup.py [--repeats 5] [--checkout ANOTHER ...] [--only TEXT]

Each checkout (this one, and those given) is cloned, and its pipeline runs once with tiny settings. The doors are then
measured in turns, a checkout after the other, so that what else the machine does hits them alike. Wall time depends on
it; CPU time, of the process and all the processes that it waited for, hardly does. Medians are what counts.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "validate", "pretrain", "train", "evaluate", "report")
TIMEOUT = 600.0  # seconds

# A training up to its first step: the end of the process comes instead.
START_OF_TRAINING = """
import os
from d2r_core.training.trainer import Trainer
from tasks.config import entry_point
from tasks.train import run
Trainer.fit = lambda *arguments: os._exit(0)
entry_point.main(run)
"""
ALIASES = """
from tasks.config import settings
from tasks.config.paths import Paths
from tasks.registry.status import aliases
paths = Paths()
assert set(aliases(settings.load(paths.params), paths)) >= {"challenger"}
"""


@dataclass(frozen=True)
class Cost:
    """Seconds that a door took."""

    wall: float
    cpu: float


Door = Callable[[Path], Cost]  # measured in a project
D2R = ("-c", "from flows.cli import main; main()")


def tiny_settings(file: Path) -> None:
    """Reduce a `params.yaml` to what runs in seconds."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["prepare"].update(train_per_class=12, test_per_class=4)
    values["pretrain"].update(architecture={"name": "resnet18", "width": 4, "strides": [1, 2, 2, 2]}, epochs=1)
    values["train"].update(epochs=1, steps=2, batch_size=32)
    values["evaluate"].update(steps=2, autoattack_images=0, check_images=20)
    values["promote"].update(min_clean_accuracy=0.0, min_robust_accuracy=0.0, onnx=False)
    values["validate"].update(min_images_per_class=1)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")


def environment(project: Path, **variables: str) -> dict[str, str]:
    """A Prefect of the project's own, no server but those named, and one thread."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return own | {
        "OMP_NUM_THREADS": "1",
        "PREFECT_HOME": str(project / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        **variables,
    }


def python(project: Path, *arguments: str, **variables: str) -> Cost:
    """The cost of `python ARGUMENTS` in the project, with these variables.

    Raises:
        RuntimeError: it failed; contains its output.
    """
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=project,
            env=environment(project, **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        cost = Cost(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(f"{arguments} ended with {child.returncode}:\n{output.read().decode()}")
    return cost


@contextmanager
def prefect_server(project: Path) -> Iterator[tuple[str, float]]:
    """A Prefect server on localhost: its address, and the seconds until it answered."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        cwd=project,
        env=environment(project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/api"
        while not answers(f"{url}/health"):
            if time.perf_counter() - begin > TIMEOUT:
                raise RuntimeError("Prefect's server does not start")
            time.sleep(0.05)
        yield url, time.perf_counter() - begin
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
    return False


def server_start(project: Path) -> Cost:
    """Prefect's server until it answers; of CPU time, what it takes until it has ended."""
    before = os.times()
    with prefect_server(project) as (_, wall):
        pass
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Cost(wall, cpu)


def scheduled_flow(project: Path) -> Cost:
    """The flow as a worker starts it, beside a server that is up."""
    with prefect_server(project) as (url, _):
        return python(project, "-m", "flows.retrain", PREFECT_API_URL=url)


def doors() -> dict[str, Door]:
    """Every door by its name in the table."""

    def door(*arguments: str) -> Door:
        return lambda project: python(project, *arguments)

    return {
        "`d2r status`": door(*D2R, "status"),
        "`d2r run`, nothing to do": door(*D2R, "run"),
        "scheduled flow, nothing to do": scheduled_flow,
        "Prefect's server until it answers": server_start,
        "MLflow's store for the aliases": door("-c", ALIASES),
        "`import torch`": door("-c", "import torch"),
        "`import mlflow`": door("-c", "import mlflow"),
        **{f"`import tasks.{stage}`": door("-c", f"import tasks.{stage}") for stage in STAGES},
        "stage train up to its first step": door("-c", START_OF_TRAINING),
        **{f"stage {stage}, tiny data": door("-m", f"tasks.{stage}") for stage in STAGES},
    }


def finished_project(checkout: Path, folder: Path) -> Path:
    """A clone of the checkout in which the pipeline has run."""
    subprocess.run(["git", "clone", "--quiet", str(checkout), str(folder)], check=True)
    tiny_settings(folder / "params.yaml")
    python(folder, *D2R, "run")
    return folder


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def row(name: str, costs: dict[str, list[Cost]]) -> str:
    cells = []
    for measured in costs.values():
        for values in ([cost.wall for cost in measured], [cost.cpu for cost in measured]):
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the start of everything that starts.")
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="another one, beside this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="doors with this text in their name")
    options = parser.parse_args()
    checkouts = {commit_of(checkout): checkout for checkout in (*options.checkout, ROOT)}
    with tempfile.TemporaryDirectory() as temporary:
        projects = {name: finished_project(checkout, Path(temporary) / name) for name, checkout in checkouts.items()}
        print(
            f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}, seconds\n"
        )
        print(f"| door | {' | '.join(f'{name}, wall | {name}, CPU' for name in projects)} |")
        print(f"|---|{'---|' * 2 * len(projects)}")
        for name, door in doors().items():
            if options.only not in name:
                continue
            costs: dict[str, list[Cost]] = {each: [] for each in projects}
            for _ in range(options.repeats):
                for each, project in projects.items():
                    costs[each].append(door(project))
            print(row(name, costs), flush=True)


if __name__ == "__main__":
    main()
