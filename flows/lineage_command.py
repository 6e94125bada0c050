"""`d2r lineage`: what a registered version came from, and where it went, as a tree."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.tree import Tree

    from tasks.registry.history import Entry
    from tasks.registry.provenance import Origin, Provenance, TrainedModel
    from tasks.registry.version_record import VersionRecord


def lineage(
    version: Annotated[int, typer.Argument(min=1, help="a version of the registered model; `d2r models` lists them")],
) -> None:
    """Show what a version came from, down to the raw data."""
    from rich.console import Console

    from tasks.config import settings as settings_file
    from tasks.config.paths import Paths
    from tasks.registry import version_record

    paths = Paths()
    record = version_record.read(settings_file.load(paths.params), paths, version)
    # Markup in a name or a reason is text.
    Console(markup=False, highlight=False).print(_tree(record))


def _tree(record: "VersionRecord") -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    provenance = record.provenance
    root = Tree(Text(_raw_data(provenance)))
    data = root.add(Text(_prepared_data(provenance)))
    data.add(Text(f"validation: {_validation(provenance)}"))
    parent = data
    if provenance.guidance:
        parent = data.add(Text(f"guidance model: {_model(provenance.guidance)}"))
    target = parent.add(Text(f"target model: {_model(provenance.target)}"))
    target.add(Text(f"code: {_code(provenance.training)}"))
    target.add(Text(f"environment: {_environment(provenance.training)}"))
    target.add(Text(f"settings {provenance.settings_hash[:12]}, seed {provenance.seed}"))
    evaluation = target.add(Text(_evaluation(record)))
    version = evaluation.add(Text(f"{record.version.name} version {record.version.version}: {_registration(record)}"))
    version.add(Text(f"gate: {record.version.tags.get('gate', 'not judged')}"))
    version.add(Text("aliases: " + (" ".join(f"@{alias}" for alias in record.aliases) or "none")))
    if record.hold:
        version.add(Text(f"on hold {record.hold}"))
    for entry in record.moves:
        version.add(Text(_move(entry)))
    return root


def _raw_data(provenance: "Provenance") -> str:
    source, raw = provenance.data.source, provenance.raw_data
    if raw is None:
        return f"raw data: {source}, not recorded (no dvc.lock)"
    md5 = f", md5 {raw.md5}" if raw.md5 else ""
    return f"raw data: {source}, {raw.path}{md5}, {f'DVC file {raw.dvc_file}' if raw.dvc_file else 'no DVC file'}"


def _prepared_data(provenance: "Provenance") -> str:
    data, storage = provenance.data, provenance.storage
    images = ", ".join(f"{count} {split}" for split, count in data.images.items())
    remote = (
        f"DVC remote {storage.remote} ({storage.url}), pushed: {storage.pushed}" if storage.remote else "no DVC remote"
    )
    return f"prepared data: {data.hash[:12]}, {images} images of {data.classes} classes; {remote}"


def _validation(provenance: "Provenance") -> str:
    validation = provenance.validation
    if validation is None:
        return "no record"
    met = f"{validation.expectations - len(validation.failed)} of {validation.expectations} expectations met"
    return f"{'accepted' if validation.success else 'refused'}, {met}" + "".join(f"; {it}" for it in validation.failed)


def _model(model: "TrainedModel") -> str:
    metrics = "".join(f", {name} {value:.2%}" for name, value in model.metrics.items() if name.endswith("accuracy"))
    return f"{model.weights_sha256[:12]}, MLflow run {model.mlflow_run_id or 'unknown'}{metrics}"


def _code(origin: "Origin") -> str:
    if origin.code is None:
        return "not recorded"
    diff = f" with {origin.code.diff}" if origin.code.diff else ", uncommitted settings" if origin.code.dirty else ""
    return f"commit {origin.code.commit[:12]}{diff}"


def _environment(origin: "Origin") -> str:
    where = origin.environment
    if where is None:
        return "not recorded"
    device = where.gpu or f"{where.cpu}, {where.threads} threads"
    return f"PyTorch {where.torch}, {where.precision}, {device}"


def _evaluation(record: "VersionRecord") -> str:
    evaluation, attacks = record.provenance.evaluation, record.robustness.target.attacks
    figures = ", ".join(f"{attacks[key].name} {attacks[key].accuracy:.2%}" for key in attacks)
    return (
        f"evaluation: settings {evaluation.settings_hash[:12]}, {evaluation.device}, {evaluation.precision}; {figures}"
    )


def _registration(record: "VersionRecord") -> str:
    from datetime import UTC, datetime

    created = datetime.fromtimestamp(record.version.creation_timestamp / 1000, UTC)
    run = record.provenance.prefect_run
    flow = f", Prefect flow run {run.name} ({run.id})" if run else ""
    return f"registered {created:%Y-%m-%d %H:%M} UTC, {_code(record.provenance.registration)}{flow}"


def _move(entry: "Entry") -> str:
    move = entry.move
    outcome = "" if entry.outcome == "completed" else f" ({entry.outcome or 'interrupted'})"
    change = f"@{move.alias} from {move.from_version or 'none'} to {move.to_version}"
    return f"{move.time[:19].replace('T', ' ')} UTC: {change} by {move.who}, {move.command}{outcome}: {move.reason}"
