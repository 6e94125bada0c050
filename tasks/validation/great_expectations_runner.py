"""Runs expectations on tables with Great Expectations and returns a finding for each."""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation import Expectation as GxExpectation

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
_RUN_TIME = datetime(1970, 1, 1, tzinfo=UTC)  # in the Data Docs; see _make_reproducible
_TIME = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAX_LISTED = 10  # offenders of a finding in messages and pages
_SEVERITIES = {"error": "critical", "warning": "warning"}  # ours -> Great Expectations'

Severity = Literal["error", "warning"]  # what stops the pipeline: validate.stop_on


@dataclass(frozen=True)
class Expectation:
    """An expectation on one table, with its description."""

    what: str  # what is expected, in a few words; unique within a table
    allowed: str  # the limit, in words
    gx: "GxExpectation"
    why: str  # the consequence if it is not met
    severity: Severity = "error"


class Offender(NamedTuple):
    """A row that does not meet an expectation: its name, and the values that were checked."""

    name: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in self.values.items())})"


@dataclass(frozen=True)
class Finding:
    """The result of an expectation."""

    what: str
    observed: str
    allowed: str
    ok: bool
    severity: Severity
    why: str
    table: str  # the name of the table that was checked
    offenders: list[Offender]  # all, even if few enough of them are allowed

    @property
    def listed(self) -> list[Offender]:
        """The first offenders, for messages and pages."""
        return self.offenders[:_MAX_LISTED]

    @property
    def more(self) -> int:
        """How many offenders are not listed."""
        return len(self.offenders) - len(self.listed)


def run_expectations(
    tables: Mapping[str, pd.DataFrame], expectations: Mapping[str, list[Expectation]], docs: Path, run_name: str
) -> list[Finding]:
    """Run the expectations of each table and write the Data Docs into the folder `docs`.

    The first column of a table names its rows. An expectation that cannot be computed, or that has no rows to check,
    fails as an error.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.metadata_types import FailureSeverity

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
        for expectation in expectations[name]:
            expectation.gx.description = f"{expectation.what}: {expectation.allowed}"
            expectation.gx.severity = FailureSeverity(_SEVERITIES[expectation.severity])
        suite = context.suites.add(gx.ExpectationSuite(name, expectations=[each.gx for each in expectations[name]]))
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
        # Great Expectations silently drops an expectation that it does not know.
        assert len(result.results) == len(expectations[name]), "not every expectation ran"
        results = {entry.expectation_config.description: entry for entry in result.results if entry.expectation_config}
        findings += [_finding(each, results[each.gx.description], name, table) for each in expectations[name]]
    context.build_data_docs()
    _make_reproducible(docs)
    return findings


def _finding(
    expectation: Expectation, validation: "ExpectationValidationResult", name: str, table: pd.DataFrame
) -> Finding:
    def finding(observed: str, ok: bool, severity: Severity, offenders: Sequence[Offender] = ()) -> Finding:
        what, allowed, why = expectation.what, expectation.allowed, expectation.why
        return Finding(what, observed, allowed, ok, severity, why, name, list(offenders))

    result, success = validation.result, bool(validation.success)
    errors = _errors(validation.exception_info or {})
    if errors:
        return finding(f"error: {'; '.join(errors)}", False, "error")
    if "observed_value" in result:
        return finding(str(result["observed_value"]), success, expectation.severity)
    count = result["unexpected_count"]
    rows = result["element_count"] - result.get("missing_count", 0)
    if not rows:  # Great Expectations counts an expectation on no rows as met
        return finding("no rows to check", False, "error")
    observed = f"{count} of {rows} fail" if count else f"all {rows} pass"
    key = table.columns[0]
    offenders = [
        Offender(str(row[key]), {name: value for name, value in row.items() if name != key})
        for row in result["unexpected_index_list"]
    ]
    return finding(observed, success, expectation.severity, offenders)


def _errors(info: Mapping[str, Any]) -> list[str]:
    """The messages of the exceptions: one of the expectation itself, or one for each metric that it needs."""
    entries = [info] if "raised_exception" in info else list(info.values())
    return sorted({str(entry["exception_message"]) for entry in entries if entry["raised_exception"]})


def _make_reproducible(docs: Path) -> None:
    """Replace random ids and times in the pages, so that the same data give the same files."""
    for page in docs.rglob("*.html"):
        text = _TIME.sub(_RUN_TIME.strftime("%Y%m%dT%H%M%S.%fZ"), page.read_text(encoding="utf-8"))
        for number, random_id in enumerate(dict.fromkeys(_UUID.findall(text))):
            text = text.replace(random_id, str(uuid.UUID(int=number)))
        page.write_text(text, encoding="utf-8")
