"""What a run came to, for people: the robustness table and where to look further. Used by terminal and artifact."""

from collections.abc import Sequence

from tasks.config.settings import Settings
from tasks.evaluation.report_schema import Accuracy, RobustnessReport
from tasks.registry.decision import Rule
from tasks.tracking.uri import public_uri, tracking_uri

HEADER = ["attack", "eps", "test images", "guidance [95 %]", "target [95 %]"]
_ATTACKS = ["clean", "fgsm", "pgd", "cw", "worst", "autoattack"]  # the worst is that of the four before it


def rows(report: RobustnessReport) -> list[list[str]]:
    """Both models' accuracies under every attack, with 95 % intervals; a row an attack."""
    guidance, target = report.models["guidance"].attacks, report.target.attacks
    return [
        [
            target[attack].name,
            f"{target[attack].eps:.4g}",
            f"{target[attack].images} of {report.data.test_images}",
            _accuracy(guidance[attack]),
            _accuracy(target[attack]),
        ]
        for attack in _ATTACKS
        if attack in target
    ]


def self_checks(report: RobustnessReport) -> str:
    """The self-checks of the target's figures: the names of those that failed or were skipped, or that all passed."""
    checks = report.target.checks
    failed, skipped = ([check.name for check in checks if check.passed is result] for result in (False, None))
    parts = [f"{word}: {', '.join(names)}" for word, names in (("failed", failed), ("skipped", skipped)) if names]
    return "; ".join(parts) or f"all {len(checks)} passed"


def markdown(report: RobustnessReport) -> str:
    """The table as Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows(report)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rules_markdown(rules: Sequence[Rule]) -> str:
    """The gate's rules as a table in Markdown; a row a rule."""
    lines = [["rule", "verdict", "interval of the difference", "reason", "figures"], ["---"] * 5]
    for rule in rules:
        interval = "" if rule.interval is None else f"{rule.interval[0]:+.2%} to {rule.interval[1]:+.2%}"
        figures = ", ".join(f"{name.replace('_', ' ')} {figure:.4g}" for name, figure in rule.figures.items())
        lines.append([rule.name, rule.verdict, interval, rule.reason.replace("|", "\\|"), figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def open_mlflow(settings: Settings) -> str:
    """The command, or the address, that shows MLflow."""
    uri = public_uri(settings)
    if uri.startswith("http"):
        return uri
    if uri != tracking_uri(settings):
        # Neither here nor among the arguments of a process.
        return 'MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI" mlflow ui'
    return f"mlflow ui --backend-store-uri {uri}"


def run_link(settings: Settings, experiment_id: str, run_id: str) -> str:
    """Where to see a run, in Markdown; a database is seen through a server of the reader's own."""
    uri, page = public_uri(settings), f"#/experiments/{experiment_id}/runs/{run_id}"
    if uri.startswith("http"):
        return f"[run {run_id}]({uri.rstrip('/')}/{page})"
    return f"`{open_mlflow(settings)}`, then [run {run_id}](http://127.0.0.1:5000/{page})"


def _accuracy(figure: Accuracy) -> str:
    low, high = figure.interval
    return f"{figure.accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
