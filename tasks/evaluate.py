"""Stage `evaluate`: both models under attack on the test images; writes the figures that gate and report read."""

import json
from datetime import timedelta

from d2r_core import checkpoint, distributed, files, runtime
from d2r_core.data import load_split
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.evaluation import evaluate_models
from tasks.evaluation.evaluate_models import EvaluationSetup, LoadedModel

_PATIENCE = timedelta(days=1)  # of a process whose own batches are done: one of AutoAttack takes hours on a CPU


def run(settings: Settings, paths: Paths) -> dict[str, dict[str, float]]:
    """Evaluate target and guidance model; write robustness.json, metrics.json, examples.parquet and the gallery.

    Run again after an interruption, it continues. Under torchrun every process takes its share; the first one writes.
    """
    manifest = read_manifest(paths)
    device = runtime.device(settings.runtime.device)
    setup = EvaluationSetup(
        test=load_split(paths.prepared / "test.safetensors"),
        source=manifest["source"],
        classes=manifest["classes"],
        data_hash=manifest["hash"],
        settings=settings.evaluate,
        seed=settings.seed,
        cache_root=paths.state,
    )
    with distributed.process_group(device, timeout=_PATIENCE):
        models = {
            name: LoadedModel(*checkpoint.load(path, device))
            for name, path in (("guidance", paths.guidance), ("target", paths.target))
        }
        result = evaluate_models.evaluate_models(models, setup)
        metrics = result.accuracies()
        if distributed.rank() == 0:
            result.robustness["settings_hash"] = settings.hash("seed", "evaluate")
            result.write(paths.reports)
            files.write_text(paths.metrics, json.dumps(metrics, indent=2) + "\n")
            evaluate_models.clear_cache(models, setup)
            for name, accuracies in metrics.items():
                print(f"{name}: {', '.join(f'{key} {value:.2%}' for key, value in accuracies.items())}", flush=True)
    return metrics


if __name__ == "__main__":
    entry_point.main(run)
