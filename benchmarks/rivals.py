"""D2R and its rivals on equal terms: one engine, the same data, budget, attack and seeds; each its published weights.

    python benchmarks/rivals.py

The data are scikit-learn's digits, so this is a check of the engine at a small size and no claim about photographs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from d2r_core import models, runtime
from d2r_core.attacks import PGD, Clean
from d2r_core.attacks.config import EvaluationConfig
from d2r_core.attacks.run import accuracy_under
from d2r_core.data import Split, balanced_order
from d2r_core.training import trainer
from d2r_core.training.methods import D2R, AdversarialTraining, Attack, Lbgat, Objective, Standard, Trades

CPU = torch.device("cpu")
ATTACK: Attack = {"eps": 0.1, "step_size": 0.025, "steps": 5}
EPOCHS = 10
SEEDS = range(3)

# The method, given the target and the guidance, of which three make no use.
METHODS: dict[str, Callable[[nn.Module, nn.Module], Objective]] = {
    "D2R": lambda model, guidance: D2R(model, guidance, attack=ATTACK, clean_weight=20.0, adv_weight=30.0),
    "LBGAT": lambda model, guidance: Lbgat(model, guidance, attack=ATTACK, beta=6.0),
    "TRADES": lambda model, guidance: Trades(model, attack=ATTACK, beta=6.0),
    "AT": lambda model, guidance: AdversarialTraining(model, attack=ATTACK),
    "standard": lambda model, guidance: Standard(model),
}


def splits() -> dict[str, Split]:
    """The 1,797 digits, 8 x 8 pixels, class-balanced: 1,297 to train, 140 to validate, 360 to test."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    whole = Split(pixels.expand(-1, 3, -1, -1), torch.from_numpy(labels).long())
    test, validation, train = balanced_order(whole.labels, 0).split([360, 140, 1297])
    return {"train": whole.take(train), "validation": whole.take(validation), "test": whole.take(test)}


def accuracies(method: str, data: dict[str, Split], seed: int) -> list[float]:
    """Clean and PGD-20 accuracy on the test images, of the epoch that is best on the validation images."""
    torch.manual_seed(seed)
    guidance = models.build("resnet18", num_classes=10, image_size=8, width=8)
    torch.manual_seed(seed + 100)
    model = models.build("wide_resnet", num_classes=10, image_size=8, depth=10, widen_factor=1)
    kept = trainer.fit(
        METHODS[method](model, guidance),
        data["train"],
        data["validation"],
        device=CPU,
        epochs=EPOCHS,
        batch_size=32,
        learning_rate=0.05,
        schedule="step",
        momentum=0.9,
        weight_decay=2e-4,
        crop_padding=1,
        flip=False,
        seed=seed,
        criteria={"clean": Clean(), "robust": PGD(**ATTACK)},
        log=lambda metrics, epoch: None,
    )
    model.load_state_dict(kept.state)
    attacks: list[Clean | PGD] = [Clean(), PGD(eps=ATTACK["eps"], step_size=ATTACK["step_size"], steps=20)]
    config = EvaluationConfig(batch_size=120, seed=seed, device=CPU)
    return [accuracy_under(model, data["test"], attack, config) for attack in attacks]


def described(figures: Tensor) -> str:
    """Mean and range over the seeds."""
    low, mean, high = (float(value) for value in (figures.min(), figures.mean(), figures.max()))
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    runtime.set_precision("fp32")
    data = splits()
    print(
        f"scikit-learn's digits, {len(data['train'])} to train, {EPOCHS} epochs of batch 32, Linf eps {ATTACK['eps']}, "
        f"{ATTACK['steps']} attack steps, fp32, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"mean (range) of seeds {SEEDS[0]} to {SEEDS[-1]}, {len(data['test'])} test images\n"
    )
    print("| method | clean | PGD-20 | CPU s a training |\n|---|---|---|---|")
    for method in METHODS:
        found, seconds = [], []
        for seed in SEEDS:
            begun = time.process_time()
            found.append(accuracies(method, data, seed))
            seconds.append(time.process_time() - begun)
        clean, robust = torch.tensor(found).T
        print(f"| {method} | {described(clean)} | {described(robust)} | {statistics.median(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
