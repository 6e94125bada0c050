"""What a run came to, for people: the robustness table and where to look further. Used by terminal and artifact."""

import os
from typing import Any

from tasks.settings import Settings

HEADER = ["attack", "eps", "test images", "guidance, as pretrained", "target, D2R"]
_ATTACKS = ["clean", "fgsm", "pgd", "cw", "worst", "autoattack"]  # the worst is that of the four before it


def rows(robustness: dict[str, Any]) -> list[list[str]]:
    """The accuracy of both models under every attack of `reports/robustness.json`, one row for an attack."""
    guidance, target = (robustness["models"][model]["attacks"] for model in ("guidance", "target"))
    return [
        [
            target[attack]["name"],
            f"{target[attack]['eps']:.4g}",
            f"{target[attack]['images']} of {robustness['data']['test_images']}",
            f"{guidance[attack]['accuracy']:.1%}",
            f"{target[attack]['accuracy']:.1%}",
        ]
        for attack in _ATTACKS
        if attack in target
    ]


def markdown(robustness: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows(robustness)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tracking_uri(settings: Settings) -> str:
    """The address of MLflow as a person writes it: the variable, or `tracking.uri`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri


def open_mlflow(settings: Settings) -> str:
    """The command, or the address, that shows MLflow."""
    uri = tracking_uri(settings)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def run_link(settings: Settings, experiment_id: str, run_id: str) -> str:
    """Where to see a run, in Markdown; a database is seen through a server of the reader's own."""
    uri, page = tracking_uri(settings), f"#/experiments/{experiment_id}/runs/{run_id}"
    if uri.startswith("http"):
        return f"[run {run_id}]({uri.rstrip('/')}/{page})"
    return f"`{open_mlflow(settings)}`, then [run {run_id}](http://127.0.0.1:5000/{page})"
