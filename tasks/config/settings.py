"""`params.yaml` read into frozen, strictly typed settings: one section per stage, every key required.

There are no defaults in code: what a stage uses stands in the file, so DVC sees every change of it. A mistake gives one
message with the key's path, what was found and what is allowed.
"""

import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from d2r_core.errors import UserError
from tasks.config import validation_errors


def _fraction(value: object) -> object:
    """Read "8/255" as 8 / 255; leave everything else to pydantic."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _depth(value: int) -> int:
    if (value - 4) % 6:
        raise PydanticCustomError("depth", "allowed are 10, 16, 22, 28, 34, ... (6 n + 4)")
    return value


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
# A distance between images in [0, 1]: a number, or a fraction such as "8/255".
Distance = Annotated[float, Field(gt=0.0, le=1.0), BeforeValidator(_fraction)]
# The same of an evaluation, where L2 radii may exceed 1.
Radius = Annotated[float, Field(gt=0.0, allow_inf_nan=False), BeforeValidator(_fraction)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists, a frozen setting needs a tuple.
Strides = Annotated[tuple[Count, Count, Count, Count], Strict(False), PlainSerializer(list)]


class Section(BaseModel):
    """A part of the settings: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Prepare(Section):
    """Where the images come from and the shape they are brought to."""

    source: Literal["digits", "image_folder", "cifar10", "cifar100", "tiny_imagenet"]
    path: Text  # image_folder, tiny_imagenet: folder or zip; CIFAR: the archive, or its folder; digits: unused
    image_size: Annotated[int, Field(ge=8, le=512)]  # pixels, both sides
    on_mismatch: Literal["convert", "refuse"]  # what to do with a grey or odd-sized image
    on_bad_image: Literal["refuse", "quarantine"]  # stop at an image that cannot be used, or set it aside
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)]  # of each class's training images
    test_fraction: Annotated[float, Field(gt=0.0, lt=0.5)]  # of each class, where the source has no test split
    train_per_class: Count | None  # keep at most so many images of a class (after the split); null: all
    test_per_class: Count | None


class Validate(Section):
    """What the prepared data must satisfy. What exceeds a limit is an error or a warning: validation/suite.py."""

    stop_on: Literal["error", "warning"]  # how severe a finding must be to stop the chain
    min_images_per_class: Count  # in every split
    max_imbalance: Annotated[float, Field(ge=1.0)]  # largest class / smallest class of the training split
    max_shared_images: CountOrZero  # images that stand, pixel for pixel, in more than one split
    max_repeated_images: CountOrZero  # images that stand, pixel for pixel, in their split already; warning
    max_label_conflicts: CountOrZero  # images whose pixels carry another label elsewhere
    max_near_duplicates: CountOrZero  # images that look like one of another split; warning
    max_pixel_drift: NotNegative  # change of a channel's mean or std, in accepted std; warning
    max_class_drift: Probability  # share of images that would have to change class; warning


class WideResNet(Section):
    name: Literal["wide_resnet"]
    depth: Annotated[int, Field(ge=10), AfterValidator(_depth)]
    widen_factor: Count


class PreActResNet18(Section):
    name: Literal["preact_resnet18"]


class ResNet18(Section):
    name: Literal["resnet18"]
    width: Count  # channels of the first stage; 64 as published
    strides: Strides  # of the four stages; [1, 1, 2, 2] as published at 32 pixels, [1, 2, 2, 2] at 64


Architecture = Annotated[WideResNet | PreActResNet18 | ResNet18, Field(discriminator="name")]


class D2RMethod(Section):
    """The published method: CAG and the dual regularization loss."""

    name: Literal["d2r"]
    clean_weight: NotNegative  # 20 as published
    adv_weight: NotNegative  # 30 as published
    freeze_guidance: bool  # keep the guidance as pretrained; false as published


class LbgatMethod(Section):
    """LBGAT (Cui et al. 2021), D2R's forerunner."""

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
    """No attack: what the others are measured against."""

    name: Literal["standard"]


