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
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Failed

from d2r_core.errors import UserError
from flows import summary
from flows.promotion import PromotionResult, promotion
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.pipeline import dvc
from tasks.prefect_tasks import compare, reproduce
from tasks.registry.status import registry_status
from tasks.tracking.errors import UnavailableError


@flow(name="retrain", flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}")
def retrain() -> PromotionResult | State[Any]:
    """Bring every stage up to date, then register the model and apply the gate.

    A model that does not pass the gate does not fail the flow: the champion stays, which is a normal result of a weekly
    run. A UserError fails the flow with one message.
    """
    paths = Paths()
    try:
        settings = settings_file.load(paths.params)
        # Called, not submitted: only in the main thread can a cancellation or timeout interrupt the wait for the stage.
        for stage in dvc.order(paths):
            if stage == "report":
                _compare(settings, paths)
            reproduce.with_options(name=stage, task_run_name=stage)(stage)
        result = promotion(settings, paths)
        create_markdown_artifact(_markdown(settings, paths, result), key="robustness", description="Figures and gate")
    except UserError as error:
        # Returned as a state, it is logged without a traceback; the caller of the flow still gets the exception.
        return Failed(message=str(error), data=error)
    return result


def _compare(settings: Settings, paths: Paths) -> None:
    try:
        compare(settings, paths)
    except UnavailableError as error:
        get_run_logger().warning("The report will not have a new comparison with the champion. %s", error)


def _markdown(settings: Settings, paths: Paths, result: PromotionResult) -> str:
    robustness = RobustnessReport.read(paths.robustness)
    registered = registry_status(settings, paths)
    assert registered is not None, "promotion registers the model"
    return "\n".join(
        [
            f"# {settings.promote.model_name} version {result.version} is @{result.alias}",
            "",
            summary.markdown(robustness),
            "",
            f"Self-checks of the target: {summary.self_checks(robustness)}",
            "",
            f"**Gate {'passed' if result.verdict.passed else 'not passed'}**",
            "",
            *(f"- {reason}" for reason in result.verdict.reasons),
            "",
            *([result.approval.sentence(result.version), ""] if result.approval else []),
            summary.rules_markdown(result.verdict.rules),
            "",
            f"MLflow: {summary.run_link(settings, registered.experiment_id, registered.run_id)}",
        ]
    )


if __name__ == "__main__":
    try:
        retrain()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
