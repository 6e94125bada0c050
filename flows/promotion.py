"""The end of a retraining: registers the evaluated model, applies the gate, and makes it champion if it passes.

Where `promote.approval` is manual, a person decides about a version that passed.

These are side effects, so they are Prefect tasks and not DVC stages, which DVC would skip when cached.
"""

from typing import Literal, NamedTuple

from flows.approval import promote_if_approved
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.prefect_tasks import gate, promote, register
from tasks.registry import versions
from tasks.registry.decision import Approval
from tasks.registry.gate import Verdict


class PromotionResult(NamedTuple):
    """A registered version, its final alias, the verdict of the gate, and what a person decided if one was asked."""

    version: int
    alias: Literal["champion", "challenger"]
    verdict: Verdict
    approval: Approval | None = None


def promotion(settings: Settings, paths: Paths) -> PromotionResult:
    """Register the evaluated model as @challenger, apply the gate, and move @champion to it if it passes.

    Must be called inside a flow. A model that does not pass, whose version is on hold, or that nobody approves, is a
    result, not an error.
    """
    version = register(settings, paths)
    verdict = gate(settings, paths, version)
    approval = None
    if verdict.passed and settings.promote.approval == "manual":
        verdict, approval = promote_if_approved(settings, paths, version, verdict)
    elif verdict.passed:
        verdict = promote(settings, paths, version, verdict)
    champion = versions.champion(settings, paths)
    alias: Literal["champion", "challenger"] = "champion" if champion == version else "challenger"
    return PromotionResult(version, alias, verdict, approval)
