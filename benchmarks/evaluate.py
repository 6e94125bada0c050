"""PGD-20, CW-20 and AutoAttack on the same model and images: as plainly written, and as the evaluation runs them.

    python benchmarks/evaluate.py --rounds 5 --images 200 --autoattack-images 50
    python benchmarks/evaluate.py --checkpoint models/target.safetensors --data data/prepared --eps 8/255

Without a checkpoint, a WideResNet-10-2 is first trained on scikit-learn's digits at 32 pixels. All variants take turns
in one process, so that what else the machine does hits them alike; medians and ratios are what counts.
"""

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2r_core import checkpoint, models, runtime
from d2r_core.attacks import pgd
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.pgd import LossName, margin
from d2r_core.attacks.run import cascade, run_attack
from d2r_core.data import Split, balanced_order, to_float
from d2r_core.evaluation.evaluate_model import standard_attacks
from tasks.config.settings import load as load_settings
from tasks.data import evaluation_images
from tasks.evaluation import autoattack
from tasks.evaluation.autoattack import Level

STEPS = 20
CPU = torch.device("cpu")
Variant = Callable[[], Tensor]  # bool (N,): the images that are robust


def plain_pgd(
    model: nn.Module, split: Split, *, eps: float, loss: LossName, weights: bool, every: bool, batch: int
) -> Tensor:
    """PGD on all images for all steps, in the default memory layout.

    Args:
        weights: whether the backward pass computes the weights' gradients too, as in published loops.
        every: look at each iterate, instead of the last one.
    """
    generator = runtime.generator(0, CPU)
    device = next(model.parameters()).device
    robust = []
    for index in torch.arange(len(split)).split(batch):
        x, y = to_float(split.images[index]).to(device), split.labels[index].to(device)
        noise = torch.empty(x.shape).uniform_(-1, 1, generator=generator).to(device)
        x_adv = (x + eps * noise).clamp(0, 1)
        right = model(x).argmax(1) == y
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv)
            value = F.cross_entropy(logits, y, reduction="sum") if loss == "ce" else -margin(logits, y).sum()
            if every:
                right &= logits.argmax(1) == y
            if weights:
                value.backward()
                assert x_adv.grad is not None
                gradient = x_adv.grad
            else:
                (gradient,) = torch.autograd.grad(value, x_adv)
            x_adv = x_adv.detach() + eps / 4 * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        with torch.no_grad():
            robust.append(right & (model(x_adv).argmax(1) == y))
    return torch.cat(robust).cpu()


def plain_autoattack(model: nn.Module, split: Split, level: Level, *, eps: float, classes: int, batch: int) -> Tensor:
    """pyautoattack as its README calls it."""
    from pyautoattack import AutoAttack

    device = next(model.parameters()).device
    x, y = to_float(split.images).to(device), split.labels.to(device)
    quick = {"version": "custom", "attacks": ["apgd-ce", "apgd-t"]} if level == "quick" else {}
    adversary = AutoAttack(model, norm="Linf", eps=eps, seed=0, device=device, **quick)
    adversary.apgd.n_restarts = 1
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch)
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x_adv.split(batch)]).cpu() == split.labels


def compare(title: str, variants: dict[str, Variant], rounds: int) -> None:
    """Time the variants in turns; the ratios of all are to the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    robust: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            robust[name] = variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians))
    print(f"\n{title}\n| | robust | differ from the first | median s (least to most) | ratio |\n|---|---|---|---|---|")
    for name, median in medians.items():
        differ = int((robust[name] != robust[first]).sum())
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        count = f"{int(robust[name].sum())} of {len(robust[name])}"
        print(f"| {name} | {count} | {differ} | {median:.2f} ({spread}) | {medians[first] / median:.2f} |", flush=True)


def pgd_variants(
    loss: LossName, model: nn.Module, plain: nn.Module, split: Split, config: EvaluationConfig
) -> dict[str, Variant]:
    """PGD-20 or CW-20 in four ways; `plain` is the model in the default memory layout, which ours changes."""
    attack = standard_attacks(config)["pgd" if loss == "ce" else "cw"]

    def naive(weights: bool, every: bool) -> Tensor:
        return plain_pgd(plain, split, eps=config.eps, loss=loss, weights=weights, every=every, batch=config.batch_size)

    return {
        "plain loop, gradient of the images alone": lambda: naive(False, False),
        "the same, looking at every iterate": lambda: naive(False, True),
        "as published: weights' gradients too": lambda: naive(True, False),
        "ours": lambda: run_attack(model, split, attack, config).correct(split.labels),
    }


def autoattack_variants(
    level: Level, model: nn.Module, plain: nn.Module, split: Split, config: EvaluationConfig, classes: int
) -> dict[str, Variant]:
    """AutoAttack in its authors' way and in ours."""
    attacks = autoattack.attacks(level, eps=config.eps, norm="Linf", seed=0, classes=classes)
    return {
        "pyautoattack": lambda: plain_autoattack(
            plain, split, level, eps=config.eps, classes=classes, batch=config.batch_size
        ),
        "ours": lambda: cascade(model, split, attacks, config)[0].correct(split.labels),
    }


def trained(device: torch.device, seconds: float, eps: float) -> tuple[nn.Module, Split]:
    """A small network after `seconds` of CPU time of adversarial training on digits, and digits it has not seen."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images / 16).float()[:, None]
    pixels = F.interpolate(grey, size=32, mode="bilinear").mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    images, labels = pixels.contiguous(), torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    model = models.build("wide_resnet", num_classes=10, depth=10, widen_factor=2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    started = time.process_time()
    while time.process_time() - started < seconds:
        index = torch.randint(0, 1200, (64,))
        x, y = to_float(images[index]).to(device), labels[index].to(device)
        x_adv = pgd(model, x, y, eps=1.5 * eps, step_size=1.5 * eps, steps=1)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model.eval(), Split(images[1200:], labels[1200:])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="one of ours, with its JSON; otherwise one is trained")
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--eps", default="0.1")
    parser.add_argument("--train-seconds", type=float, default=60.0, help="of CPU time")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--autoattack-images", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-standard", action="store_true", help="AutoAttack's quick level alone")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    runtime.set_precision("fp32")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    eps, device = float(Fraction(options.eps)), runtime.device("auto")
    if options.checkpoint:
        model, _ = checkpoint.load(options.checkpoint, device)
        whole = evaluation_images.load(options.data, load_settings(Path("params.yaml")).prepare).split
    else:
        model, whole = trained(device, options.train_seconds, eps)
    order = balanced_order(whole.labels, 0)
    split, few = whole.take(order[: options.images]), whole.take(order[: options.autoattack_images])
    plain = copy.deepcopy(model)  # ours turns the weights' memory layout
    config = EvaluationConfig(batch_size=options.batch, seed=0, device=device, eps=eps, step_size=eps / 4, steps=STEPS)
    print(
        f"{type(model).__name__}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads, eps {eps:.4g}"
    )

    losses: dict[str, LossName] = {"PGD-20": "ce", "CW-20": "margin"}
    for name, loss in losses.items():
        compare(f"{name}, {len(split)} images", pgd_variants(loss, model, plain, split, config), options.rounds)
    levels: list[Level] = ["quick"] if options.skip_standard else ["quick", "standard"]
    for level in levels:
        variants = autoattack_variants(level, model, plain, few, config, int(whole.labels.max()) + 1)
        compare(f"AutoAttack {level}, {len(few)} images", variants, options.rounds)


if __name__ == "__main__":
    main()
