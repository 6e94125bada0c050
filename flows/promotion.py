"""The end of a retraining: register what was evaluated, gate it, and make it champion if it passes.

Side effects, so Prefect tasks and never DVC stages: a cached stage would skip them.
"""

from typing import Literal, NamedTuple

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.prefect_tasks import gate, promote, register
from tasks.registry import versions
from tasks.registry.gate import Verdict


class PromotionResult(NamedTuple):
    """A registered version, the alias it ended with, and why."""

    version: int
    alias: Literal["champion", "challenger"]
    verdict: Verdict


def promotion(settings: Settings, paths: Paths) -> PromotionResult:
    """Register the evaluated model as @challenger; gate it; move @champion to it if it passes.

    To be called inside a flow. A refusal by the gate is a result, not an error.
    """
    version = register(settings, paths)
    verdict = gate(settings, paths, version)
    if verdict.passed:
        promote(settings, paths, version)
    alias: Literal["champion", "challenger"] = (
        "champion" if verdict.passed or versions.champion(settings, paths) == version else "challenger"
    )
    return PromotionResult(version, alias, verdict)
