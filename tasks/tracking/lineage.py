"""What a model was made from: code, data and settings, as hashes."""

from dataclasses import dataclass

from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.tracking.source_code import SourceCode, read_source_code


@dataclass(frozen=True)
class Lineage:
    git_commit: str  # as SourceCode.commit
    git_dirty: bool
    data_hash: str  # of the prepared data, from its manifest
    settings_hash: str  # of everything that the weights depend on


def current_lineage(settings: Settings, paths: Paths, code: SourceCode | None = None) -> Lineage:
    """The lineage of what this checkout produces now. The prepared data must exist.

    Args:
        code: the code that runs, where it was read before; by default as it is in the checkout now.
    """
    code = code or read_source_code(paths)
    return Lineage(
        git_commit=code.commit,
        git_dirty=code.dirty,
        data_hash=read_manifest(paths)["hash"],
        settings_hash=settings.hash("seed", "prepare", "pretrain", "train"),
    )
