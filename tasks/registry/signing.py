"""Signatures of versions, by the package `model-signing` and a key pair of one's own (elliptic curve, PEM).

The registration signs every file of the logged model, the manifest included. Which public key is trusted is a setting
(`promote.require_signature`) or, where a model is served, a variable, so it does not lie in the registry: whoever
forges files, manifest and tags there cannot forge the signature.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.config.settings import Settings

SIGNATURE = "model.sig"
# Environment variables: the private key and its password must not get into settings, which are logged and stored.
PRIVATE_KEY = "D2R_SIGNING_KEY"  # the file of the private key
PASSWORD = "D2R_SIGNING_KEY_PASSWORD"  # of the private key, if it is encrypted
PUBLIC_KEY = "D2R_PUBLIC_KEY"  # the file of the key that must have signed a model that MLflow loads
_SETTING = "promote.require_signature"


class SignatureError(UserError):
    """A version that is not signed, or whose signature is not one of its files by the trusted key."""


def trusted_key(settings: Settings, paths: Paths) -> Path | None:
    """The public key that must have signed every version; None: no signature is required.

    Raises:
        UserError: there is no such file.
    """
    key = settings.promote.require_signature
    return None if key is None else _existing(paths.root / key, _SETTING)


def client_key() -> Path | None:
    """The public key that must have signed a model that MLflow loads, by the environment; None: none is required.

    Raises:
        UserError: there is no such file.
    """
    key = os.environ.get(PUBLIC_KEY)
    return _existing(Path(key), PUBLIC_KEY) if key else None


def check_keys(public_key: Path | None) -> None:
    """Sign a file and verify it, before a registration: a version with no valid signature would be of no use.

    Raises:
        UserError: the private key cannot be used; or a signature is required and there is no private key, or it is not
            that of the public key.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "file").touch()
        signature = sign(folder)
        if public_key is None:
            return
        if signature is None:
            raise UserError(f"{_SETTING} asks for a signature, and the variable {PRIVATE_KEY} names no private key.")
        try:
            verify(folder, public_key, "A file")
        except SignatureError:
            raise UserError(f"The key in {PRIVATE_KEY} does not belong to {public_key} ({_SETTING}).") from None


def sign(folder: Path, unsigned: tuple[str, ...] = ()) -> Path | None:
    """Sign the files in a folder, if there is a private key; returns the path of the signature in the folder.

    Args:
        unsigned: names of files that may come or go later.

    Raises:
        UserError: the private key cannot be used.
    """
    key, password = os.environ.get(PRIVATE_KEY), os.environ.get(PASSWORD)
    if not key:
        return None
    from model_signing import hashing, signing  # takes a second to import

    signature = folder / SIGNATURE
    ignored = [signature, *(folder / name for name in unsigned)]
    try:
        # Annotated as text, but the package hands the password to `cryptography`, which takes bytes.
        secret: Any = password.encode() if password else None
        signer = signing.Config()  # type: ignore[no-untyped-call]
        signer.use_elliptic_key_signer(private_key=Path(key), password=secret)
    except TypeError:  # a password that is missing, or one too many
        state = f"not encrypted, and {PASSWORD} is set" if password else f"encrypted, and {PASSWORD} is not set"
        raise UserError(f"{PRIVATE_KEY}: {key} is {state}.") from None
    except (OSError, ValueError, AttributeError):  # missing, no PEM, another password, no elliptic curve
        reason = f", or {PASSWORD} is not its password" if password else ""
        raise UserError(
            f"{PRIVATE_KEY}: {key} is not the file of an elliptic-curve private key in PEM format{reason}."
        ) from None
    hashed = hashing.Config()  # type: ignore[no-untyped-call]
    signer.set_hashing_config(hashed.set_ignored_paths(paths=ignored, ignore_git_paths=False)).sign(folder, signature)
    return signature


def verify(folder: Path, public_key: Path, name: str) -> None:
    """Verify the signature of a logged model's folder.

    Args:
        name: of the model, for messages.

    Raises:
        SignatureError: there is none, it was made with another key, or the files are not the ones that were signed.
        UserError: the public key cannot be used.
    """
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{public_key} is not the file of an elliptic-curve public key in PEM format.") from None
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise SignatureError(f"{name} is not signed, and a signature by the key {public_key} is required.")
    try:
        config.verify(folder, signature)
    except Exception as error:  # a forged file may fail anywhere in the parser
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise SignatureError(
            f"{name}: its signature is not one of these files by the key {public_key} ({cause}). Do not use it."
        ) from None


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        raise UserError(f"{source}: there is no file {path}.")
    return path
