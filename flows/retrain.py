"""The flow `retrain`: every stage of `dvc.yaml` as one Prefect task, then registration, gate and promotion.

DVC decides what is up to date, so Prefect's own caching is disabled. The project is the current folder.
"""

import os
import sys

# Read when Prefect is imported; variables set by the user take precedence. A fresh PREFECT_HOME needs over 20 seconds.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from datetime import datetime
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.pipeline.dvc import BusyError
from tasks.registry.status import RegistryStatus, finished
from tasks.tracking.errors import UnavailableError

if TYPE_CHECKING:
    from flows.promotion import PromotionResult


@flow(name="retrain", flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}")
def retrain() -> "PromotionResult | State[Any]":
    """Bring every stage up to date, then register the model and apply the gate; nothing, if there is nothing to do.

    A model that does not pass the gate does not fail the flow: the champion stays, which is a normal result of a weekly
    run. A UserError fails the flow with one message.
    """
    paths = Paths()
    try:
        settings = settings_file.load(paths.params)
        if registered := _finished(settings, paths):
            aliases = " ".join(f"@{alias}" for alias in registered.aliases)
            version = f"{settings.promote.model_name} version {registered.version} {aliases}".rstrip()
            return Completed(message=f"Everything is up to date: {version}.")
        # Here, because it needs PyTorch, whose import takes longer than a run with nothing to do.
        from flows.retraining import retraining

        return retraining(settings, paths)
    except UserError as error:
        # Returned as a state, it is logged without a traceback; the caller of the flow still gets the exception.
        return Failed(message=str(error), data=error)


def _finished(settings: Settings, paths: Paths) -> RegistryStatus | None:
    try:
        return finished(settings, paths)
    except (BusyError, UnavailableError):  # the tasks of the stages and of the registry try again
        return None


if __name__ == "__main__":
    try:
        retrain()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
