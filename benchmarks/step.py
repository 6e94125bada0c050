"""One D2R + CAG training step: written naively from the method's definition, then each improvement in turn.

    python benchmarks/step.py --model preact_resnet18 --batch 32 --rounds 5 [--compile] [--published CHECKOUT]

All variants start from the same weights and take turns in one process, so that what else the machine does hits them
alike; medians and ratios are what counts. On a CPU with one thread, seconds are of CPU time, which other processes
disturb least; else of wall time. FLOPs are counted as direct convolutions do them, so Winograd's algorithm can
go beyond the measured rate of a matrix product in the same precision.
"""

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from d2r_core import models, runtime
from d2r_core.attacks import cag
from d2r_core.models.winograd import Conv3x3
from d2r_core.training.methods import D2R, AttackParameters

ATTACK: AttackParameters = {"eps": 0.031, "step_size": 0.007, "steps": 10}
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # x, y, noise -> loss, adversarial images


@dataclass
class Variant:
    """A way to do the step, and what was measured of it."""

    name: str
    step: Step
    precision: runtime.Precision = "fp32"
    memory_format: torch.memory_format = torch.channels_last
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0  # of the first step
    x_adv: Tensor | None = None
    memory: int = 0  # bytes on a GPU, beyond what was allocated before the step


def optimizer_of(*modules: nn.Module, fused: bool) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=2e-4, fused=fused)


