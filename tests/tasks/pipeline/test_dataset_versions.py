"""`d2r data`: versions of a user's own data in DVC, and the error message when their content is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import scratch_project as scratch
import yaml
from photos import make_folder, photo
from project import commit, copy_project, git

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.pipeline import dataset_versions, dvc


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh checkout in git whose params.yaml refers to the data set pets, which does not exist yet."""
    root = tmp_path / "project"
    root.mkdir()
    copy_project(root)
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["prepare"].update(source="image_folder", path="data/raw/pets")
    (root / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    commit(root)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def run_dvc(root: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout


def d2r(root: Path, *arguments: str, code: int = 0) -> str:
    process = subprocess.run(scratch.d2r(*arguments), cwd=root, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_the_life_cycle_of_a_data_set(project: Path, photos: Path, tmp_path: Path) -> None:
    output = d2r(project, "data", "add", str(photos), "--name", "pets")
    assert "params.yaml:" not in output, "it is what params.yaml uses"
    assert [path.name for path in (project / "data/raw/pets").iterdir()] == ["pets.zip"]
    assert git(project, "status", "--porcelain").split() == ["??", "data/raw/.gitignore", "??", "data/raw/pets.dvc"]
    first = (project / "data/raw/pets/pets.zip").read_bytes()
    assert "used by params.yaml" in d2r(project, "data", "list")
    commit(project)
    assert "stage prepare: ran" in d2r(project, "stage", "prepare")
    assert "prepare" not in dvc.status(Paths(project)), "nothing new"

    # The same files with other modification times are the same version.
    for file in photos.rglob("*.png"):
        file.touch()
    assert "already has this content" in d2r(project, "data", "add", str(photos), "--name", "pets")

    photo(77).save(photos / "train/cat/77.png")
    (photos / "train/dog/00.png").unlink()
    (photos / "train/cat/01.png").rename(photos / "train/dog/was_a_cat.png")
    assert "`--force` makes this its new version" in d2r(project, "data", "add", str(photos), "--name", "pets", code=1)
    assert (project / "data/raw/pets/pets.zip").read_bytes() == first
    d2r(project, "data", "add", str(photos), "--name", "pets", "--force")
    assert "data/raw/pets" in str(dvc.status(Paths(project))["prepare"]), "a scheduled run sees new data"
    assert d2r(project, "data", "diff", "pets@HEAD", "pets").splitlines() == [
        "added: 1",
        "  train/cat/77.png",
        "removed: 1",
        "  train/dog/00.png",
        "relabelled: 1",
        "  train/cat/01.png -> train/dog/was_a_cat.png",
        "same: 16",
    ]
    assert d2r(project, "data", "diff", "pets", str(photos)).endswith("same: 18\n")

    # Pushed, removed locally, and fetched by the stage that needs it; then removed everywhere.
    run_dvc(project, "remote", "add", "--default", "local", str(tmp_path / "remote"))
    run_dvc(project, "push")
    second = (project / "data/raw/pets/pets.zip").read_bytes()
    for folder in (project / "data/raw/pets", project / ".dvc/cache"):
        shutil.rmtree(folder)
    assert "not present (run `dvc pull`)" in d2r(project, "data", "list")
    d2r(project, "stage", "prepare")
    assert (project / "data/raw/pets/pets.zip").read_bytes() == second
    for folder in (project / "data/raw/pets", project / ".dvc/cache", tmp_path / "remote/files"):
        shutil.rmtree(folder)
    assert d2r(project, "stage", "prepare", code=1) == (
        "error: data/raw/pets: is tracked by DVC (data/raw/pets.dvc), but neither the local cache nor the remote has "
        "its content. Run `dvc push` where the data is available, or configure the remote (`dvc remote add -d`).\n"
    )


@pytest.mark.slow
def test_what_add_prints_can_be_pasted(project: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copy(project / "presets/digits.yaml", project / "params.yaml")
    commit(project)
    run_dvc(project, "remote", "add", "--default", "local", str(tmp_path / "remote"))
    output = d2r(project, "data", "add", str(photos), "--name", "pets")
    lines = output.splitlines()

    # What a person does: these lines in place of the section's own.
    params = project / "params.yaml"
    for pasted in (line for line in lines if re.match(r"  \w+: ", line)):
        key = pasted.split(":")[0]
        text, count = re.subn(rf"^{key}:.*$", pasted, params.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        assert count == 1
        params.write_text(text, encoding="utf-8")
    commands = [line.strip() for line in lines if line.startswith("    ")]
    assert commands[0] == "d2r run"
    assert "stage prepare: ran" in d2r(project, "stage", "prepare")
    who = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    who |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in who.items()}
    environment = {**os.environ, **who, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e"], input="\n".join(commands[1:]), cwd=project, env=environment, text=True, check=True)
    assert git(project, "status", "--porcelain", "data", "params.yaml") == ""

    # It is all that another checkout needs.
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(project), str(clone))
    run_dvc(clone, "remote", "add", "--default", "local", str(tmp_path / "remote"))
    assert "stage prepare: ran" in d2r(clone, "stage", "prepare")


def test_a_folder_is_packed_to_the_same_bytes_and_without_system_files(photos: Path, tmp_path: Path) -> None:
    (photos / ".DS_Store").write_text("a file of the system")
    packed = []
    for number in range(2):
        new = tmp_path / str(number)
        new.mkdir()
        dataset_versions._pack(photos, new, "pets")
        packed.append((new / "pets.zip").read_bytes())
        for file in photos.rglob("*.png"):
            file.chmod(0o600)
            file.touch()
    assert packed[0] == packed[1]
    with ZipFile(tmp_path / "0/pets.zip") as archive:
        assert archive.namelist() == sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.png"))


def test_archives_are_copied_unchanged(photos: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for split in ("train", "test"):
        shutil.make_archive(str(parts / split), "zip", photos, split)
    single, both = tmp_path / "single", tmp_path / "both"
    single.mkdir()
    both.mkdir()
    dataset_versions._pack(parts / "train.zip", single, "pets")
    dataset_versions._pack(parts, both, "pets")
    assert (single / "train.zip").read_bytes() == (parts / "train.zip").read_bytes()
    assert sorted(path.name for path in both.iterdir()) == ["test.zip", "train.zip"]
    difference = dataset_versions.compare(str(photos), str(both), Paths())
    assert (difference.unchanged, difference.added, difference.removed) == (18, [], [])


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("missing", "pets", "missing: does not exist"),
        ("photos", "../pets", "--name '../pets': a name may contain letters"),
        ("photos", "", "--name '': a name may contain letters"),
        ("empty", "pets", "empty: contains no files"),
        ("text.txt", "pets", "text.txt: is neither a folder nor an archive"),
        ("linked", "pets", "is a link"),
        ("photos", "mine", "exists and is not tracked by DVC"),
    ],
)
def test_an_invalid_source_is_one_message_and_leaves_nothing(
    tmp_path: Path, photos: Path, source: str, name: str, message: str
) -> None:
    root = tmp_path / "project"
    (root / "data/raw/mine").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/a.png").symlink_to(photos / "train/cat/00.png")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(".", r"\.")):
        dataset_versions.add(tmp_path / source, name, Paths(root), force=False)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("exists", [True, False])
def test_if_dvc_fails_the_previous_state_is_restored(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    root = tmp_path / "project"
    (root / "data/raw").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    if exists:
        (root / "data/raw/pets").mkdir()
        (root / "data/raw/pets/pets.zip").write_bytes(b"the old version")
        (root / "data/raw/pets.dvc").write_text("outs: []\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def fail(arguments: list[str], paths: Paths) -> list[str]:
        (root / "data/raw/pets.dvc").write_text("half")
        (root / "data/raw/.gitignore").write_text("half")
        raise dvc.BusyError("another DVC process is running")

    monkeypatch.setattr(dvc, "run_dvc", fail)
    with pytest.raises(UserError, match="another DVC process"):
        dataset_versions.add(photos, "pets", Paths(root), force=True)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_an_invalid_reference_is_one_message(project: Path, photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no archive")
    for name, message in (
        ("dogs", "dogs: is neither a path nor a data set; the data sets are: none"),
        ("a/b", "a/b: does not exist"),
        ("pets@HEAD", "pets@HEAD: git has no such version"),
        (str(broken), "broken.zip"),
    ):
        with pytest.raises(UserError, match=message):
            dataset_versions.compare(name, str(photos), Paths(project))


def test_an_empty_list_explains_how_to_add_a_data_set(project: Path) -> None:
    assert "d2r data add PATH --name NAME" in d2r(project, "data", "list")