Method = Annotated[
    D2RMethod | LbgatMethod | TradesMethod | AdversarialMethod | StandardMethod, Field(discriminator="name")
]


class Average(Section):
    """An average of the target's weights, kept instead of the weights themselves."""

    name: Literal["none", "ema", "swa"]
    decay: Annotated[float, Field(gt=0.0, lt=1.0)]  # of ema, at each step
    from_epoch: Count


class WeightPerturbation(Section):
    """AWP (Wu et al. 2020)."""

    gamma: NotNegative  # relative to each weight's norm; 0.005 as published for TRADES; 0: off
    from_epoch: Count


class Optimisation(Section):
    """What the two training stages have in common: SGD with momentum over augmented batches."""

    architecture: Architecture
    batch_size: Count
    learning_rate: Positive
    schedule: Literal["step", "constant", "cosine", "one_cycle"]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    weight_decay: NotNegative
    crop_padding: CountOrZero  # random crop after padding by so many pixels; 0: none
    flip: bool  # random horizontal flip


class Pretrain(Optimisation):
    """Standard training of the guidance model; 0 epochs is the published random start."""

    epochs: CountOrZero


class Train(Optimisation):
    """Adversarial training of the target model: D2R + CAG, or a rival on equal terms."""

    method: Method
    epochs: Count
    eps: Distance  # radius of the adversarial examples, Linf, images in [0, 1]
    step_size: Distance
    steps: Count
    # What follows is off in the published recipe.
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)]
    gradient_clip: Positive | None  # largest norm
    weight_perturbation: WeightPerturbation
    average: Average


class Evaluate(Section):
    """The attacks on the test images. All of them share `norm` and `eps`."""

    batch_size: Count
    norm: Literal["Linf", "L2"]
    eps: Radius
    step_size: Radius  # of PGD and CW
    steps: Count  # of PGD and CW
    restarts: Count  # of PGD and CW, each from its own random start
    autoattack: Literal["quick", "standard"]  # quick: its APGD-CE and APGD-T alone
    autoattack_images: CountOrZero  # AutoAttack runs on so many test images, class-balanced; 0: not run
    check_images: Count  # curves and self-checks stand on so many test images, class-balanced
    precision: Literal["fp32", "tf32", "bf16"]  # of the networks' passes; fp32 is the reference

    @field_validator("eps", "step_size")
    @classmethod
    def _in_the_images_range(cls, value: float, others: ValidationInfo) -> float:
        if others.data.get("norm") == "Linf" and value > 1:  # 8 for 8/255
            raise PydanticCustomError(
                "linf", "at most 1 in Linf, since images are in [0, 1]; fractions such as 8/255 are read"
            )
        return value


class Report(Section):
    gallery_images: Annotated[int, Field(ge=1, le=32)]  # shown with their adversarial twins


class Promote(Section):
    """The gate between @challenger and @champion."""

    model_name: Text
    min_clean_accuracy: Probability
    min_robust_accuracy: Probability  # against the worst of the attacks for each image
    max_regression: Probability  # how far below the champion's robust accuracy a challenger may lie, on the same data


class Tracking(Section):
    uri: Text  # of the MLflow tracking server; the variable MLFLOW_TRACKING_URI wins
    experiment: Text


class Runtime(Section):
    """Where and how fast the two trainings run."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16"]  # of the networks' passes; fp32 is the reference
    compile: Literal["auto", "on", "off"]  # auto: on a GPU that has a C compiler beside it
    save_minutes: Positive  # between two writes of the training state; every epoch's end is written as well
    max_minutes: Positive | None  # save and stop after so long; run again to continue


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
    """Read and check a parameter file.

    Raises:
        UserError: the file is missing, is not YAML, or holds a key or a value that is not allowed; one message
            names all the mistakes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `d2r use digits` puts a complete one in place.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    return parse(values, name=path.name)


def parse(values: object, name: str = "params.yaml") -> Settings:
    """Check a parameter mapping; `name` is the file that messages speak of. Raises UserError."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(validation_errors.describe(name, Settings, detail) for detail in error.errors())
        ) from None


def _flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value
