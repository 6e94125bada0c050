"""`params.yaml` read into frozen, strictly typed settings: one section per stage, every key required.

There are no defaults in code: every value that a stage uses is in the file, so that DVC notices every change. An
invalid file raises one error that lists each invalid key with its value and the allowed values.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from d2r_core.errors import UserError
from tasks.config import validation_errors
from tasks.config.credentials import redact
from tasks.config.value_types import (
    Count,
    CountOrZero,
    Depth,
    Distance,
    NotNegative,
    Positive,
    Probability,
    Radius,
    Strides,
    Text,
)


class Section(BaseModel):
    """A part of the settings: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Prepare(Section):
    """Where the images come from, and how they are converted and split."""

    source: Literal["digits", "image_folder", "cifar10", "cifar100", "tiny_imagenet"]
    path: Text  # image_folder, tiny_imagenet: folder or zip; CIFAR: the archive, or its folder; digits: unused
    image_size: Annotated[int, Field(ge=8, le=512)]  # pixels, both sides
    fit: Literal["stretch", "crop", "pad"]  # how an image that is not square becomes square
    on_mismatch: Literal["convert", "refuse"]  # a grey image or one of another size
    on_bad_image: Literal["refuse", "quarantine"]  # stop at an unusable image, or go on without it
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)]  # of each class's training images
    test_fraction: Annotated[float, Field(gt=0.0, lt=0.5)]  # of each class, if the source has no test split
    train_per_class: Count | None  # at most so many images of each class, after the split; null: all
    test_per_class: Count | None


class Validate(Section):
    """Limits for the prepared data. Exceeding one is an error unless marked as a warning: validation/suite.py."""

    stop_on: Literal["error", "warning"]  # the least severity that stops the pipeline
    min_images_per_class: Count  # in every split
    max_imbalance: Annotated[float, Field(ge=1.0)]  # largest class / smallest class of the training split
    max_shared_images: CountOrZero  # images with identical pixels in more than one split
    max_repeated_images: CountOrZero  # images with identical pixels in the same split; warning
    max_label_conflicts: CountOrZero  # images whose pixels also occur with another label
    max_near_duplicates: CountOrZero  # images that resemble one of another split; warning
    max_pixel_drift: NotNegative  # change of a channel's mean or std, in stds of the accepted data; warning
    max_class_drift: Probability  # fraction of images that would have to change class; warning


class WideResNet(Section):
    name: Literal["wide_resnet"]
    depth: Depth
    widen_factor: Count


class PreActResNet18(Section):
    name: Literal["preact_resnet18"]


class ResNet18(Section):
    name: Literal["resnet18"]
    width: Count  # channels of the first stage; 64 as published
    strides: Strides  # of the four stages; [1, 1, 2, 2] as published at 32 pixels, [1, 2, 2, 2] at 64


Architecture = Annotated[WideResNet | PreActResNet18 | ResNet18, Field(discriminator="name")]


class D2RMethod(Section):
    """The published method: CAG examples and the dual regularization loss. docs/method.md says more of its options."""

    name: Literal["d2r"]
    clean_weight: NotNegative  # 20 as published
    adv_weight: NotNegative  # 30 as published
    # What training examples move away from: the guidance (CAG, as published), the target's own answer (TRADES,
    # Zhang et al. 2019, eq. 3), the label (PGD, Madry et al. 2018, eq. 2.1).
    attack: Literal["cag", "trades", "pgd"]
    # How the guidance learns: with the target, by every term (as published); not at all; on the adversarial images and
    # detached for the target (PeerAiD, Jung et al. 2024, arXiv 2403.06668, sec. 4); or not at all, but as a moving
    # average of the target (ADR, Wu et al. 2024, arXiv 2305.12118, sec. 3).
    guidance: Literal["joint", "frozen", "adversarial", "ema"]
    # Of AdaGAT's MSE, by which the guidance follows the detached adversarial logits (Liu et al. 2025, arXiv
    # 2508.17265, and its code): 0 as published, 2.5 there.
    guidance_logit_weight: NotNegative
    # What divergences are averaged over: all B x C elements as published, or the B images as in TRADES' code: C times
    # as much.
    divergence_mean: Literal["elements", "images"]

    @field_validator("guidance_logit_weight")
    @classmethod
    def _for_a_guidance_that_follows(cls, value: float, others: ValidationInfo) -> float:
        if value and others.data.get("guidance") != "joint":
            raise PydanticCustomError("guidance", "at most 0 unless guidance is 'joint': no other kind follows a term")
        return value


class LbgatMethod(Section):
    """LBGAT (Cui et al. 2021), the predecessor of D2R."""

    name: Literal["lbgat"]
    beta: NotNegative  # 6 as published for CIFAR-10, 0 is LBGAT0


class TradesMethod(Section):
    """TRADES (Zhang et al. 2019)."""

    name: Literal["trades"]
    beta: NotNegative  # 6 as published


class AdversarialMethod(Section):
    """PGD adversarial training (Madry et al. 2018)."""

    name: Literal["at"]


class StandardMethod(Section):
    """Training on clean images only: the non-robust baseline."""

    name: Literal["standard"]


Method = Annotated[
    D2RMethod | LbgatMethod | TradesMethod | AdversarialMethod | StandardMethod, Field(discriminator="name")
]


class Average(Section):
    """An average of the target's weights, evaluated and saved instead of the last weights."""

    name: Literal["none", "ema", "swa"]
    decay: Annotated[float, Field(gt=0.0, lt=1.0)]  # of ema, per step
    from_epoch: Count


