"""The training loop: exact repetition, convergence on a toy, refusal of a loss that is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import CONFIG, CPU, VALIDATION_ATTACKS, d2r, fit, network, split, trainer

from d2r_core import data, runtime
from d2r_core.data import Split
from d2r_core.errors import UserError
from d2r_core.training.config import TrainingConfig
from d2r_core.training.methods import Standard
from d2r_core.training.trainer import Trainer


def test_d2r_learns_the_toy_robustly_and_returns_the_best_epoch() -> None:
    best, logged = fit(d2r(), epochs=20)
    assert best.metrics["robust_accuracy"] > 0.9
    highest = max(row["robust_accuracy"] for row in logged)
    assert best.metrics["robust_accuracy"] == highest
    assert best.epoch == max(row["epoch"] for row in logged if row["robust_accuracy"] == highest)
    assert logged[-1]["loss"] < logged[0]["loss"]
    last = logged[-1]
    assert last["loss"] == pytest.approx(sum(last[term] for term in ("ce", "logit", "clean", "adv")), rel=1e-5)


def test_one_seed_gives_bitwise_the_same_weights_and_another_does_not() -> None:
    first, again, other = fit(d2r())[0].state, fit(d2r())[0].state, fit(d2r(), seed=1)[0].state
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_without_epochs_the_initial_weights_are_returned() -> None:
    model = network(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best, logged = fit(Standard(model), epochs=0)
    assert best.epoch == 0
    assert logged == []
    assert all(torch.equal(best.state[name], before[name]) for name in before)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step_and_names_it(part: str) -> None:
    class Poisoned(Standard):
        steps = 0

        def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
            self.steps += 1
            terms = super().forward(x, x_adv, y)
            if self.steps == 6:
                self.before = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
                loss = terms["total"]
                # The root of 0 is finite, and its slope is not.
                terms["total"] = loss * torch.nan if part == "loss" else loss + (loss - loss.detach()).sqrt()
            return terms

    method = Poisoned(network(0))
    with pytest.raises(UserError, match="epoch 2, step 2 of 4: the loss or its gradient is not finite"):
        fit(method)
    for name, parameter in method.model.named_parameters():
        assert torch.equal(parameter, method.before[name])


def test_the_accuracy_that_selects_the_checkpoint_must_be_measured() -> None:
    with pytest.raises(ValueError, match="select_by is 'robust'; validation attacks: clean_accuracy, robust_accuracy"):
        Trainer(
            d2r(),
            split(0),
            split(1),
            TrainingConfig(**CONFIG),
            device=CPU,
            validation_attacks=VALIDATION_ATTACKS,
            select_by="robust",
        )


def test_any_accuracy_can_select_the_checkpoint() -> None:
    trainer = Trainer(
        Standard(network(0)),
        split(0),
        split(1),
        TrainingConfig(**{**CONFIG, "epochs": 2}),
        device=CPU,
        validation_attacks=VALIDATION_ATTACKS,
        select_by="clean_accuracy",
    )
    measured = iter([(0.9, 0.9), (0.5, 0.1), (0.4, 0.8)])  # before training, and after each epoch
    trainer.validate = lambda: dict(zip(VALIDATION_ATTACKS, next(measured), strict=True))  # type: ignore[method-assign]
    best = trainer.fit()
    assert best.epoch == 1, "the first epoch replaces the initial weights, and the second is worse on clean images"
    assert best.last_metrics == {"clean_accuracy": 0.4, "robust_accuracy": 0.8}


def test_data_streamed_from_a_file_train_bitwise_like_data_on_the_device(tmp_path: Path) -> None:
    # On a GPU through pinned memory; on a CPU from the file's pages, against a copy in memory.
    device = runtime.device("auto")
    for name, images in (("train", split(0)), ("validation", split(1, 64))):
        data.save_split(tmp_path / name, images)
    streamed = [data.load_split(tmp_path / name) for name in ("train", "validation")]
    resident = [Split(images.clone(), labels.clone()).to(device) for images, labels in streamed]
    options: Any = {"device": device, "flip": True, "epochs": 2}
    first, second = (fit(d2r().to(device), *splits, **options)[0].state for splits in (streamed, resident))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("which", ["train", "validation"])
def test_images_that_are_not_bytes_are_refused(which: str) -> None:
    """Floats may be in [0, 1], in [0, 255] or normalised: taken for bytes, they are other images."""
    splits = {"train": split(0), "validation": split(1)}
    splits[which] = Split(splits[which].images / 255, splits[which].labels)
    with pytest.raises(ValueError, match=r"images are torch\.float32 \(128, 3, 8, 8\); expected uint8 \(N, 3, H, W\)"):
        trainer(Standard(network(0)), splits["train"], splits["validation"])
