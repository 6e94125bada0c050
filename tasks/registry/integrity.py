"""The manifest of a version: the SHA-256 of every file of its logged model, and a tag with the manifest's own.

A changed, missing or additional file differs from the manifest, a changed manifest from the tag. Whoever may write both
the files and the tags can forge both: that takes a signature to notice (`signing`).
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from d2r_core import files
from d2r_core.errors import UserError
from tasks.registry import signing

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MANIFEST = "manifest.json"
TAG = "manifest_sha256"
CONTENT = "data/model"  # the folder of a logged model with the files of this project
# MLflow writes it into the copy of a client; with a local store, that is the stored model itself.
CLIENT_FILE = "registered_model_meta"
_UNHASHED = (MANIFEST, CLIENT_FILE, signing.SIGNATURE)


def write_manifest(folder: Path) -> Path:
    """Write the manifest of a logged model into its folder; returns the path."""
    path = folder / MANIFEST
    files.write_text(path, json.dumps({"sha256": _hashes(folder)}, indent=2) + "\n")
    return path


def log_manifest(model_id: str) -> str:
    """Add the manifest to a logged model, and a signature if there is a private key.

    Returns:
        The manifest's SHA-256, for the tag.

    Raises:
        UserError: the private key cannot be used.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        model = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=folder))
        manifest = write_manifest(model)
        for path in (manifest, signing.sign(model, unsigned=(CLIENT_FILE,))):
            if path is not None:
                mlflow.MlflowClient().log_model_artifact(model_id, str(path))
        return files.sha256(manifest)


def verify(version: "ModelVersion", public_key: Path | None) -> None:
    """Fetch everything that a version carries, hash it, and verify the signature. Raises UserError like `fetch`."""
    with tempfile.TemporaryDirectory() as folder:
        fetch(version, Path(folder), public_key)


def fetch(version: "ModelVersion", folder: Path, public_key: Path | None) -> Path:
    """Bring a version's logged model into `folder`, as a client does; returns the folder of this project's files in it.

    Args:
        public_key: what must have signed it (`signing.trusted_key`); None: it need not be signed.

    Raises:
        SignatureError: it is not signed by that key.
        UserError: a file is not the one that was registered, or the version has no manifest.
    """
    import mlflow

    if TAG not in version.tags:
        raise UserError(
            f"{version.name} version {version.version} has no manifest of its files, so nothing shows that they are "
            "the ones that were registered. `d2r run` registers the model anew."
        )
    uri = f"models:/{version.name}/{version.version}"
    model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    name = f"{version.name} version {version.version}"
    verify_folder(model, version.tags[TAG], name)
    if public_key is not None:
        signing.verify(model, public_key, name)
    return model / CONTENT


def verify_loaded(folder: Path) -> None:
    """Verify the model that MLflow is about to load from `folder`, with its signature if `D2R_PUBLIC_KEY` names a key.

    The registry is asked for the tag only where it is known: a container that serves a model has none.

    Raises:
        SignatureError: it is not signed by that key.
        UserError: a file is not the one that was registered, or there is no manifest.
    """
    import mlflow
    import yaml

    expected, name = None, str(folder)
    description = folder / CLIENT_FILE
    if mlflow.is_tracking_uri_set() and description.is_file():  # type: ignore[no-untyped-call]
        try:
            downloaded = yaml.safe_load(description.read_bytes())
            model, number = str(downloaded["model_name"]), str(downloaded["model_version"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            raise UserError(_refusal(name, f"{CLIENT_FILE} is damaged")) from None
        version = mlflow.MlflowClient().get_model_version(model, number)
        expected, name = version.tags.get(TAG), f"{model} version {number}"
    verify_folder(folder, expected, name)
    public_key = signing.client_key()
    if public_key is not None:
        signing.verify(folder, public_key, name)


def verify_folder(folder: Path, manifest_sha256: str | None, name: str) -> None:
    """Compare a model's files with the manifest among them, and the manifest with its own SHA-256 where that is known.

    Args:
        name: of the model, for messages.

    Raises:
        UserError: they differ, or there is no manifest.
    """
    expected = _read_manifest(folder / MANIFEST, manifest_sha256, name)
    actual = _hashes(folder)
    changed = sorted(file for file in actual.keys() | expected.keys() if actual.get(file) != expected.get(file))
    if changed:
        raise UserError(_refusal(name, f"not as registered: {', '.join(changed)}"))


def _read_manifest(path: Path, sha256: str | None, name: str) -> dict[str, str]:
    """The SHA-256 of each file by its name, once the manifest has its own where that is known."""
    try:
        content = path.read_bytes()
        expected = dict(json.loads(content)["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(_refusal(name, f"{MANIFEST} is missing or damaged")) from None
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(_refusal(name, f"{MANIFEST} is not the one that was registered"))
    return expected


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: files.sha256(path) for name, path in names.items() if name not in _UNHASHED}


def _refusal(name: str, reason: str) -> str:
    return (
        f"{name}: its files were changed after the registration ({reason}). Do not use it. Once the version is "
        "deleted in MLflow, `d2r run` registers the model anew."
    )
