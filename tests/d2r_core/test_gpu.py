"""What only a GPU can show. `python tests/d2r_core/test_gpu.py` runs it where there is no pytest either."""

import sys
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import toy
from torch import Tensor

from d2r_core import data, models, runtime
from d2r_core.attacks import PGD
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import run_attack
from d2r_core.interruption import Interrupted
from d2r_core.runtime import Compile, Precision
from d2r_core.training.methods import D2R, Attack

ATTACK: Attack = {"eps": 0.031, "step_size": 0.007, "steps": 5}

if not torch.cuda.is_available():
    if __name__ == "__main__":
        print("skipped: PyTorch sees no GPU here")
        sys.exit()
    raise unittest.SkipTest("needs a GPU: PyTorch sees none here")

GPU = torch.device("cuda")


def objective(device: torch.device, *, compile: Compile = "off", precision: Precision = "fp32") -> D2R:
    """The published architectures with the same weights on every device."""
    torch.manual_seed(0)
    pair = models.build("preact_resnet18", num_classes=10), models.build("resnet18", num_classes=10)
    made = D2R(*pair, attack=ATTACK, clean_weight=20.0, adv_weight=30.0)
    made.to(device).to(memory_format=torch.channels_last)
    runtime.set_precision(precision)
    runtime.compile_models(made, compile=compile, device=device)
    return made.train()


def batch(device: torch.device, count: int = 64) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    x, y = torch.rand(count, 3, 32, 32, generator=stream), torch.randint(10, (count,), generator=stream)
    return x.to(device, memory_format=torch.channels_last), y.to(device)


def loss_and_gradient(made: D2R, x: Tensor, x_adv: Tensor, y: Tensor, precision: Precision) -> tuple[float, Tensor]:
    with runtime.autocast(x.device, precision):
        total = made(x, x_adv, y)["total"]
    total.backward()
    gradients = [parameter.grad.flatten() for parameter in made.parameters() if parameter.grad is not None]
    return float(total.detach()), torch.cat(gradients).double().cpu()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_fp32_agrees_with_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), GPU):
        x, y = batch(device, 16)
        found.append(loss_and_gradient(objective(device), x, (x + 0.02).clamp(0, 1), y, "fp32"))
    (cpu_loss, cpu_gradient), (gpu_loss, gpu_gradient) = found
    assert abs(gpu_loss - cpu_loss) < 1e-4 * abs(cpu_loss), (gpu_loss, cpu_loss)
    assert cosine(cpu_gradient, gpu_gradient) > 0.9999


def test_each_faster_way_stays_near_eager_fp32() -> None:
    x, y = batch(GPU)
    x_adv = objective(GPU).perturb(x, y, runtime.generator(0, GPU))
    true_loss, true_gradient = loss_and_gradient(objective(GPU), x, x_adv, y, "fp32")
    ways: list[tuple[Compile, Precision, float, float]] = [
        ("on", "fp32", 1e-3, 0.999),
        ("off", "tf32", 1e-2, 0.99),
        ("off", "bf16", 5e-2, 0.9),
        ("on", "bf16", 5e-2, 0.9),
    ]
    for compile, precision, tolerance, alike in ways:
        made = objective(GPU, compile=compile, precision=precision)
        loss, gradient = loss_and_gradient(made, x, x_adv, y, precision)
        assert abs(loss - true_loss) < tolerance * abs(true_loss), (compile, precision, loss, true_loss)
        assert cosine(true_gradient, gradient) > alike, (compile, precision, cosine(true_gradient, gradient))


def test_images_stay_in_the_ball_in_every_precision() -> None:
    x, y = batch(GPU)
    ways: list[tuple[Compile, Precision]] = [("off", "fp32"), ("off", "bf16"), ("on", "bf16")]
    for compile, precision in ways:
        with runtime.autocast(GPU, precision):
            made = objective(GPU, compile=compile, precision=precision)
            x_adv = made.perturb(x, y, runtime.generator(0, GPU))
        assert x_adv.dtype == torch.float32
        assert float((x_adv - x).abs().max()) <= ATTACK["eps"] + 1e-6
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1


def test_a_step_does_not_wait_for_the_device() -> None:
    made = objective(GPU, precision="bf16")
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9, fused=True)
    x, y = batch(GPU)
    stream = runtime.generator(0, GPU)

    def step() -> None:
        with runtime.autocast(GPU, "bf16"):
            x_adv = made.perturb(x, y, stream)
            optimizer.zero_grad(set_to_none=True)
            total = made(x, x_adv, y)["total"]
        total.backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_streamed_batch_is_the_resident_one() -> None:
    split = toy.split(0)
    index = torch.randperm(len(split))[:32]
    resident, streamed = (
        data.load_batch(where, index, GPU, padding=2, flip=True, generator=runtime.generator(1, GPU))
        for where in (split.to(GPU), split)
    )
    assert torch.equal(resident.images, streamed.images)
    assert torch.equal(resident.labels, streamed.labels)


def test_an_interrupted_training_learns_as_well() -> None:
    def train(**changes: Any) -> float:
        made = toy.d2r().to(GPU)
        kept, _ = toy.fit(made, device=GPU, epochs=6, precision="bf16", **changes)
        return kept.metrics["robust_accuracy"]

    whole = train()
    with TemporaryDirectory() as folder:
        interruptions = 0
        while True:
            try:
                pieces = train(state_folder=Path(folder), max_minutes=0.0 if interruptions < 5 else None)
                break
            except Interrupted:
                interruptions += 1
    assert interruptions == 5
    # Not bitwise: convolutions on a GPU sum in changing orders.
    assert abs(whole - pieces) <= 0.25, (whole, pieces)


def test_evaluation_is_the_cpus() -> None:
    split, model = toy.split(1, 64), toy.network(0).eval()
    attack = PGD(eps=0.1, step_size=0.025, steps=5)
    results = [
        run_attack(model.to(device), split, attack, EvaluationConfig(batch_size=size, seed=0, device=device))
        for device, size in ((toy.CPU, 64), (GPU, 64), (GPU, 24))
    ]
    cpu, gpu, other = (result.predictions for result in results)
    assert (cpu != gpu).sum() <= 2
    assert (other != gpu).sum() <= 2


if __name__ == "__main__":
    tests = {name: test for name, test in list(globals().items()) if name.startswith("test_")}
    for name, test in tests.items():
        test()
        print(f"- passed: {name.removeprefix('test_').replace('_', ' ')}", flush=True)
