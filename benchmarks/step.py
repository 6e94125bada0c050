"""One D2R + CAG training step: written naively from the method's definition, then each improvement in turn.

    python benchmarks/step.py --model preact_resnet18 --batch 16 --rounds 5

All variants take turns in one process, so that what else the machine does hits them alike; medians and ratios are what
counts. FLOPs are counted, once for each variant; the machine's matrix rate is measured in the same precision.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2r_core import models, runtime
from d2r_core.objectives import D2R, Attack

ATTACK: Attack = {"eps": 0.031, "step_size": 0.007, "steps": 10}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Variant:
    """A way to do the step; `step` attacks, updates, and returns the loss."""

    name: str
    step: Step
    precision: runtime.Precision


def naive_step(target: nn.Module, guidance: nn.Module) -> Step:
    """The definition, word for word: the guidance asked again in every attack step, default layout, eager, fp32."""
    optimizer = torch.optim.SGD(
        [*target.parameters(), *guidance.parameters()], lr=1e-4, momentum=0.9, weight_decay=2e-4
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        target.eval()
        guidance.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
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
        return loss.detach()

    return step


def our_step(objective: D2R, precision: runtime.Precision, device: torch.device) -> Step:
    """The step as training.fit does it."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4, momentum=0.9, weight_decay=2e-4, fused=True)
    stream = runtime.generator(0, device)

    def step(x: Tensor, y: Tensor) -> Tensor:
        objective.train()
        with runtime.autocast(device, precision):
            x_adv = objective.perturb(x, y, stream)
            optimizer.zero_grad(set_to_none=True)
            loss = objective(x, x_adv, y)["total"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def variants(target: nn.Module, guidance: nn.Module, device: torch.device, compiles: bool) -> list[Variant]:
    """The naive step and ours, each on its own copy of the models."""

    def ours(*, channels_last: bool = True, compile: runtime.Compile = "off") -> D2R:
        pair = copy.deepcopy(target), copy.deepcopy(guidance)
        objective = D2R(*pair, attack=ATTACK, clean_weight=20.0, adv_weight=30.0)
        if channels_last:
            objective.to(memory_format=torch.channels_last)
        runtime.compile_models(objective, compile=compile, device=device)
        return objective

    found = [
        Variant("naive, fp32", naive_step(copy.deepcopy(target), copy.deepcopy(guidance)), "fp32"),
        Variant("+ guidance once", our_step(ours(channels_last=False), "fp32", device), "fp32"),
        Variant("+ channels last", our_step(ours(), "fp32", device), "fp32"),
    ]
    if compiles:
        found.append(Variant("+ compiled", our_step(ours(compile="on"), "fp32", device), "fp32"))
    if device.type == "cuda":
        found.append(Variant("+ TF32", our_step(ours(compile="on" if compiles else "off"), "tf32", device), "tf32"))
        found.append(Variant("+ bf16", our_step(ours(compile="on" if compiles else "off"), "bf16", device), "bf16"))
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matmul_rate(device: torch.device, precision: runtime.Precision) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    runtime.set_precision(precision)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def flops(step: Step, x: Tensor, y: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["preact_resnet18", "wide_resnet"], default="preact_resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    device = runtime.device("auto")
    torch.manual_seed(0)
    size = {"depth": 34, "widen_factor": 10} if arguments.model == "wide_resnet" else {}
    target = models.build(arguments.model, num_classes=10, **size).to(device)
    guidance = models.build("resnet18", num_classes=10).to(device)
    x, y = torch.rand(arguments.batch, 3, 32, 32, device=device), torch.randint(10, (arguments.batch,), device=device)
    found = variants(target, guidance, device, compiles=not arguments.no_compile)
    # A compiled step does the work of the eager one, which is counted for it.
    work = {"naive, fp32": flops(found[0].step, x, y)}
    ours = flops(found[1].step, x, y)
    times: dict[str, list[float]] = {}
    for _ in range(arguments.rounds + 1):
        for variant in found:
            runtime.set_precision(variant.precision)
            times.setdefault(variant.name, []).append(seconds(partial(variant.step, x, y), device))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first one warms up
    rates = {precision: matmul_rate(device, precision) for precision in {variant.precision for variant in found}}
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.model}, ResNet-18 guidance, batch {arguments.batch}, {ATTACK['steps']} attack steps; {machine}, "
        f"torch {torch.__version__}, median of {arguments.rounds} rounds{memory}\n"
    )
    print(
        "| variant | s/step | times naive | images/s | TFLOP/step | GFLOP/s | of matmul |\n"
        "|---|---|---|---|---|---|---|"
    )
    for variant in found:
        median, done = medians[variant.name], work.get(variant.name, ours)
        rate = done / median
        print(
            f"| {variant.name} | {median:.3f} | {medians[found[0].name] / median:.2f} | {arguments.batch / median:.1f} "
            f"| {done / 1e12:.3f} | {rate / 1e9:.0f} | {rate / rates[variant.precision]:.0%} |"
        )


if __name__ == "__main__":
    main()
