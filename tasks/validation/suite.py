"""What prepared data must satisfy: every expectation with its severity, its limit and its reason."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tasks.config.settings import Validate
from tasks.validation.great_expectations_runner import Check


def checks(tables: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any], limits: Validate) -> dict[str, list[Check]]:
    """The checks by the table they stand on (tasks/validation/tables.py, tasks/validation/drift.py)."""
    found = {
        "images": [*_shape(manifest), *_pixels(), *_duplicates(len(tables["images"]), limits)],
        "classes": _classes(limits),
        "files": _files(),
        "dataset": _dataset(),
    }
    return found | ({"drift": _drift(limits)} if "drift" in tables else {})


def _shape(manifest: Mapping[str, Any]) -> list[Check]:
    from great_expectations import expectations as expect

    count, classes = sum(split["images"] for split in manifest["splits"].values()), len(manifest["classes"])

    def all_equal(column: str, value: int) -> Check:
        return Check(
            f"{column} as in the manifest",
            str(value),
            expect.ExpectColumnValuesToBeInSet(column=column, value_set=[value]),
            "The models are built for this size.",
        )

    return [
        Check(
            "as many images as in the manifest",
            str(count),
            expect.ExpectTableRowCountToEqual(value=count),
            "Tensors and manifest must be of the same preparation.",
        ),
        Check(
            "known labels",
            f"0 to {classes - 1}",
            expect.ExpectColumnValuesToBeInSet(column="label", value_set=list(range(classes))),
            "A label is the position of a class; another one has no meaning.",
        ),
        all_equal("height", manifest["image_size"]),
        all_equal("width", manifest["image_size"]),
        all_equal("channels", manifest["channels"]),
    ]


def _pixels() -> list[Check]:
    from great_expectations import expectations as expect

    return [
        Check(
            "pixels in the range 0 to 255",
            "the largest is 2 to 255",
            expect.ExpectColumnMaxToBeBetween(column="maximum", min_value=2, max_value=255),
            "Images in 0 .. 1 that were stored as whole numbers are all but black.",
        ),
        Check(
            "no image of one colour",
            "standard deviation of the pixels above 0",
            expect.ExpectColumnValuesToBeBetween(column="std", min_value=0, strict_min=True),
            "It shows nothing: a failed export, or a download's placeholder.",
        ),
    ]


def _duplicates(count: int, limits: Validate) -> list[Check]:
    from great_expectations import expectations as expect

    def at_most(limit: int, column: str) -> Any:
        mostly = max(0, count - limit) / max(1, count)
        return expect.ExpectColumnValuesToBeNull(column=column, mostly=mostly)

    return [
        Check(
            "no image in more than one split",
            f"at most {limits.max_shared_images}",
            at_most(limits.max_shared_images, "shared_with"),
            "A model that has seen the answers looks more accurate and more robust than it is.",
        ),
        Check(
            "no look-alike in another split",
            f"at most {limits.max_near_duplicates}",
            at_most(limits.max_near_duplicates, "looks_like"),
            "A resized, recompressed or brightened copy gives the answers away as well.",
            "warning",
        ),
        Check(
            "no image twice in a split",
            f"at most {limits.max_repeated_images}",
            at_most(limits.max_repeated_images, "repeats"),
            "A repeated image counts twice, in the training and in every figure.",
            "warning",
        ),
        Check(
            "one label for the same pixels",
            f"at most {limits.max_label_conflicts} with another label elsewhere",
            at_most(limits.max_label_conflicts, "also_labelled"),
            "One of the two labels is wrong.",
        ),
    ]


def _classes(limits: Validate) -> list[Check]:
    from great_expectations import expectations as expect

    return [
        Check(
            "every class in every split",
            "at least 1 image",
            expect.ExpectColumnValuesToBeBetween(column="images", min_value=1),
            "A class without images is neither learned nor measured.",
        ),
        Check(
            "enough images of each class in every split",
            f"at least {limits.min_images_per_class} images",
            expect.ExpectColumnValuesToBeBetween(column="images", min_value=limits.min_images_per_class),
            "The accuracy of a class on a handful of images says little.",
        ),
        Check(
            "balanced training images",
            f"the largest class has at most {limits.max_imbalance:g} times the images of any",
            expect.ExpectColumnValuesToBeBetween(column="imbalance", max_value=limits.max_imbalance),
            "The method weighs all images alike: rare classes are learned last and fall first.",
        ),
        Check(
            "images of each class as in the manifest",
            "equal",
            expect.ExpectColumnPairValuesToBeEqual(column_A="images", column_B="manifest_images"),
            "Tensors and manifest must be of the same preparation.",
        ),
    ]


def _files() -> list[Check]:
    from great_expectations import expectations as expect

    return [
        Check(
            "no image set aside",
            "none in the quarantine",
            expect.ExpectColumnValuesToBeNull(column="set_aside"),
            "What could not be decoded is missing from the data (prepare.on_bad_image).",
            "warning",
        )
    ]


def _dataset() -> list[Check]:
    from great_expectations import expectations as expect

    return [
        Check(
            "content as in the manifest",
            "equal hashes",
            expect.ExpectColumnPairValuesToBeEqual(column_A="hash", column_B="manifest_hash"),
            "The hash vouches for every figure that is measured on these data.",
        )
    ]


def _drift(limits: Validate) -> list[Check]:
    from great_expectations import expectations as expect

    return [
        Check(
            "pixels as in the last accepted data",
            f"means and deviations changed by at most {limits.max_pixel_drift:g} standard deviations",
            expect.ExpectColumnValuesToBeBetween(column="pixel_drift", max_value=limits.max_pixel_drift),
            "Another camera, light or conversion: figures of before and after do not compare.",
            "warning",
        ),
        Check(
            "class shares as in the last accepted data",
            f"at most {limits.max_class_drift:.0%} of the images would have to change class",
            expect.ExpectColumnValuesToBeBetween(column="class_drift", max_value=limits.max_class_drift),
            "The overall accuracy changes with the shares, whatever the model does.",
            "warning",
        ),
    ]
