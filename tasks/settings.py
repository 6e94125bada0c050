"""`params.yaml` read into frozen, strictly typed settings: one section per stage, every key required.

There are no defaults in code: what a stage uses stands in the file, so DVC sees every change of it. A mistake gives one
message with the key's path, what was found and what is allowed.
"""

import difflib
import hashlib
import json
import re
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
)
from pydantic_core import ErrorDetails, PydanticCustomError

from d2r_core.errors import UserError


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
    """What the prepared data must satisfy. What exceeds a limit is an error or a warning (tasks/suite.py)."""

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


class Optimisation(Section):
    """What the two training stages have in common: SGD with momentum over augmented batches."""

    architecture: Architecture
    batch_size: Count
    learning_rate: Positive
    schedule: Literal["step", "constant", "cosine"]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    weight_decay: NotNegative
    crop_padding: CountOrZero  # random crop after padding by so many pixels; 0: none
    flip: bool  # random horizontal flip


class Pretrain(Optimisation):
    """Standard training of the guidance model; 0 epochs is the published random start."""

    epochs: CountOrZero


class Train(Optimisation):
    """D2R + CAG training of the target model."""

    epochs: Count
    eps: Distance  # radius of the adversarial examples, Linf, images in [0, 1]
    step_size: Distance
    steps: Count
    clean_weight: NotNegative  # 20 as published
    adv_weight: NotNegative  # 30 as published


class Evaluate(Section):
    """The attacks on the test images. FGSM, PGD, CW and AutoAttack share `eps` (Linf)."""

    batch_size: Count
    eps: Distance
    step_size: Distance  # of PGD and CW
    steps: Count  # of PGD and CW
    autoattack_images: CountOrZero  # AutoAttack standard runs on so many test images, class-balanced; 0: not run


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
    device: Literal["auto", "cpu", "cuda"]


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
        raise UserError("\n".join(_message(name, detail) for detail in error.errors())) from None


def _message(name: str, detail: ErrorDetails) -> str:
    """One line for one mistake: where, what was found, what is allowed."""
    parts = [str(part) for part in detail["loc"]]
    # The tag of an architecture stands in pydantic's location, but is no key of the file.
    where = f"{name}: " + (".".join(part for part in parts if part not in _ARCHITECTURES) or "the file")
    found, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return f"{where} is missing. Every key must be there; the files in presets/ are complete."
        case "extra_forbidden":
            known = _keys(parts[:-1])
            return f"{where} is not a known key.{_did_you_mean(parts[-1], known)} Known here: {', '.join(known)}."
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            return f"{where} is {found!r}; allowed: {', '.join(allowed)}.{_did_you_mean(found, allowed)}"
        case "union_tag_invalid":
            tag, allowed = context["tag"], list(_ARCHITECTURES)
            return f"{where}.name is {tag!r}; allowed: {', '.join(allowed)}.{_did_you_mean(tag, allowed)}"
        case "union_tag_not_found":
            return f"{where}.name is missing; allowed: {', '.join(_ARCHITECTURES)}."
        case "model_type" | "model_attributes_type":
            return f"{where} is {found!r}; it must be a section with the keys {', '.join(_keys(parts))}."
    hint = ""
    if isinstance(found, str) and re.fullmatch(r"[0-9]+e[-+]?[0-9]+", found):
        hint = f" YAML reads {found} as text: write {float(found)!r} or {found.replace('e', '.0e')}."
    return f"{where} is {found!r}; {detail['msg'][0].lower()}{detail['msg'][1:]}.{hint}"


_ARCHITECTURES: dict[str, type[Section]] = {
    "wide_resnet": WideResNet,
    "preact_resnet18": PreActResNet18,
    "resnet18": ResNet18,
}


def _keys(parts: list[str]) -> list[str]:
    """The keys that the section at `parts` knows."""
    section: type[BaseModel] = Settings
    for part in parts:
        if part in _ARCHITECTURES:
            section = _ARCHITECTURES[part]
        elif part != "architecture":
            fields = {field.alias or key: field for key, field in section.model_fields.items()}
            annotation = fields[part].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, Section)
            section = annotation
    return [field.alias or key for key, field in section.model_fields.items()]


def _did_you_mean(found: object, allowed: list[str]) -> str:
    close = difflib.get_close_matches(str(found), allowed, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value
