"""The expectations on prepared data: each with its severity, limit and reason."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tasks.config.settings import Validate
from tasks.validation.great_expectations_runner import Expectation


def expectations(
    tables: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any], limits: Validate
) -> dict[str, list[Expectation]]:
    """The expectations on each table (tasks/validation/tables.py, tasks/validation/drift.py), by the table's name."""
    by_table = {
        "images": [*_shape(manifest), *_pixels(), *_duplicates(len(tables["images"]), limits)],
        "classes": _classes(limits),
        "files": _files(),
        "dataset": _dataset(),
    }
    return by_table | ({"drift": _drift(limits)} if "drift" in tables else {})


def _shape(manifest: Mapping[str, Any]) -> list[Expectation]:
    from great_expectations import expectations as expect

    count, classes = sum(split["images"] for split in manifest["splits"].values()), len(manifest["classes"])

    def all_equal(column: str, value: int) -> Expectation:
        return Expectation(
            f"{column} as in the manifest",
            str(value),
            expect.ExpectColumnValuesToBeInSet(column=column, value_set=[value]),
            "The models are built for this shape.",
        )

    return [
        Expectation(
            "as many images as in the manifest",
            str(count),
            expect.ExpectTableRowCountToEqual(value=count),
            "Tensors and manifest must come from the same run of prepare.",
        ),
        Expectation(
            "known labels",
            f"0 to {classes - 1}",
            expect.ExpectColumnValuesToBeInSet(column="label", value_set=list(range(classes))),
            "A label is the index of a class; other values have no meaning.",
        ),
        all_equal("height", manifest["image_size"]),
        all_equal("width", manifest["image_size"]),
        all_equal("channels", manifest["channels"]),
    ]


def _pixels() -> list[Expectation]:
    from great_expectations import expectations as expect

    return [
        Expectation(
            "pixels in the range 0 to 255",
            "the largest is 2 to 255",
            expect.ExpectColumnMaxToBeBetween(column="maximum", min_value=2, max_value=255),
            "Images in 0 .. 1 that were stored as integers are almost black.",
        ),
        Expectation(
            "no image of one colour",
            "standard deviation of the pixels above 0",
            expect.ExpectColumnValuesToBeBetween(column="std", min_value=0, strict_min=True),
            "It shows nothing: a failed export, or the placeholder of a failed download.",
        ),
    ]


def _duplicates(count: int, limits: Validate) -> list[Expectation]:
    from great_expectations import expectations as expect

    def at_most(limit: int, column: str) -> Any:
        mostly = max(0, count - limit) / max(1, count)
        return expect.ExpectColumnValuesToBeNull(column=column, mostly=mostly)

    return [
        Expectation(
            "no image in more than one split",
            f"at most {limits.max_shared_images}",
            at_most(limits.max_shared_images, "shared_with"),
            "A model that was trained on test images appears more accurate and robust than it is.",
        ),
        Expectation(
            "no near-duplicate in another split",
            f"at most {limits.max_near_duplicates}",
            at_most(limits.max_near_duplicates, "near_duplicate_of"),
            "A resized, recompressed or brightened copy leaks test images into training as well.",
            "warning",
        ),
        Expectation(
            "no image twice in a split",
            f"at most {limits.max_repeated_images}",
            at_most(limits.max_repeated_images, "repeats"),
            "A repeated image counts twice in training and in every accuracy.",
            "warning",
        ),
        Expectation(
            "one label for the same pixels",
            f"at most {limits.max_label_conflicts} with another label elsewhere",
            at_most(limits.max_label_conflicts, "also_labelled"),
            "One of the two labels is wrong.",
        ),
    ]


def _classes(limits: Validate) -> list[Expectation]:
    from great_expectations import expectations as expect

    return [
        Expectation(
            "every class in every split",
            "at least 1 image",
            expect.ExpectColumnValuesToBeBetween(column="images", min_value=1),
            "A class without images is neither learned nor evaluated.",
        ),
        Expectation(
            "enough images of each class in every split",
            f"at least {limits.min_images_per_class} images",
            expect.ExpectColumnValuesToBeBetween(column="images", min_value=limits.min_images_per_class),
            "The accuracy of a class on a few images is not meaningful.",
        ),
        Expectation(
            "balanced training images",
            f"the largest class has at most {limits.max_imbalance:g} times the images of any",
            expect.ExpectColumnValuesToBeBetween(column="imbalance", max_value=limits.max_imbalance),
            "All images have the same weight: rare classes are learned last and misclassified first.",
        ),
        Expectation(
            "images of each class as in the manifest",
            "equal",
            expect.ExpectColumnPairValuesToBeEqual(column_A="images", column_B="manifest_images"),
            "Tensors and manifest must come from the same run of prepare.",
        ),
    ]


def _files() -> list[Expectation]:
    from great_expectations import expectations as expect

    return [
        Expectation(
            "no quarantined image",
            "none",
            expect.ExpectColumnValuesToBeNull(column="reason"),
            "Images that could not be decoded are missing from the data (prepare.on_bad_image).",
            "warning",
        )
    ]


def _dataset() -> list[Expectation]:
    from great_expectations import expectations as expect

    return [
        Expectation(
            "content as in the manifest",
            "equal hashes",
            expect.ExpectColumnPairValuesToBeEqual(column_A="hash", column_B="manifest_hash"),
            "Every figure is recorded with the hash of the data.",
        )
    ]


def _drift(limits: Validate) -> list[Expectation]:
    from great_expectations import expectations as expect

    return [
        Expectation(
            "pixels as in the last accepted data",
            f"means and deviations changed by at most {limits.max_pixel_drift:g} standard deviations",
            expect.ExpectColumnValuesToBeBetween(column="pixel_drift", max_value=limits.max_pixel_drift),
            "Another camera, light or conversion: figures before and after are not comparable.",
            "warning",
        ),
        Expectation(
            "class shares as in the last accepted data",
            f"at most {limits.max_class_drift:.0%} of the images would have to change class",
            expect.ExpectColumnValuesToBeBetween(column="class_drift", max_value=limits.max_class_drift),
            "The overall accuracy changes with the shares even if the model does not.",
            "warning",
        ),
    ]
