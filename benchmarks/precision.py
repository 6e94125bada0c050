"""How far each faster setting is from fp32 and eager: in one step, and in robust accuracy after a short training.

    python benchmarks/precision.py --data data/prepared [--epochs N] [--seeds N]

FOLDER holds train.safetensors and test.safetensors as the stage `prepare` writes them: on a CPU the digits, on a GPU
CIFAR-10. It needs PyTorch, NumPy, safetensors and d2r_core alone. The one step (attack, loss, gradient) starts from the
weights that fp32 has trained; the accuracies are all asked in fp32.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2r_core import data, models, runtime
from d2r_core.attacks import PGD, Clean
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import accuracy_under
from d2r_core.data import Split
from d2r_core.training import trainer
from d2r_core.training.methods import D2R, Attack


class Setting(NamedTuple):
    precision: runtime.Precision
    compile: runtime.Compile

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compile == 'on' else 'eager'}"


class Problem(NamedTuple):
    """What is trained, and how."""

    target: dict[str, Any]
    guidance: dict[str, Any]
    attack: Attack
    epochs: int
    batch_size: int
    learning_rate: float
    crop_padding: int
    flip: bool


DIGITS = Problem(
    target={"name": "wide_resnet", "depth": 10, "widen_factor": 1},
    guidance={"name": "resnet18", "width": 8},
    attack={"eps": 0.1, "step_size": 0.025, "steps": 5},
    epochs=3,
    batch_size=32,
    learning_rate=0.05,
    crop_padding=1,
    flip=False,
)
CIFAR10 = Problem(
    target={"name": "preact_resnet18"},
    guidance={"name": "resnet18"},
    attack={"eps": 0.031, "step_size": 0.007, "steps": 10},
    epochs=5,
    batch_size=128,
    learning_rate=0.1,
    crop_padding=4,
    flip=True,
)


def build(problem: Problem, train: Split, seed: int, device: torch.device) -> D2R:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"num_classes": int(train.labels.max()) + 1, "image_size": train.images.shape[-1]}
    pair = [models.build(**problem.target, **shape), models.build(**problem.guidance, **shape)]
    objective = D2R(*pair, attack=problem.attack, clean_weight=20.0, adv_weight=30.0)
    return objective.to(device)


def trained(problem: Problem, setting: Setting, train: Split, epochs: int, seed: int, device: torch.device) -> D2R:
    objective = build(problem, train, seed, device)
    runtime.set_precision(setting.precision)
    runtime.compile_models(objective, compile=setting.compile, device=device)
    trainer.fit(
        objective,
        train,
        train.take(torch.arange(problem.batch_size, device=device)),
        device=device,
        epochs=epochs,
        batch_size=problem.batch_size,
        learning_rate=problem.learning_rate,
        schedule="one_cycle",
        momentum=0.9,
        weight_decay=2e-4,
        crop_padding=problem.crop_padding,
        flip=problem.flip,
        seed=seed,
        criteria={"clean_accuracy": Clean()},
        log=lambda metrics, epoch: print(
            f"{setting}, seed {seed}, epoch {epoch}: {metrics['loss']:.3f}", file=sys.stderr
        ),
        precision=setting.precision,
    )
    return objective


def robust_accuracy(problem: Problem, objective: D2R, test: Split) -> float:
    """Under PGD-20 from one random start, in fp32."""
    runtime.set_precision("fp32")
    attack = PGD(eps=problem.attack["eps"], step_size=problem.attack["step_size"], steps=20)
    config = EvaluationConfig(batch_size=256, seed=0, device=next(objective.model.parameters()).device)
    with runtime.eager(True):
        return accuracy_under(objective.model, test, attack, config)


def one_step(start: D2R, setting: Setting, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The loss of a step from these weights, and the gradient of all parameters as one vector in float64."""
    objective = copy.deepcopy(start).train()
    runtime.set_precision(setting.precision)
    runtime.compile_models(objective, compile=setting.compile, device=x.device)
    with runtime.autocast(x.device, setting.precision):
        x_adv = objective.perturb(x, y, runtime.generator(0, x.device))
        loss = objective(x, x_adv, y)["total"]
    loss.backward()
    gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/prepared"), metavar="FOLDER")
    parser.add_argument("--epochs", type=int, help="3 on a CPU, 5 on a GPU")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    device = runtime.device("auto")
    problem = CIFAR10 if device.type == "cuda" else DIGITS
    epochs = arguments.epochs or problem.epochs
    train, test = (data.load_split(arguments.data / f"{name}.safetensors").to(device) for name in ("train", "test"))
    settings = [Setting("fp32", "off"), Setting("fp32", "on"), Setting("bf16", "off")]
    if device.type == "cuda":
        settings += [Setting("tf32", "off"), Setting("tf32", "on"), Setting("bf16", "on")]
    found = {
        setting: [trained(problem, setting, train, epochs, seed, device) for seed in range(arguments.seeds)]
        for setting in settings
    }
    images, y = train.take(torch.arange(128, device=device))
    x = data.to_float(images).contiguous(memory_format=torch.channels_last)
    accuracies = {
        setting: torch.tensor([robust_accuracy(problem, objective, test) for objective in objectives])
        for setting, objectives in found.items()
    }
    start, exact = found[settings[0]][0], accuracies[settings[0]]
    loss, gradient = one_step(start, settings[0], x, y)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{problem.target['name']}, {len(train)} training images, {epochs} epochs, {len(test)} test images; {machine}, "
        f"torch {torch.__version__}\n\n"
        "| setting | loss of a step differs | cosine of its gradient | PGD-20 accuracy, by seed | mean differs by |\n"
        "|---|---|---|---|---|"
    )
    for setting in settings:
        other_loss, other = one_step(start, setting, x, y)
        by_seed = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies[setting].tolist())
        difference = float((accuracies[setting] - exact).mean())
        print(
            f"| {setting} | {abs(other_loss / loss - 1):.1e} | {torch.cosine_similarity(other, gradient, dim=0):.6f} "
            f"| {by_seed} | {100 * difference:+.1f} points |"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # TF32's advice from the compiler, which the table answers
    main()
