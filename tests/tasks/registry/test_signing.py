"""Versions are signed when they are registered, and refused where a signature is required that they do not have."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from registry_project import NAME, Project, logged_model_folder, make_project
from safetensors.torch import load_file, save_file

from d2r_core.errors import UserError
from d2r_core.files import sha256
from tasks.config.settings import Settings
from tasks.registry import integrity, signing, transfer, version_record, versions
from tasks.reproduction.reproduce import reproduce

pytestmark = pytest.mark.slow


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """A project that requires a signature by the key `own`, which the environment names."""
    project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    for name in (signing.PASSWORD, signing.PUBLIC_KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(signing.PRIVATE_KEY, str(make_key(tmp_path, "own")))
    project.with_settings(promote={"require_signature": "own.pub"})
    return project


def make_key(folder: Path, name: str) -> Path:
    """A key pair NAME.pem and NAME.pub, made as docs/registry.md says; returns the path of the private key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    for command in (
        f"openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {private}",
        f"openssl pkey -in {private} -pubout -out {public}",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    return private


def encrypt(private: Path, password: str) -> Path:
    """A copy of a private key that needs a password."""
    encrypted = private.with_stem(f"{private.stem}-encrypted")
    command = f"openssl pkey -in {private} -aes-256-cbc -passout pass:{password} -out {encrypted}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return encrypted


def forge(version: int, project: Project) -> None:
    """Other weights and figures with all hashes, manifest and tag as they belong to them."""
    registered = project.version(version)
    folder = logged_model_folder(registered)
    weights = folder / "data/model/target.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    described, robustness = weights.with_suffix(".json"), weights.with_name("robustness.json")
    before = json.loads(described.read_text())["weights_sha256"]
    for path in (described, robustness):
        path.write_text(path.read_text().replace(before, sha256(weights)).replace("0.6", "0.9"))
    manifest = integrity.write_manifest(folder)
    tags = {integrity.TAG: sha256(manifest), "weights_sha256": sha256(weights)}
    for key, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(NAME, str(version), key, value)


def sign_by_another(version: int, project: Project) -> None:
    """Sign the files, forged or not, with a key that is not trusted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(signing.PRIVATE_KEY, str(make_key(project.paths.root, "other")))
        signing.sign(logged_model_folder(project.version(version)), unsigned=(integrity.CLIENT_FILE,))


def forge_and_sign_by_another(version: int, project: Project) -> None:
    forge(version, project)
    sign_by_another(version, project)


def remove_signature(version: int, project: Project) -> None:
    (logged_model_folder(project.version(version)) / "model.sig").unlink()


def damage_signature(version: int, project: Project) -> None:
    (logged_model_folder(project.version(version)) / "model.sig").write_text('{"dsseEnvelope": 3}')


ATTACKS = [
    (forge, "its signature is not one of these files"),
    (sign_by_another, "its signature is not one of these files"),
    (forge_and_sign_by_another, "its signature is not one of these files"),
    (damage_signature, "its signature is not one of these files"),
    (remove_signature, "is not signed, and a signature by the key .*own.pub is required"),
]


@pytest.mark.parametrize(("attack", "message"), ATTACKS)
def test_version_without_a_valid_signature_is_refused_everywhere(
    project: Project, attack: Callable[[int, Project], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, champion = project.register(), project.register(seed=1)
    project.promote(version)
    project.promote(champion)
    attack(version, project)
    integrity.verify(project.version(version), None)  # hashes alone do not show it
    mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")

    monkeypatch.setenv(signing.PUBLIC_KEY, str(project.paths.root / "own.pub"))
    settings, paths = project.settings, project.paths
    actions: list[Callable[[], object]] = [
        lambda: project.judge(version),
        lambda: project.promote(version, force=True),
        lambda: project.rollback(),
        lambda: project.rollback(to=version),
        lambda: versions.download(settings, paths, f"models:/{NAME}/{version}", paths.root / "download"),
        lambda: reproduce(settings, paths, version, paths.root / "again", train=False, log=print),
        lambda: version_record.read(settings, paths, version),
        lambda: mlflow.pyfunc.load_model(f"models:/{NAME}/{version}"),
        lambda: transfer.promote(
            settings, paths, version, name="production", server=None, who="tester@host", reason="test", force=True
        ),
    ]
    for action in actions:
        with pytest.raises(signing.SignatureError, match=f"^digits version {version}:? .*{message}"):
            action()
    assert project.champion() == champion
    assert "gate" not in project.version(version).tags
    assert [model.name for model in mlflow.MlflowClient().search_registered_models()] == [NAME]


def test_forged_champion_is_not_compared_with(project: Project) -> None:
    champion, challenger = project.register(), project.register(seed=1)
    project.promote(champion)
    forge(champion, project)
    verdict = project.judge(challenger)
    assert not verdict.passed
    assert "digits version 1: its signature is not one of these files" in " ".join(verdict.reasons)


def test_signed_version_is_judged_promoted_and_rolled_back(project: Project) -> None:
    first, second = project.register(worst=0.5), project.register(seed=1, worst=0.9)
    project.promote(first)
    assert project.judge(second).passed
    project.promote(second, force=False)
    assert project.rollback().champion == first
    mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    # A model that is signed already keeps its version.
    assert versions.register(project.settings, project.paths) == second


def test_signature_is_verified_by_the_command_of_model_signing(project: Project, tmp_path: Path) -> None:
    """As docs/registry.md shows it to those who have the files and the public key alone."""
    folder = tmp_path / "downloaded"
    version = project.register()
    download = [sys.executable, "-m", "mlflow", "artifacts", "download", "-u", f"models:/{NAME}/{version}"]
    subprocess.run([*download, "-d", str(folder)], check=True, capture_output=True)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(tmp_path / "own.pub")]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "MLmodel").write_text("loader_module: os\n")
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_nothing_is_registered_that_would_be_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project.paths.root
    monkeypatch.setenv(signing.PRIVATE_KEY, str(make_key(root, "other")))
    with pytest.raises(UserError, match=r"^The key in D2R_SIGNING_KEY does not belong to .*own\.pub"):
        project.register()
    monkeypatch.setenv(signing.PRIVATE_KEY, str(root / "own.pub"))
    with pytest.raises(UserError, match=r"^D2R_SIGNING_KEY: .*own\.pub is not the file of an elliptic-curve private"):
        project.register()
    monkeypatch.delenv(signing.PRIVATE_KEY)
    with pytest.raises(UserError, match="the variable D2R_SIGNING_KEY names no private key"):
        project.register()
    project.with_settings(promote={"require_signature": "missing.pub"})
    with pytest.raises(UserError, match=r"^promote\.require_signature: there is no file .*missing\.pub"):
        project.register()
    assert mlflow.MlflowClient().search_registered_models() == []
    assert mlflow.search_logged_models(experiment_ids=["1"], output_format="list") == []


def test_key_with_a_password_signs_and_neither_is_stored_or_printed(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, capfd: Any
) -> None:
    root, password, keys = project.paths.root, "Tr0ub4dor-and-3", tmp_path_factory.mktemp("keys")
    monkeypatch.setenv(signing.PRIVATE_KEY, str(encrypt(root / "own.pem", password)))
    with pytest.raises(UserError, match=r"own-encrypted\.pem is encrypted, and D2R_SIGNING_KEY_PASSWORD is not set\.$"):
        project.register()
    monkeypatch.setenv(signing.PASSWORD, "another")
    with pytest.raises(UserError, match="or D2R_SIGNING_KEY_PASSWORD is not its password") as wrong:
        project.register()
    monkeypatch.setenv(signing.PASSWORD, password)
    version = project.register()
    project.judge(version)
    project.promote(version)

    # The private number is in the first two lines of the key; those after them hold the public one.
    secrets = [password.encode(), *(root / "own.pem").read_bytes().split(b"\n")[1:3]]
    secrets += (root / "own-encrypted.pem").read_bytes().split(b"\n")[1:-2]
    for path in (root / "own.pem", root / "own-encrypted.pem"):
        path.rename(keys / path.name)
    printed = capfd.readouterr()
    experiment = mlflow.get_experiment_by_name("tests")
    assert experiment is not None
    stored = Path(experiment.artifact_location.removeprefix("file://"))
    paths = [path for folder in (root, stored) for path in folder.rglob("*") if path.is_file()]
    places = {str(path): path.read_bytes() for path in paths}
    places |= {"output": (printed.out + printed.err).encode(), "message": str(wrong.value).encode()}
    assert len(secrets) > 4
    assert {"mlflow.db", "model.sig", "provenance.json"} <= {Path(place).name for place in places}
    assert [place for place, content in places.items() for secret in secrets if secret in content] == []


def test_password_for_a_key_that_has_none_is_one_message(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.PASSWORD, "superfluous")
    with pytest.raises(UserError, match=r"own\.pem is not encrypted, and D2R_SIGNING_KEY_PASSWORD is set\.$"):
        project.register()


def test_public_key_that_is_none_is_one_message(project: Project) -> None:
    version = project.register()
    (project.paths.root / "own.pub").write_text("no key")
    with pytest.raises(UserError, match=r"own\.pub is not the file of an elliptic-curve public key in PEM"):
        project.promote(version)


def test_after_a_change_of_keys_the_model_is_registered_anew(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation, as docs/registry.md describes it; an unsigned version is replaced in the same way."""
    old = project.register()
    project.promote(old)
    monkeypatch.setenv(signing.PRIVATE_KEY, str(make_key(project.paths.root, "new")))
    project.with_settings(promote={"require_signature": "new.pub"})
    with pytest.raises(signing.SignatureError):
        versions.download(project.settings, project.paths, f"models:/{NAME}/{old}", project.paths.root / "download")
    anew = versions.register(project.settings, project.paths)
    assert project.versions() == [old, anew]
    assert project.version(anew).tags["weights_sha256"] == project.version(old).tags["weights_sha256"]
    project.promote(anew)
    assert versions.register(project.settings, project.paths) == anew


def test_without_the_setting_a_key_signs_and_nothing_is_required(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.with_settings(promote={"require_signature": None})
    signed = project.register()
    monkeypatch.delenv(signing.PRIVATE_KEY)
    unsigned = project.register(seed=1)
    monkeypatch.setenv(signing.PRIVATE_KEY, "missing.pem")
    with pytest.raises(UserError, match=r"^D2R_SIGNING_KEY: missing\.pem is not the file of"):
        project.register(seed=2)
    assert project.versions() == [signed, unsigned]
    monkeypatch.delenv(signing.PRIVATE_KEY)
    for version, expected in ((signed, True), (unsigned, False)):
        assert (logged_model_folder(project.version(version)) / "model.sig").is_file() is expected
        project.promote(version)


def test_client_that_names_a_key_loads_what_it_signed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the setting is not known, and from a folder without a registry, as in a container."""
    version, folder = project.register(), project.paths.root / "downloaded"
    integrity.fetch(project.version(version), folder, None)
    (folder / integrity.CLIENT_FILE).unlink(missing_ok=True)
    monkeypatch.setenv(signing.PUBLIC_KEY, "own.pub")
    for uri in (f"models:/{NAME}/{version}", str(folder)):
        mlflow.pyfunc.load_model(uri)
    make_key(project.paths.root, "other")
    monkeypatch.setenv(signing.PUBLIC_KEY, "other.pub")
    for uri in (f"models:/{NAME}/{version}", str(folder)):
        with pytest.raises(
            signing.SignatureError, match=r"its signature is not one of these files by the key other\.pub"
        ):
            mlflow.pyfunc.load_model(uri)
    monkeypatch.setenv(signing.PUBLIC_KEY, "missing.pub")
    with pytest.raises(UserError, match=r"^D2R_PUBLIC_KEY: there is no file missing\.pub\.$"):
        mlflow.pyfunc.load_model(str(folder))
