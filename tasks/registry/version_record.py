"""What the registry and its files say about one version: provenance, figures, aliases, hold, moves. Reads only."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry import history, moves, signing, version_files
from tasks.registry.history import Entry
from tasks.registry.provenance import Provenance
from tasks.registry.status import store_exists
from tasks.registry.versions import connect, find_version

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


class VersionRecord(NamedTuple):
    """A version and what it came from."""

    version: "ModelVersion"
    provenance: Provenance
    robustness: RobustnessReport
    aliases: tuple[str, ...]
    hold: str | None  # why, when and by whom
    moves: tuple[Entry, ...]  # of @champion, to or from this version, oldest first


def read(settings: Settings, paths: Paths, version: int) -> VersionRecord:
    """Read a version, with its files verified.

    Raises:
        UserError: there is no such version, its files are not the ones that were registered, or it has no provenance.
    """
    name = settings.promote.model_name
    missing = UserError(f"{name} has no version {version}. `d2r models` lists them.")
    if not store_exists(settings, paths):
        raise missing
    with connect(settings, paths) as client, tempfile.TemporaryDirectory() as folder:
        registered = find_version(client, name, version)
        if registered is None:
            raise missing
        files = version_files.read(registered, Path(folder), signing.trusted_key(settings, paths))
        provenance = Provenance.read(files.folder, f"{name} version {version}")
        robustness, _ = files.evaluation()
        aliases = client.get_registered_model(name).aliases
        return VersionRecord(
            version=registered,
            provenance=provenance,
            robustness=robustness,
            aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == version)),
            hold=moves.hold_of(client, registered),
            moves=tuple(
                entry
                for entry in history.entries(client, name)
                if version in (entry.move.from_version, entry.move.to_version)
            ),
        )
