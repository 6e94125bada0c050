"""What the flow `retrain` does where something is to be done: every stage, registration, gate and promotion.

Apart from the flow, because these modules need PyTorch, and a run that finds everything up to date does not.
"""

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows import summary
from flows.promotion import PromotionResult, promotion
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.pipeline import dvc
from tasks.prefect_tasks import compare, reproduce
from tasks.registry.status import registry_status
from tasks.tracking.errors import UnavailableError


def retraining(settings: Settings, paths: Paths) -> PromotionResult:
    """Bring every stage up to date, then register the model and apply the gate. Must be called inside a flow.

    Raises:
        UserError: a stage failed, or MLflow refuses.
    """
    # Called, not submitted: only in the main thread can a cancellation or timeout interrupt the wait for the stage.
    for stage in dvc.order(paths):
        if stage == "report":
            _compare(settings, paths)
        reproduce.with_options(name=stage, task_run_name=stage)(stage)
    result = promotion(settings, paths)
    create_markdown_artifact(_markdown(settings, paths, result), key="robustness", description="Figures and gate")
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
