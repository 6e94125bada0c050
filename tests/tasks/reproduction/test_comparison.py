"""What differs between then and now is named."""

import hashlib
from importlib import metadata
from pathlib import Path

import pytest
import robustness_json
import torch
import yaml
from safetensors.torch import save_file

from d2r_core.errors import UserError
from tasks.config.paths import Paths
from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry.provenance import FILE, Provenance
from tasks.reproduction import comparison
from tasks.tracking.environment import current_environment


def save(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_weights_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    bias, weight = torch.zeros(3), torch.arange(6.0).reshape(2, 3)
    recorded = save(tmp_path / "recorded", bias=bias, weight=weight)
    same = comparison.weights("target", recorded, save(tmp_path / "same", bias=bias, weight=weight))
    assert same.same
    assert same.recorded_sha256 == hashlib.sha256(recorded.read_bytes()).hexdigest()
    changed = weight.clone()
    changed[1, 2] += 0.25
    other = comparison.weights("target", recorded, save(tmp_path / "changed", bias=bias, weight=changed))
    assert not other.same
    assert other.difference == "1 of 2 tensors differ, by up to 0.25"
    smaller = comparison.weights("target", recorded, save(tmp_path / "smaller", bias=bias, weight=weight[:1].clone()))
    assert smaller.difference == "another architecture"


def report(path: Path, **attacks: float) -> RobustnessReport:
    figures = {name: robustness_json.figures(name, accuracy, 20) for name, accuracy in attacks.items()}
    content = robustness_json.content({"target": robustness_json.model("0", figures, ())}, data="0", settings_hash="0")
    robustness_json.write(path, content)
    return RobustnessReport.read(path)


def test_figures_are_compared_attack_by_attack(tmp_path: Path) -> None:
    recorded = report(tmp_path / "recorded.json", clean=0.9, pgd=0.5, worst=0.5)
    reproduced = report(tmp_path / "reproduced.json", clean=0.9, pgd=0.55, worst=0.5, cw=0.6)
    result = {figure.attack: figure.same for figure in comparison.figures(recorded, reproduced)}
    assert result == {"clean": True, "pgd": False, "worst": True, "cw": False}


def test_environments_are_compared_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("a lock")
    here = current_environment(Paths(tmp_path), torch.device("cpu"), "fp32")
    assert here.requirements_lock == hashlib.sha256(b"a lock").hexdigest()
    assert (here.torch, here.gpu, here.threads) == (torch.__version__, None, torch.get_num_threads())
    assert comparison.environments(here, here) == []
    then = here.model_copy(update={"torch": "1.0", "requirements_lock": None})
    assert comparison.environments(then, here) == [
        f"torch: 1.0 recorded, {here.torch} here",
        f"requirements lock: None recorded, {here.requirements_lock} here",
    ]


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    numpy = metadata.version("numpy")
    lock.write_text(
        f"numpy==0.1 ; python_version < '3' \\\n    --hash=x\nnumpy=={numpy} \\\n    --hash=y\nabsent==1.0\n"
    )
    assert comparison.packages(lock) == []
    lock.write_text("numpy==0.1 \\\n    --hash=x\n")
    assert comparison.packages(lock) == [f"packages other than in requirements.lock: numpy 0.1, here {numpy}"]
    assert comparison.packages(tmp_path / "absent.lock") == []


def test_code_is_compared_with_dvc_lock(tmp_path: Path) -> None:
    def lock(name: str, attacks: str, data: str) -> Path:
        deps = [{"path": "d2r_core/attacks", "md5": attacks}, {"path": "models/target.json", "md5": data}]
        (tmp_path / name).write_text(yaml.safe_dump({"stages": {"evaluate": {"deps": deps}}}))
        return tmp_path / name

    recorded = lock("recorded", "1", "1")
    assert comparison.code(recorded, lock("same", "1", "2"), ["evaluate"]) == []
    assert comparison.code(recorded, lock("other", "2", "1"), ["evaluate"]) == [
        "code: d2r_core/attacks is not as recorded in dvc.lock for the stage evaluate"
    ]


def test_a_version_without_provenance_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^digits version 3 has no provenance: an older release registered it"):
        Provenance.read(tmp_path, "digits version 3")
    (tmp_path / FILE).write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"^digits version 3: its provenance\.json is in a format"):
        Provenance.read(tmp_path, "digits version 3")
