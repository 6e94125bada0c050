"""Stage `pretrain`: the guidance model, by standard training; with 0 epochs it keeps its random weights."""

from d2r_core.attacks import Clean
from d2r_core.training.methods import Standard
from d2r_core.training.trainer import Kept
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.training import run_training


def run(settings: Settings, paths: Paths) -> Kept:
    """Train the guidance model and write `models/guidance.safetensors` with its JSON and history."""
    section = settings.pretrain
    return run_training.fit_and_save(
        settings,
        paths,
        stage="pretrain",
        architecture=section.architecture.model_dump(),
        objective=Standard,
        criteria={"accuracy": Clean()},
        section=section,
        epochs=section.epochs,
        seed=settings.seed,
        weights=paths.guidance,
        history=paths.pretrain_history,
    )


if __name__ == "__main__":
    entry_point.main(run)
