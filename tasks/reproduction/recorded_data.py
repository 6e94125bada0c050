"""The data of a version: the outs of its `dvc.lock`, from the DVC cache and remotes of the user's checkout.

The reproduction has a cache of its own. In the user's, DVC would find the finished runs and restore instead of running.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import yaml

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.pipeline import dvc, remote

_CACHE = "cache-of-the-checkout"  # the name of the user's cache among the remotes


def fetch(paths: Paths, project: Paths, targets: Sequence[str]) -> str:
    """Bring what there is of these stages' outs and `.dvc` files into the project.

    What is missing in cache and remote is no error here: `is_complete` tells.

    Args:
        paths: of the user's checkout, whose cache and remotes are read.
        project: of the reproduction, with the recorded `dvc.lock`.

    Returns:
        DVC's message about what did not come; empty if everything came.

    Raises:
        BusyError: another DVC process is working in the project.
    """
    sources = [["--remote", _CACHE], []] if remote.default_remote(paths) else [["--remote", _CACHE]]
    message = ""
    with _remotes(paths, project):
        for source in sources:
            try:
                dvc.run_dvc(["pull", "--force", *source, *targets], project)
                return ""
            except dvc.BusyError:
                raise
            except UserError as error:
                message = str(error)
    return message


def is_complete(project: Paths, stage: str) -> bool:
    """Whether every out of the stage is there."""
    stages = yaml.safe_load((project.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return all((project.root / out).exists() for out in dvc.outs(stages[stage]))


@contextmanager
def _remotes(paths: Paths, project: Paths) -> Iterator[None]:
    """The user's remotes and cache as remotes of the project; their credentials are there for the block alone."""
    local, own = project.root / ".dvc/config.local", paths.root / ".dvc/config.local"
    local.unlink(missing_ok=True)
    cache = ["config", "--local", "cache.dir", str((project.root / ".dvc/cache").resolve())]
    dvc.run_dvc(cache, project)
    without_remotes = local.read_bytes()
    try:
        if own.is_file():
            shutil.copyfile(own, local)
            local.chmod(0o600)
            dvc.run_dvc(cache, project)
        for each in remote.remotes(paths):
            if "://" not in each.url:  # it may be relative to the user's checkout
                with suppress(UserError):  # of a later commit than the project's
                    dvc.run_dvc(["remote", "modify", "--local", each.name, "url", each.url], project)
        dvc.run_dvc(["remote", "add", "--force", "--local", _CACHE, _resolved(dvc.cache_folder(paths), paths)], project)
        yield
    finally:
        local.write_bytes(without_remotes)


def _resolved(folder: str, paths: Paths) -> str:
    return str((paths.root / folder).resolve())
