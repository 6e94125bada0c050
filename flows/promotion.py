"""The end of a retraining: registers the evaluated model, applies the gate, and makes it champion if it passes.

These are side effects, so they are Prefect tasks and not DVC stages, which DVC would skip when cached.
"""

from typing import Literal, NamedTuple

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.prefect_tasks import gate, promote, register
from tasks.registry import versions
from tasks.registry.gate import Verdict


class PromotionResult(NamedTuple):
    """A registered version, its final alias, and the verdict of the gate."""

    version: int
    alias: Literal["champion", "challenger"]
    verdict: Verdict


def promotion(settings: Settings, paths: Paths) -> PromotionResult:
    """Register the evaluated model as @challenger, apply the gate, and move @champion to it if it passes.

    Must be called inside a flow. A model that does not pass, or whose version is on hold, is a result, not an error.
    """
    version = register(settings, paths)
    verdict = gate(settings, paths, version)
    if verdict.passed:
        verdict = promote(settings, paths, version, verdict)
    alias: Literal["champion", "challenger"] = (
        "champion" if verdict.passed or versions.champion(settings, paths) == version else "challenger"
    )
    return PromotionResult(version, alias, verdict)
