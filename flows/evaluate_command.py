"""`d2r evaluate`: any checkpoint under the attacks of params.yaml."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2r_core.errors import UserError
from flows import checkpoint_options
from flows.checkpoint_options import Architecture, NormalizationName

if TYPE_CHECKING:
    from tasks.config.settings import Settings
    from tasks.evaluation.evaluate_models import EvaluationSetup, LoadedModel
    from tasks.evaluation.report_schema import RobustnessReport

Source = Literal["image_folder", "cifar10", "cifar100", "tiny_imagenet", "digits"]


def evaluate(
    checkpoint: Annotated[str, typer.Option(help="a PyTorch or safetensors file, or models:/NAME@champion")],
    data: Annotated[Path, typer.Option(help="a prepared folder, a .safetensors split, or raw images")] = Path(
        "data/prepared"
    ),
    source: Annotated[Source | None, typer.Option(help="what the raw images are")] = None,
    classes: Annotated[int | None, typer.Option(help="of a .safetensors split, if not all are in it")] = None,
    architecture: Annotated[Architecture | None, typer.Option(help="where no JSON beside the file names it")] = None,
    depth: Annotated[int | None, typer.Option(help="of a (dm_)wide_resnet")] = None,
    widen_factor: Annotated[int | None, typer.Option(help="of a (dm_)wide_resnet")] = None,
    width: Annotated[int | None, typer.Option(help="of a resnet18, if not 64")] = None,
    strides: Annotated[str | None, typer.Option(help="of a resnet18: 1,1,2,2 or 1,2,2,2")] = None,
    shortcut_from: Annotated[Literal["activated", "input"] | None, typer.Option(help="of a preact_resnet18")] = None,
    final_norm: Annotated[
        bool, typer.Option("--final-norm", help="a preact_resnet18 with BatchNorm at its end")
    ] = False,
    activation: Annotated[Literal["relu", "silu"] | None, typer.Option(help="of a dm_*")] = None,
    normalize: Annotated[NormalizationName | None, typer.Option(help="what the network's images go through")] = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B of another normalisation, in units of [0, 1]")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B of another normalisation")] = None,
    key: Annotated[str | None, typer.Option(help="the file's entry with the weights, such as ema")] = None,
    expect_clean: Annotated[
        float | None, typer.Option(help="stop if the clean accuracy is not this one, in per cent", min=0, max=100)
    ] = None,
    norm: Annotated[Literal["Linf", "L2"] | None, typer.Option(help="instead of evaluate.norm")] = None,
    eps: Annotated[str | None, typer.Option(help="instead of evaluate.eps, as 8/255; the step size follows")] = None,
    steps: Annotated[int | None, typer.Option(help="instead of evaluate.steps")] = None,
    autoattack: Annotated[Literal["quick", "standard"] | None, typer.Option(help="instead of evaluate's")] = None,
    autoattack_images: Annotated[int | None, typer.Option(help="instead of evaluate's; 0: not run")] = None,
    check_images: Annotated[int | None, typer.Option(help="instead of evaluate.check_images")] = None,
    write_claim: Annotated[
        bool, typer.Option("--write-claim", help="write claim.json, RobustBench's model_info")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
) -> None:
    """Attack any checkpoint as the chain attacks its own.

    Writes its figures, its prediction for each image, and a report.

    Takes published checkpoints (TRADES, LBGAT, D2R, most of RobustBench's), our own files and registered versions.
    Weights only: no code of a file is run.
    """
    from d2r_core import files, runtime
    from d2r_core.interruption import Interrupted
    from tasks import report
    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.data import evaluation_images
    from tasks.evaluation import evaluate_models
    from tasks.evaluation.evaluate_models import EvaluationSetup
    from tasks.reporting import claim

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
    described = checkpoint_options.described(
        name=architecture,
        depth=depth,
        widen_factor=widen_factor,
        width=width,
        strides=strides,
        shortcut_from=shortcut_from,
        final_norm=final_norm,
        activation=activation,
        normalize=normalize,
        mean=mean,
        std=std,
    )
    images = evaluation_images.load(data, settings.prepare, source, classes)
    shape = {"num_classes": len(images.classes), "image_size": images.split.images.shape[2]}
    device = runtime.device(settings.runtime.device)
    target = checkpoint_options.load(checkpoint, described, shape, settings, paths, device=device, key=key)
    models = {"target": target}
    setup = EvaluationSetup(
        test=images.split,
        source=images.source,
        classes=images.classes,
        data_hash=images.hash,
        settings=settings.evaluate,
        seed=settings.seed,
        cache_root=paths.state,
    )
    if write_claim:
        claim.require_claimable(images.source, len(images.split), settings.evaluate)
    warning = _check_clean(target, setup, expect_clean)
    try:
        evaluation = evaluate_models.evaluate_models(models, setup)
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(130) from None
    folder = out or paths.reports / "evaluations" / Path(checkpoint).stem
    evaluation.robustness.update(checkpoint=checkpoint, settings_hash=settings.hash("seed", "evaluate"))
    evaluation.robustness.update({"warnings": [warning]} if warning else {})
    evaluation.write(folder)
    artifacts = report.read(folder)
    files.write_text(folder / "report.html", report.render(artifacts, settings))
    if write_claim:
        info = json.dumps(claim.model_info(artifacts.robustness), indent=2)
        files.write_text(folder / "claim.json", f"{info}\n")
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


def _check_clean(target: "LoadedModel", setup: "EvaluationSetup", expected: float | None) -> str | None:
    """Stop where the clean accuracy is not the expected one (per cent); the warning, if it is near chance."""
    from tasks.evaluation import clean_accuracy

    clean = clean_accuracy.clean_accuracy(target, setup)
    if expected is not None:
        clean_accuracy.require(clean, expected / 100)
    warning = clean_accuracy.chance_warning(clean, len(setup.classes))
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    return warning


_RESULTS = {True: "passed", False: "FAILED", None: "skipped"}


def _show(robustness: "RobustnessReport", folder: Path) -> None:
    """Print the figures, the results of the self-checks, and where the rest lies."""
    import rich
    from rich.table import Table

    columns = ["attack", "eps", "step size, steps, restarts", "correct", "accuracy", "95 % interval", "passes"]
    table = Table(*columns, title=f"Accuracy under attack ({robustness.norm})")
    for key, figures in robustness.target.attacks.items():
        cost = robustness.target.costs.get(key)
        low, high = figures.interval
        conditions = (figures.step_size, figures.steps, figures.restarts)
        table.add_row(
            figures.name,
            f"{figures.eps:.5g}",
            ", ".join(f"{value:.4g}" for value in conditions if value is not None) or "its own",
            f"{figures.correct} of {figures.images}",
            f"{figures.accuracy:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{cost.forward_passes:,} + {cost.backward_passes:,}, {cost.seconds:.0f} s" if cost else "",
        )
    rich.print(table)
    median = robustness.target.curves.median_perturbation
    if median:
        where = f"{median.above:.5g} to {median.at_most:.5g} of the curve"
        typer.echo(f"median minimal perturbation ({robustness.norm}) {median.value:.5g} (between {where})")
    for check in robustness.target.checks:
        typer.echo(f"{_RESULTS[check.passed]:<10} {check.name}. {check.message}")
    typer.echo(f"figures    {folder}")
    typer.echo(f"report     {folder / 'report.html'}")
    if (folder / "claim.json").is_file():
        typer.echo(f"claim      {folder / 'claim.json'}, in which its authors fill in what is null")
