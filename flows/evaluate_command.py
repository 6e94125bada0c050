"""`d2r evaluate`: any checkpoint under the attacks of params.yaml."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2r_core.errors import UserError

if TYPE_CHECKING:
    import torch

    from tasks.config.paths import Paths
    from tasks.config.settings import Settings
    from tasks.data.evaluation_images import Heldout
    from tasks.evaluation.evaluate_models import LoadedModel
    from tasks.evaluation.report_schema import RobustnessReport

Source = Literal["image_folder", "cifar10", "cifar100", "tiny_imagenet", "digits"]
Architecture = Literal["wide_resnet", "preact_resnet18", "resnet18"]


def evaluate(
    checkpoint: Annotated[str, typer.Option(help="a PyTorch or safetensors file, or models:/NAME@champion")],
    data: Annotated[Path, typer.Option(help="a prepared folder, a .safetensors split, or raw images")] = Path(
        "data/prepared"
    ),
    source: Annotated[Source | None, typer.Option(help="what the raw images are")] = None,
    classes: Annotated[int | None, typer.Option(help="of a .safetensors split, if not all are in it")] = None,
    architecture: Annotated[Architecture | None, typer.Option(help="where no JSON beside the file names it")] = None,
    depth: Annotated[int | None, typer.Option(help="of a wide_resnet")] = None,
    widen_factor: Annotated[int | None, typer.Option(help="of a wide_resnet")] = None,
    width: Annotated[int | None, typer.Option(help="of a resnet18, if not 64")] = None,
    strides: Annotated[str | None, typer.Option(help="of a resnet18: 1,1,2,2 or 1,2,2,2")] = None,
    norm: Annotated[Literal["Linf", "L2"] | None, typer.Option(help="instead of evaluate.norm")] = None,
    eps: Annotated[str | None, typer.Option(help="instead of evaluate.eps, as 8/255; the step size follows")] = None,
    steps: Annotated[int | None, typer.Option(help="instead of evaluate.steps")] = None,
    autoattack: Annotated[Literal["quick", "standard"] | None, typer.Option(help="instead of evaluate's")] = None,
    autoattack_images: Annotated[int | None, typer.Option(help="instead of evaluate's; 0: not run")] = None,
    check_images: Annotated[int | None, typer.Option(help="instead of evaluate.check_images")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
) -> None:
    """Attack any checkpoint as the chain attacks its own.

    Writes its figures, its prediction for each image, and a report.

    Takes published checkpoints (TRADES, LBGAT, D2R, RobustBench's of the same architectures), our own files and
    registered versions. Weights only: no code of a file is run.
    """
    from d2r_core import files, runtime
    from d2r_core.interruption import Interrupted
    from tasks import report
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.data import evaluation_images
    from tasks.evaluation import evaluate_models
    from tasks.evaluation.evaluate_models import EvaluationSetup

    paths = Paths()
    settings = _overridden(
        settings_file.load(paths.params),
        norm=norm,
        eps=eps,
        steps=steps,
        autoattack=autoattack,
        autoattack_images=autoattack_images,
        check_images=check_images,
    )
    described: dict[str, Any] = {"name": architecture, "depth": depth, "widen_factor": widen_factor, "width": width}
    described["strides"] = _strides(strides)
    images = evaluation_images.load(data, settings.prepare, source, classes)
    device = runtime.device(settings.runtime.device)
    given = {key: value for key, value in described.items() if value is not None}
    models = {"target": _subject(checkpoint, given, images, settings, paths, device)}
    setup = EvaluationSetup(
        test=images.split,
        source=images.source,
        classes=images.classes,
        data_hash=images.hash,
        settings=settings.evaluate,
        seed=settings.seed,
        cache_root=paths.state,
    )
    try:
        evaluation = evaluate_models.evaluate_models(models, setup)
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(130) from None
    folder = out or paths.reports / "evaluations" / Path(checkpoint).stem
    evaluation.robustness.update(checkpoint=checkpoint, settings_hash=settings.hash("seed", "evaluate"))
    evaluation.write(folder)
    artifacts = report.read(folder)
    files.write_text(folder / "report.html", report.render(artifacts, settings))
    evaluate_models.clear_cache(models, setup)
    _show(artifacts.robustness, folder)


def _overridden(settings: "Settings", **options: Any) -> "Settings":
    """The settings with the options that were given. Raises UserError as a wrong params.yaml does."""
    from tasks.config import settings as settings_file

    values = settings.model_dump(mode="json", by_alias=True)
    before = settings.evaluate
    if options["norm"] not in (None, before.norm) and options["eps"] is None:
        raise UserError(f"--norm {options['norm']}: evaluate.eps is a radius in {before.norm}. Give --eps too.")
    values["evaluate"].update({key: value for key, value in options.items() if value is not None})
    changed = settings_file.parse(values, name="the options")
    if options["eps"] is None:
        return changed
    # As large beside the radius as before.
    step_size = before.step_size * changed.evaluate.eps / before.eps
    return changed.model_copy(update={"evaluate": changed.evaluate.model_copy(update={"step_size": step_size})})


def _strides(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--strides {text}: write four numbers, such as 1,2,2,2.")
    return tuple(map(int, parts))


def _subject(
    reference: str,
    architecture: dict[str, Any],
    images: "Heldout",
    settings: "Settings",
    paths: "Paths",
    device: "torch.device",
) -> "LoadedModel":
    """The model that a checkpoint holds: of the architecture in the JSON beside it, or of the one that is given."""
    from d2r_core import checkpoint, files, models
    from tasks.evaluation.evaluate_models import LoadedModel
    from tasks.registry import versions

    shape = {"num_classes": len(images.classes), "image_size": images.split.images.shape[2]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(reference)
        if reference.startswith("models:/"):
            path = versions.download(settings, paths, reference, Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        if checkpoint.metadata_path(path).is_file() and not architecture:
            model, metadata = checkpoint.load(path, device)
            for key, value in shape.items():
                if metadata["architecture"][key] != value:
                    raise UserError(f"{path}: has {key} {metadata['architecture'][key]}, the data {value}.")
            return LoadedModel(model, metadata)
        described = {**architecture, **shape}
        model = models.build(**_complete(path, described))
        models.load_weights(model, path)
        return LoadedModel(model.to(device).eval(), {"architecture": described, "weights_sha256": files.sha256(path)})


def _complete(path: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture, if it has all that its name needs and nothing else."""
    needed = {"wide_resnet": {"depth", "widen_factor"}, "preact_resnet18": set(), "resnet18": set()}
    allowed = {**needed, "resnet18": {"width", "strides"}}
    name = architecture.get("name")
    if name is None:
        raise UserError(f"{path}: has no JSON beside it, so its architecture must be given: --architecture ...")
    given = set(architecture) - {"name", "num_classes", "image_size"}
    for what, keys in (("needs", needed[name] - given), ("has no", given - allowed[name])):
        options = [f"--{key}".replace("_", "-") for key in sorted(keys)]
        if options:
            raise UserError(f"{name} {what} {' and '.join(options)}.")
    if name == "wide_resnet" and (architecture["depth"] < 10 or (architecture["depth"] - 4) % 6):
        raise UserError(f"--depth {architecture['depth']}: allowed are 10, 16, 22, 28, 34, ... (6 n + 4).")
    return architecture


_RESULTS = {True: "passed", False: "FAILED", None: "skipped"}


def _show(robustness: "RobustnessReport", folder: Path) -> None:
    """Print the figures, the results of the self-checks, and where the rest lies."""
    import rich
    from rich.table import Table

    columns = ["attack", "eps", "step size, steps, restarts", "correct", "accuracy", "95 % interval"]
    table = Table(*columns, title=f"Accuracy under attack ({robustness.norm})")
    for figures in robustness.target.attacks.values():
        low, high = figures.interval
        conditions = (figures.step_size, figures.steps, figures.restarts)
        table.add_row(
            figures.name,
            f"{figures.eps:.5g}",
            ", ".join(f"{value:.4g}" for value in conditions if value is not None) or "its own",
            f"{figures.correct} of {figures.images}",
            f"{figures.accuracy:.2%}",
            f"{low:.2%} to {high:.2%}",
        )
    rich.print(table)
    for check in robustness.target.checks:
        typer.echo(f"{_RESULTS[check.passed]:<10} {check.name}. {check.message}")
    typer.echo(f"figures    {folder}")
    typer.echo(f"report     {folder / 'report.html'}")
