"""findings.csv: every row of the prepared data that does not meet an expectation, for people and their scripts."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from d2r_core.files import atomic
from tasks.validation.great_expectations_runner import Finding

COLUMNS = ("expectation", "failed", "severity", "split", "class", "image", "other_image", "details")
# Columns of the table of images that name another image.
_OTHER_IMAGE = ("shared_with", "near_duplicate_of", "repeats", "also_labelled")


def write(
    path: Path, findings: Sequence[Finding], images: pd.DataFrame, quarantine: Sequence[Mapping[str, str]]
) -> None:
    """Write findings.csv.

    Args:
        images: as `tables.images` makes it.
        quarantine: the entries of quarantine.json.
    """
    origins = dict(zip(images["image"], zip(images["split"], images["class"], strict=True), strict=True))
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for finding in findings:
            common = {"expectation": finding.what, "failed": not finding.ok, "severity": finding.severity}
            writer.writerows(common | row for row in _rows(finding, origins, quarantine))


def _rows(
    finding: Finding, origins: Mapping[str, tuple[str, str]], quarantine: Sequence[Mapping[str, str]]
) -> Iterator[dict[str, str]]:
    if finding.table == "files":
        for entry in quarantine:
            yield {
                "split": entry["split"],
                "class": entry["class"],
                "image": entry["name"],
                "details": entry["reason"],
            }
        return
    for offender in finding.offenders:
        split, label = origins.get(offender.name, ("", ""))
        others = [str(value) for key, value in offender.values.items() if key in _OTHER_IMAGE]
        details = [f"{key} {value}" for key, value in offender.values.items() if key not in _OTHER_IMAGE]
        yield {
            "split": split,
            "class": label,
            "image": offender.name,  # or the group ("train: cat") of a finding about classes
            "other_image": ", ".join(others),
            "details": ", ".join(details),
        }
