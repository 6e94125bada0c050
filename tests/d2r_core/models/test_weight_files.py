"""Weights are found in what the field wraps them in, and no code of a file is run to get there."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from d2r_core import models
from d2r_core.errors import UserError

ARCHITECTURE: dict[str, Any] = {"name": "wide_resnet", "num_classes": 10, "depth": 10, "widen_factor": 1}
NORMALIZATION = {"mean": torch.tensor([0.5, 0.25, 0.125]), "std": torch.tensor([0.5, 0.5, 0.25])}


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return models.build(**ARCHITECTURE).state_dict()


def loaded(path: Path, key: str | None = None, **architecture: Any) -> dict[str, Tensor]:
    model = models.build(**ARCHITECTURE, **architecture)
    models.load_weights(model, path, key=key)
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def averaged() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return AveragedModel(models.build(**ARCHITECTURE)).state_dict()


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    "content",
    [
        averaged(),
        *({entry: state(), "epoch": 3} for entry in ("ema", "ema_state_dict", "model_ema", "state", "weights", "last")),
        {"state": {"model": state(), "optimizer": OPTIMIZER}, "optimizer": OPTIMIZER},
        {"model_ema": averaged()},
        {"model": state(), "best": np.float64(0.5), "epoch": np.int64(3), "history": np.arange(3.0)},
        {"model": state(), "args": Namespace(lr=0.1, layers=[1, 2], best=np.float32(0.5))},
        {f"module.1.{name}": tensor for name, tensor in state().items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_wrapper_is_opened(content: object, zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "wrapped.pt", _use_new_zipfile_serialization=zipped)
    assert same(loaded(tmp_path / "wrapped.pt"), state())


class Marker:
    """Leaves a file when it is made from a pickle."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_skipped_runs_no_code(tmp_path: Path, zipped: bool) -> None:
    Marker.path = tmp_path / "ran"
    content = {"model": state(), "args": Namespace(hook=Marker()), "best": np.float64(1)}
    torch.save(content, tmp_path / "code.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="it is a pickle that asks for getattr, and code from a file is never run"):
        loaded(tmp_path / "code.pt")
    assert not Marker.path.exists()


def test_a_file_with_several_weights_asks_which(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save({"state": {"model": state(1), "ema": state(2)}, "optimizer": OPTIMIZER}, path)
    with pytest.raises(UserError, match=r"holds 2 sets of weights: state\.model, state\.ema\. Say which one: --key"):
        loaded(path)
    with pytest.raises(UserError, match="holds 2 sets"):
        loaded(path, "state")
    with pytest.raises(UserError, match=r"--key swa: has no weights there; it has them under state\.model, state\.ema"):
        loaded(path, "swa")
    assert same(loaded(path, "state.ema"), state(2))
    assert same(loaded(path, "state.model"), state(1))


def test_names_that_are_one_without_their_prefixes_are_refused(tmp_path: Path) -> None:
    both = {f"{prefix}{name}": tensor for prefix in ("model.", "module.") for name, tensor in state().items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(UserError, match=r"holds conv1\.weight more than once, as model\.conv1\.weight and module\."):
        loaded(tmp_path / "both.pt")


@pytest.mark.parametrize(
    ("mean", "std", "prefix"),
    [("mu", "sigma", ""), ("0.mean", "0.std", "1."), ("normalize.mean", "normalize.std", "model.")],
)
def test_a_normalisation_in_the_file_must_be_the_models(mean: str, std: str, prefix: str, tmp_path: Path) -> None:
    own = {mean: NORMALIZATION["mean"].view(1, 3, 1, 1), std: NORMALIZATION["std"].view(1, 3, 1, 1)}
    torch.save(own | {f"{prefix}{name}": tensor for name, tensor in state().items()}, tmp_path / "normalised.pt")
    message = r"normalises its images.*: --mean 0\.5,0\.25,0\.125 --std 0\.5,0\.5,0\.25$"
    for other in (None, "per_image", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}):
        with pytest.raises(UserError, match=message):
            loaded(tmp_path / "normalised.pt", normalization=other)
    values = {name: value.tolist() for name, value in NORMALIZATION.items()}
    result = loaded(tmp_path / "normalised.pt", normalization=values)
    assert same({name.removeprefix("network."): tensor for name, tensor in result.items()}, state())
