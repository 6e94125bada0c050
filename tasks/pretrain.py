"""Stage `pretrain`: the guidance model, by standard training; with 0 epochs its weights stay random."""

from d2r_core.attacks import Clean
from d2r_core.training.methods import Standard
from d2r_core.training.trainer import BestCheckpoint
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.training.run_training import TrainingJob, run_training


def run(settings: Settings, paths: Paths) -> BestCheckpoint:
    """Train the guidance model and write `models/guidance.safetensors` with its JSON and history."""
    job = TrainingJob(
        stage="pretrain",
        section=settings.pretrain,
        seed=settings.seed,
        method=Standard,
        validation_attacks={"accuracy": Clean()},
        select_by="accuracy",
        weights=paths.guidance,
        history=paths.pretrain_history,
    )
    return run_training(settings, paths, job)


if __name__ == "__main__":
    entry_point.main(run)