class WeightPerturbation(Section):
    """AWP (Wu et al. 2020)."""

    gamma: NotNegative  # relative to each weight's norm; 0.005 as published for TRADES; 0: off
    from_epoch: Count


class WarmUp(Section):
    """Epochs in which something grows linearly from nothing; 0: in full at once, as published."""

    eps_epochs: NotNegative  # eps and step size (Pang et al. 2021, "Bag of tricks for adversarial training", sec. 4)
    regularization_epochs: NotNegative  # all terms but the cross-entropy (Laine & Aila 2017, arXiv 1610.02242, sec. 3)


class Optimisation(Section):
    """The keys that both training stages share: SGD with momentum on augmented batches."""

    architecture: Architecture
    batch_size: Count
    learning_rate: Positive
    schedule: Literal["step", "constant", "cosine", "one_cycle"]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    weight_decay: NotNegative
    crop_padding: CountOrZero  # pixels of padding before a random crop; 0: no crop
    flip: bool  # random horizontal flip


class Pretrain(Optimisation):
    """Standard training of the guidance model; 0 epochs: random weights, as published."""

    epochs: CountOrZero


class Train(Optimisation):
    """Adversarial training of the target model: D2R with CAG, or a baseline under the same conditions."""

    method: Method
    epochs: Count
    eps: Distance  # Linf radius of the adversarial examples; pixels are in [0, 1]
    step_size: Distance
    steps: Count
    # The published recipe disables the following.
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)]
    gradient_clip: Positive | None  # maximum norm
    weight_perturbation: WeightPerturbation
    average: Average
    warm_up: WarmUp


class Evaluate(Section):
    """The attacks on the test images. All of them share `norm` and `eps`."""

    batch_size: Count
    norm: Literal["Linf", "L2"]
    eps: Radius
    step_size: Radius  # of PGD and CW
    steps: Count  # of PGD and CW
    restarts: Count  # of PGD and CW, each from its own random start
    autoattack: Literal["quick", "standard"]  # quick: its APGD-CE and APGD-T alone
    autoattack_images: CountOrZero  # test images for AutoAttack, class-balanced; 0: skip it
    check_images: Count  # test images for curves and self-checks, class-balanced
    precision: Literal["fp32", "tf32", "bf16"]  # of forward and backward passes; fp32 is the reference

    @field_validator("eps", "step_size")
    @classmethod
    def _within_pixel_range(cls, value: float, others: ValidationInfo) -> float:
        if others.data.get("norm") == "Linf" and value > 1:  # 8 for 8/255
            raise PydanticCustomError(
                "linf", "at most 1 in Linf, since images are in [0, 1]; fractions such as 8/255 are read"
            )
        return value


class Report(Section):
    gallery_images: Annotated[int, Field(ge=1, le=32)]  # shown beside their adversarial versions


class Promote(Section):
    """The gate between @challenger and @champion."""

    model_name: Text
    min_clean_accuracy: Probability
    min_robust_accuracy: Probability  # against the strongest attack on each image
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]  # one-sided, of every comparison with the champion
    margin: Annotated[float, Field(gt=0.0, lt=1.0)]  # accuracy that a challenger may lose where no gain is needed
    onnx: bool  # export the model to ONNX when it is registered
    approval: Literal["automatic", "manual"]  # whether the flow promotes what passed, or a person (`d2r approve`)
    approval_minutes: NotNegative  # manual: how long the flow waits for the person; 0: not at all
    require_signature: Text | None  # path of the public key that must have signed every version; null: not required


class Tracking(Section):
    uri: Text  # of the MLflow tracking server; MLFLOW_TRACKING_URI overrides it
    experiment: Text


class Runtime(Section):
    """Where and how fast the two training stages run."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16"]  # of forward and backward passes; fp32 is the reference
    compile: Literal["auto", "on", "off"]  # auto: on a GPU, if a C compiler is installed
    save_minutes: Positive  # between writes of the training state; it is also written after every epoch
    max_minutes: Positive | None  # save and stop after this time; run again to resume


class Settings(Section):
    """The whole of `params.yaml`."""

    seed: CountOrZero
    prepare: Prepare
    validate_: Annotated[Validate, Field(alias="validate")]  # BaseModel has a method of that name
    pretrain: Pretrain
    train: Train
    evaluate: Evaluate
    report: Report
    promote: Promote
    tracking: Tracking
    runtime: Runtime

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """Every setting under its dotted path, for logging: `{"train.eps": 0.031, ...}`."""
        return dict(_flatten(self.model_dump(mode="json", by_alias=True), ""))

    def hash(self, *sections: str) -> str:
        """SHA-256 of the named sections' values (of all, if none is named)."""
        values = self.model_dump(mode="json", by_alias=True)
        chosen = {name: values[name] for name in (sections or values)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Settings:
    """Read and validate a parameter file.

    Raises:
        UserError: the file is missing, is not valid YAML, or has missing, unknown or invalid keys; one message lists
            all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `d2r use digits` creates a complete one.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {redact(str(error))}") from None
    return parse(values, name=path.name)


def parse(values: object, name: str = "params.yaml") -> Settings:
    """Validate a mapping of parameters; error messages call it `name`. Raises UserError."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(
            redact("\n".join(validation_errors.describe(name, Settings, detail) for detail in error.errors()))
        ) from None


def _flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value
