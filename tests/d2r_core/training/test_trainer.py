"""The training engine and its parts: exact repetition, convergence on a toy, refusal of a loss that is not finite."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import ATTACK, CPU, d2r, fit, network, split

from d2r_core import checkpoint, data, runtime
from d2r_core.attacks import PGD, Clean, fgsm, pgd
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import margin
from d2r_core.attacks.run import Attack, accuracy_under, run_attack
from d2r_core.data import Split
from d2r_core.errors import UserError
from d2r_core.evaluation.probes import RandomStep
from d2r_core.models.winograd import Conv3x3, winograd
from d2r_core.training import schedules
from d2r_core.training.methods import Standard


def test_d2r_learns_the_toy_robustly_and_keeps_the_best_epoch() -> None:
    kept, logged = fit(d2r(), epochs=20)
    assert kept.metrics["robust_accuracy"] > 0.9
    best = max(row["robust_accuracy"] for row in logged)
    assert kept.metrics["robust_accuracy"] == best
    assert kept.epoch == max(row["epoch"] for row in logged if row["robust_accuracy"] == best)
    assert logged[-1]["loss"] < logged[0]["loss"]
    last = logged[-1]
    assert last["loss"] == pytest.approx(sum(last[term] for term in ("ce", "logit", "clean", "adv")), rel=1e-5)


def test_one_seed_gives_bitwise_the_same_weights_and_another_does_not() -> None:
    first, again, other = fit(d2r())[0].state, fit(d2r())[0].state, fit(d2r(), seed=1)[0].state
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_no_epochs_keep_the_start() -> None:
    model = network(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, logged = fit(Standard(model), epochs=0)
    assert kept.epoch == 0
    assert logged == []
    assert all(torch.equal(kept.state[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it() -> None:
    class Poisoned(Standard):
        steps = 0

        def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
            self.steps += 1
            terms = super().forward(x, x_adv, y)
            if self.steps == 6:
                self.before = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
                terms["total"] = terms["total"] * torch.nan
            return terms

    objective = Poisoned(network(0))
    with pytest.raises(UserError, match="epoch 2, step 2 of 4: the loss is not finite"):
        fit(objective)
    for name, parameter in objective.model.named_parameters():
        assert torch.equal(parameter, objective.before[name])


def test_the_step_schedule_is_the_published_one() -> None:
    factors = [schedules.factor("step", epoch, 100) for epoch in range(1, 101)]
    assert factors[0] == 0.2
    assert set(factors[1:75]) == {1.0}
    assert set(factors[75:90]) == {0.1}
    assert set(factors[90:]) == {0.01}


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_stays_in_the_ball_and_leaves_the_model_as_it_was(loss: Any) -> None:
    model = network(0).train()
    model.get_submodule("bn1").eval()  # a mixed mode must come back too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data.to_float(split(0).images), split(0).labels
    x_adv = pgd(model, x, y, loss=loss, **ATTACK)
    assert (x_adv - x).abs().max() <= ATTACK["eps"] + 1e-6
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    assert model.training
    assert not model.get_submodule("bn1").training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_attacks_grow_stronger_from_noise_to_fgsm_to_pgd_and_with_eps() -> None:
    kept, _ = fit(Standard(model := network(0)), epochs=3)
    model.load_state_dict(kept.state)
    images = split(2, 256)

    def accuracy(attack: Attack) -> float:
        return accuracy_under(model, images, attack, EvaluationConfig(batch_size=64, seed=0, device=CPU))

    eps = 0.15
    noise, one_step = accuracy(RandomStep(eps, "Linf")), accuracy(fgsm(eps))
    many_steps = accuracy(PGD(eps=eps, step_size=eps / 4, steps=20))
    assert accuracy(Clean()) >= noise >= one_step >= many_steps
    assert many_steps < noise
    assert accuracy(PGD(eps=1.0, step_size=0.1, steps=20)) == 0.0


def test_figures_do_not_depend_on_the_batch_size() -> None:
    model, images = network(0), split(2, 50)
    configs = (EvaluationConfig(batch_size=size, seed=3, device=CPU) for size in (7, 50))
    one, many = (run_attack(model, images, PGD(**ATTACK), config) for config in configs)
    assert torch.equal(one.predictions, many.predictions)
    torch.testing.assert_close(one.margins, many.margins, rtol=1e-4, atol=1e-5)


def test_margins_are_positive_exactly_where_the_model_is_right() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    torch.testing.assert_close(margin(logits, torch.tensor([0, 1])), torch.tensor([1.0, -2.0]))


def test_crops_and_flips_are_exact_shifts_of_each_image() -> None:
    images = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).reshape(2, 3, 5, 5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for seed in range(60):
        augmented = data.crop_and_flip(images, padding=2, flip=True, generator=runtime.generator(seed, CPU))
        for image in range(2):
            crops = {(i, j): padded[image, :, i : i + 5, j : j + 5] for i in range(5) for j in range(5)}
            matches = [
                (*shift, mirrored)
                for shift, crop in crops.items()
                for mirrored in (False, True)
                if torch.equal(augmented[image], crop.flip(-1) if mirrored else crop)
            ]
            assert matches, "not a shift of the image"
            seen.update(matches)
    assert len(seen) > 30, "shifts and mirrors vary"


def test_an_epoch_holds_every_image_once() -> None:
    numbered = Split(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 4, 4), torch.arange(10))
    generator = runtime.generator(0, CPU)
    order = torch.randperm(10, generator=generator)
    indices = data.shares(order, 4)
    assert [len(index) for index in indices] == [4, 4, 2]
    assert torch.equal(torch.cat(indices), order)
    halves = [data.shares(order, 4, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(indices, *halves, strict=True):
        assert len(parts[0]) == len(parts[1])
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    batch = data.load_batch(numbered, indices[0], CPU, padding=0, flip=False, generator=generator)
    assert torch.equal(batch.labels, indices[0])
    torch.testing.assert_close(batch.images[:, 0, 0, 0] * 255, batch.labels.float())


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


def test_a_balanced_order_has_balanced_prefixes() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 5)
    order = data.balanced_order(labels, seed=0)
    assert torch.equal(order.sort().values, torch.arange(35))
    assert labels[order[:15]].bincount().tolist() == [5, 5, 5]
    assert not torch.equal(order, data.balanced_order(labels, seed=1))


def test_a_checkpoint_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = network(0).eval()
    architecture = {"name": "wide_resnet", "depth": 10, "widen_factor": 1, "num_classes": 2, "image_size": 8}
    path = tmp_path / "target.safetensors"
    checkpoint.save(path, model, {"architecture": architecture})
    loaded, metadata = checkpoint.load(path, CPU)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    assert metadata["architecture"] == architecture
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["target.json", "target.safetensors"]

    checkpoint.save(tmp_path / "other.safetensors", network(1), {"architecture": architecture})
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"target\.safetensors: is not the file that target\.json describes"):
        checkpoint.load(path, CPU)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"target\.safetensors: cannot be read as weights"):
        checkpoint.load(path, CPU)
    (tmp_path / "target.json").unlink()
    with pytest.raises(UserError, match=r"target\.json: cannot be read"):
        checkpoint.load(path, CPU)


def test_a_damaged_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    with pytest.raises(UserError, match=r"train\.safetensors: cannot be read as prepared data"):
        data.load_split(path)
    data.save_split(path, Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(UserError, match=r"images are torch\.uint8 \(2, 1, 4, 4\); expected uint8 \(N, 3, H, W\)"):
        data.load_split(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_one_clear_message() -> None:
    with pytest.raises(UserError, match=r"runtime\.device is 'cuda', but PyTorch sees no GPU here"):
        runtime.device("cuda")


@pytest.mark.parametrize(("batch", "shape"), [(3, (128, 160, 8, 12)), (70, (160, 128, 12, 8))])
def test_winograd_is_the_convolution_to_rounding_with_its_gradients(batch: int, shape: tuple[int, ...]) -> None:
    channels, filters, height, width = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    weight = torch.randn(filters, channels, 3, 3, requires_grad=True)
    upstream = torch.randn(batch, filters, height, width)

    def results(convolve: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        y = convolve(x.to(dtype), weight.to(dtype))
        return y, *torch.autograd.grad(y, (x, weight), upstream.to(dtype))

    exact = results(partial(F.conv2d, padding=1), torch.float64)
    for found, expected in zip(results(winograd, torch.float32), exact, strict=True):
        assert (found - expected).norm() < 5e-6 * expected.norm()


def test_winograd_serves_wide_fp32_convolutions_alone() -> None:
    torch.manual_seed(0)
    for channels, stride, dtype, faster in (
        (128, 1, torch.float32, True),
        (16, 1, torch.float32, False),
        (128, 2, torch.float32, False),
        (128, 1, torch.float64, False),
    ):
        layer = Conv3x3(channels, channels, stride).to(dtype)
        x = torch.randn(16, channels, 8, 8, dtype=dtype)
        direct = nn.Conv2d.forward(layer, x)
        assert torch.equal(layer(x), direct) != faster
        torch.testing.assert_close(layer(x), direct, rtol=1e-4, atol=1e-4)


def test_a_split_on_the_device_is_not_streamed_whatever_the_device_is_called() -> None:
    """Training on a GPU asks for "cuda" and holds its split on "cuda:0"; here "cpu:0" and "cpu"."""
    images = Split(torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8), torch.arange(8))
    index = torch.arange(4)
    named, plain = (
        data.load_batch(images, index, device, padding=0, flip=False, generator=torch.Generator().manual_seed(0))
        for device in (torch.device("cpu", 0), torch.device("cpu"))
    )
    assert torch.equal(named.images, plain.images)
