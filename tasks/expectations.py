"""What prepared data must satisfy, as a Great Expectations suite in code."""

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.settings import Validate

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation import Expectation

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
_RUN_TIME = datetime(1970, 1, 1, tzinfo=UTC)  # of the Data Docs; see _settle
_TIME = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHOWN = 10  # offenders that a finding names


@dataclass(frozen=True)
class Check:
    """An expectation on one table, with the words for it."""

    what: str
    allowed: str
    expectation: "Expectation"


@dataclass(frozen=True)
class Finding:
    """What became of a check."""

    what: str
    observed: str
    allowed: str
    ok: bool
    offenders: list[str]  # the first few
    more: int  # offenders that are not listed


def examine(
    tables: Mapping[str, pd.DataFrame], checks: Mapping[str, list[Check]], docs: Path, run_name: str
) -> list[Finding]:
    """Run the checks of each table and write the Data Docs into the folder `docs`.

    The first column of a table names its rows. An expectation that could not be computed is a finding that is not ok.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    context.delete_data_docs_site("local_site")
    site: Any = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())},
    }
    context.add_data_docs_site("validation", site)
    source = context.data_sources.add_pandas("prepared")
    findings = []
    for name, table in tables.items():
        for check in checks[name]:
            check.expectation.description = f"{check.what}: {check.allowed}"
        suite = context.suites.add(gx.ExpectationSuite(name, expectations=[c.expectation for c in checks[name]]))
        data = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        validation = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=data, suite=suite))
        result = validation.run(
            batch_parameters={"dataframe": table},
            run_id=gx.RunIdentifier(run_name=run_name, run_time=_RUN_TIME),
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": [table.columns[0]],
                "return_unexpected_index_query": False,
            },
        )
        # An expectation that Great Expectations does not know is dropped without a word.
        assert len(result.results) == len(checks[name]), "not every expectation ran"
        found = {entry.expectation_config.description: entry for entry in result.results if entry.expectation_config}
        findings += [_finding(check, found[check.expectation.description], table) for check in checks[name]]
    context.build_data_docs()
    _settle(docs)
    return findings


def _finding(check: Check, found: "ExpectationValidationResult", table: pd.DataFrame) -> Finding:
    result = found.result
    errors = _errors(found.exception_info or {})
    if errors:
        return Finding(check.what, f"error: {'; '.join(errors)}", check.allowed, False, [], 0)
    if "observed_value" in result:
        return Finding(check.what, str(result["observed_value"]), check.allowed, bool(found.success), [], 0)
    count = result["unexpected_count"]
    rows = result["element_count"] - result.get("missing_count", 0)
    observed = f"{count} of {rows} fail" if count else f"all {rows} pass"
    offenders = [_offender(row, table.columns[0]) for row in result["unexpected_index_list"][:_SHOWN]]
    ok = bool(found.success) and rows > 0  # an expectation holds where there is nothing to look at
    return Finding(check.what, observed, check.allowed, ok, offenders, count - len(offenders))


def _offender(row: Mapping[str, Any], key: str) -> str:
    """A row that failed: its name, and the values that were looked at."""
    return f"{row[key]} ({', '.join(f'{name} {value}' for name, value in row.items() if name != key)})"


def _errors(info: Mapping[str, Any]) -> list[str]:
    """The messages of what an expectation raised: directly, or once for each figure that it needs."""
    entries = [info] if "raised_exception" in info else list(info.values())
    return sorted({str(entry["exception_message"]) for entry in entries if entry["raised_exception"]})


def _settle(docs: Path) -> None:
    """Replace the random ids and the times in the pages, so that the same data makes the same files."""
    for page in docs.rglob("*.html"):
        text = _TIME.sub(_RUN_TIME.strftime("%Y%m%dT%H%M%S.%fZ"), page.read_text(encoding="utf-8"))
        for number, found in enumerate(dict.fromkeys(_UUID.findall(text))):
            text = text.replace(found, str(uuid.UUID(int=number)))
        page.write_text(text, encoding="utf-8")


def checks(manifest: Mapping[str, Any], limits: Validate) -> dict[str, list[Check]]:
    """The checks by the table they stand on (see tasks/image_table.py)."""
    from great_expectations import expectations as expect

    count = sum(split["images"] for split in manifest["splits"].values())
    size, channels, classes = manifest["image_size"], manifest["channels"], len(manifest["classes"])

    def all_equal(column: str, value: int) -> Check:
        expectation = expect.ExpectColumnValuesToBeInSet(column=column, value_set=[value])
        return Check(f"{column} as in the manifest", str(value), expectation)

    return {
        "images": [
            Check(
                "as many images as in the manifest",
                str(count),
                expect.ExpectTableRowCountToEqual(value=count),
            ),
            Check(
                "known labels",
                f"0 to {classes - 1}",
                expect.ExpectColumnValuesToBeInSet(column="label", value_set=list(range(classes))),
            ),
            all_equal("height", size),
            all_equal("width", size),
            all_equal("channels", channels),
            Check(
                # Images in 0 .. 1 that were stored as whole numbers are all but black.
                "pixels in the range 0 to 255",
                "the largest is 2 to 255",
                expect.ExpectColumnMaxToBeBetween(column="maximum", min_value=2, max_value=255),
            ),
            Check(
                "no image of one colour",
                "standard deviation of the pixels above 0",
                expect.ExpectColumnValuesToBeBetween(column="std", min_value=0, strict_min=True),
            ),
            Check(
                "no image in more than one split",
                f"at most {limits.max_shared_images}",
                expect.ExpectColumnValuesToBeNull(
                    column="shared_with", mostly=max(0, count - limits.max_shared_images) / max(1, count)
                ),
            ),
        ],
        "classes": [
            Check(
                "every class in every split",
                "at least 1 image",
                expect.ExpectColumnValuesToBeBetween(column="images", min_value=1),
            ),
            Check(
                "enough images of each class in every split",
                f"at least {limits.min_images_per_class} images",
                expect.ExpectColumnValuesToBeBetween(column="images", min_value=limits.min_images_per_class),
            ),
            Check(
                "balanced training images",
                f"the largest class has at most {limits.max_imbalance:g} times the images of any",
                expect.ExpectColumnValuesToBeBetween(column="imbalance", max_value=limits.max_imbalance),
            ),
            Check(
                "images of each class as in the manifest",
                "equal",
                expect.ExpectColumnPairValuesToBeEqual(column_A="images", column_B="manifest_images"),
            ),
        ],
        "dataset": [
            Check(
                "content as in the manifest",
                "equal hashes",
                expect.ExpectColumnPairValuesToBeEqual(column_A="hash", column_B="manifest_hash"),
            ),
        ],
    }