def naive_step(target: nn.Module, guidance: nn.Module) -> Step:
    """The definition, word for word: the guidance asked again in every attack step, default layout, eager, fp32."""
    optimizer = optimizer_of(target, guidance, fused=False)

    def step(x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        target.eval()
        guidance.eval()
        x_adv = x + 0.001 * noise
        for _ in range(ATTACK["steps"]):
            x_adv.requires_grad_()
            p = guidance(x).softmax(1)
            divergence = (p * torch.log(p + 1e-5) - p * target(x_adv).log_softmax(1)).sum()
            (gradient,) = torch.autograd.grad(divergence, x_adv)
            x_adv = x_adv.detach() + ATTACK["step_size"] * gradient.sign()
            x_adv = torch.clamp(torch.clamp(x_adv, x - ATTACK["eps"], x + ATTACK["eps"]), 0, 1)
        target.train()
        guidance.train()
        a, n, t = target(x_adv), target(x), guidance(x)

        def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
            p = p_logits.softmax(1)
            return (p * torch.log(p + 1e-5) - p * q_logits.log_softmax(1)).mean()

        loss = F.cross_entropy(t, y) + F.mse_loss(a, t) + 20 * (kl(n, t) - kl(t, n)).abs() + 30 * kl(a, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), x_adv

    return step


def published_step(checkout: Path, target: nn.Module, guidance: nn.Module) -> Step:
    """The authors' own function, from a checkout of their repository, on our models."""
    spec = importlib.util.spec_from_file_location("published", checkout / "D2R" / "D2R.py")
    assert spec is not None
    assert spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    optimizer = optimizer_of(target, guidance, fused=False)

    def step(x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, None]:
        # It draws its noise itself and sends it to a GPU: here it gets ours, where it is.
        with patch("torch.randn", lambda *_: noise), patch.object(Tensor, "cuda", lambda tensor: tensor):
            loss = published.D2R_loss(
                target, guidance, x, y, optimizer, ATTACK["step_size"], ATTACK["eps"], ATTACK["steps"]
            )
        loss.backward()
        optimizer.step()
        return loss.detach(), None

    return step


def our_step(method: D2R, precision: runtime.Precision, device: torch.device) -> Step:
    """The step as Trainer.train_step does it."""
    optimizer = optimizer_of(method, fused=True)

    def step(x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        method.train()
        with runtime.autocast(device, precision):
            x_adv = cag.generate(method.model, method.guidance, x, noise=noise, **ATTACK)
            optimizer.zero_grad(set_to_none=True)
            loss = method(x, x_adv, y)["total"]
        loss.backward()
        optimizer.step()
        return loss.detach(), x_adv

    return step


def variants(
    target: nn.Module, guidance: nn.Module, device: torch.device, *, compiles: bool, published: Path | None
) -> list[Variant]:
    """The naive step and ours, each on its own copy of the models."""

    def pair(*, winograd: bool = False) -> tuple[nn.Module, nn.Module]:
        target_copy, guidance_copy = copy.deepcopy(target), copy.deepcopy(guidance)
        for module in [*target_copy.modules(), *guidance_copy.modules()]:
            if isinstance(module, Conv3x3) and not winograd:
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
        return target_copy, guidance_copy

    def ours(
        name: str,
        *,
        precision: runtime.Precision = "fp32",
        memory_format: torch.memory_format = torch.channels_last,
        winograd: bool = False,
        compiled: bool = False,
    ) -> Variant:
        method = D2R(*pair(winograd=winograd), attack=ATTACK, clean_weight=20.0, adv_weight=30.0)
        method.to(memory_format=memory_format)
        runtime.compile_models(method, compile="on" if compiled else "off", device=device)
        return Variant(name, our_step(method, precision, device), precision, memory_format)

    plain = torch.contiguous_format
    measured = [Variant("naive", naive_step(*pair()), memory_format=plain)]
    if published is not None:
        measured.append(Variant("published code", published_step(published, *pair()), memory_format=plain))
    measured.append(ours("+ guidance once, fused SGD", memory_format=plain))
    measured.append(ours("+ channels last"))
    if device.type == "cpu":
        measured.append(ours("+ Winograd", winograd=True))
    if compiles:
        measured.append(ours("+ compiled" if device.type == "cuda" else "compiled instead of Winograd", compiled=True))
    if device.type == "cuda":
        measured.append(ours("+ TF32", precision="tf32", compiled=compiles))
        measured.append(ours("+ bf16", precision="bf16", compiled=compiles))
    return measured


def seconds(work: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def measure(measured: Sequence[Variant], x: Tensor, y: Tensor, noise: Tensor, rounds: int) -> None:
    """Let the variants take turns; the first round compiles, warms up and is what is compared, not timed."""
    device = x.device
    for done in range(rounds + 1):
        for variant in measured:
            runtime.set_precision(variant.precision)
            images, draw = (tensor.contiguous(memory_format=variant.memory_format) for tensor in (x, noise))
            if done == 0:
                loss, variant.x_adv = variant.step(images, y, draw)
                variant.loss = float(loss)
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            variant.seconds.append(seconds(partial(variant.step, images, y, draw), device))
            if device.type == "cuda":
                variant.memory = torch.cuda.max_memory_allocated() - before


def matmul_rate(device: torch.device, precision: runtime.Precision) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    runtime.set_precision(precision)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


class Flops(TorchDispatchMode):
    """Counts inside the block. PyTorch's FlopCounterMode hooks modules, which breaks gradients of the images."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def table(measured: Sequence[Variant], batch: int, device: torch.device, flops: Mapping[str, int]) -> str:
    naive, ours = measured[0], flops["+ guidance once, fused SGD"]
    rates = {precision: matmul_rate(device, precision) for precision in {variant.precision for variant in measured}}
    memory = " memory, GiB |" if device.type == "cuda" else ""
    lines = [
        "| variant | s/step | times naive | images/s | TFLOP | TFLOP/s | of matmul "
        f"|{memory} loss differs | pixels differ |",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * bool(memory),
    ]
    for variant in measured:
        median, work = statistics.median(variant.seconds), flops.get(variant.name, ours)
        pixels = "" if variant.x_adv is None else f"{differing(variant.x_adv, naive.x_adv):.2%}"
        lines.append(
            f"| {variant.name} | {median:.4g} | {statistics.median(naive.seconds) / median:.2f} | {batch / median:.1f} "
            f"| {work / 1e12:.3f} | {work / median / 1e12:.3g} | {work / median / rates[variant.precision]:.0%} "
            + (f"| {variant.memory / 2**30:.1f} " if memory else "")
            + f"| {abs(variant.loss / naive.loss - 1):.0e} | {pixels} |"
        )
    return "\n".join(lines)


def differing(x_adv: Tensor, other: Tensor | None) -> float:
    """The share of the values that differ by more than rounding: the gradient's sign flips where it is nearly zero."""
    assert other is not None
    return float(((x_adv - other).abs() > 1e-6).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["preact_resnet18", "wide_resnet"], default="preact_resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also compiled: minutes on a CPU")
    parser.add_argument("--published", type=Path, help="a checkout of the authors' repository, lusti-Yu/D2R")
    arguments = parser.parse_args()
    device = runtime.device("auto")
    torch.manual_seed(0)
    size: dict[str, Any] = {"depth": 34, "widen_factor": 10} if arguments.model == "wide_resnet" else {}
    target = models.build(arguments.model, num_classes=10, **size).to(device)
    guidance = models.build("resnet18", num_classes=10).to(device)
    x = torch.rand(arguments.batch, 3, 32, 32, device=device)
    y, noise = torch.randint(10, (arguments.batch,), device=device), torch.randn_like(x)
    measured = variants(target, guidance, device, compiles=arguments.compile, published=arguments.published)
    measure(measured, x, y, noise, arguments.rounds)
    flops = {}
    for variant in measured:
        if variant.name in ("naive", "published code", "+ guidance once, fused SGD"):
            with Flops() as counter:
                variant.step(x[:1], y[:1], noise[:1])
            flops[variant.name] = counter.total * arguments.batch
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.model}, ResNet-18 guidance, batch {arguments.batch}, {ATTACK['steps']} attack steps; {machine}, "
        f"torch {torch.__version__}, median of {arguments.rounds} rounds\n"
    )
    print(table(measured, arguments.batch, device, flops))


if __name__ == "__main__":
    main()
