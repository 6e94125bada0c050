"""`d2r predict`: a folder of images classified by a registered version, as a parquet file."""

from pathlib import Path
from typing import Annotated

import typer

from flows.registry_commands import project


def predict(
    folder: Annotated[Path, typer.Argument(help="images, also in folders below it")],
    version: Annotated[
        str, typer.Option("--version", help="a number, champion or challenger; `d2r models` lists them")
    ] = "champion",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="instead of a version: weights with their JSON beside them")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="the parquet file, if not reports/predictions/FOLDER.parquet")
    ] = None,
) -> None:
    """Classify every image of a folder.

    Writes a parquet file with the label and the probabilities of each image. What cannot be read as an image is named
    on stderr and left out.
    """
    from tasks.registry import batch_prediction, client_model

    settings, paths = project()
    out = out or paths.reports / "predictions" / f"{folder.resolve().name}.parquet"
    if checkpoint is None:
        model = client_model.load_version(settings, paths, version)
        name = f"{settings.promote.model_name} version {model.version}"
    else:
        model, name = client_model.load_checkpoint(settings, checkpoint), str(checkpoint)
    result = batch_prediction.predict_folder(model, folder, out)
    for file, reason in result.unusable:
        typer.echo(f"not classified: {file} ({reason})", err=True)
    left_out = f", {len(result.unusable)} could not be" if result.unusable else ""
    typer.echo(f"{result.predicted} images were classified by {name}{left_out}: {out}")
