"""Runs expectations on tables through Great Expectations and says what became of each."""

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
    from great_expectations.expectations.expectation import Expectation

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
_RUN_TIME = datetime(1970, 1, 1, tzinfo=UTC)  # of the Data Docs; see _settle
_TIME = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHOWN = 10  # offenders that a finding names
_SEVERITIES = {"error": "critical", "warning": "warning"}  # in the words of Great Expectations

Severity = Literal["error", "warning"]  # whether it stops the chain or is shown (validate.stop_on)


@dataclass(frozen=True)
class Check:
    """An expectation on one table, with the words for it."""

    what: str
    allowed: str
    expectation: "Expectation"
    why: str  # what goes wrong otherwise
    severity: Severity = "error"


class Offender(NamedTuple):
    """A row that failed: its name, and the values that were looked at."""

    name: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in self.values.items())})"


@dataclass(frozen=True)
class Finding:
    """What became of a check."""

    what: str
    observed: str
    allowed: str
    ok: bool
    severity: Severity
    why: str
    offenders: list[Offender]  # the first few
    more: int  # offenders that are not listed


def examine(
    tables: Mapping[str, pd.DataFrame], checks: Mapping[str, list[Check]], docs: Path, run_name: str
) -> list[Finding]:
    """Run the checks of each table and write the Data Docs into the folder `docs`.

    The first column of a table names its rows. An expectation that could not be computed, or that had nothing to look
    at, is an error.
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
        for check in checks[name]:
            check.expectation.description = f"{check.what}: {check.allowed}"
            check.expectation.severity = FailureSeverity(_SEVERITIES[check.severity])
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
    def finding(
        observed: str, ok: bool, severity: Severity, offenders: Sequence[Offender] = (), more: int = 0
    ) -> Finding:
        return Finding(check.what, observed, check.allowed, ok, severity, check.why, list(offenders), more)

    result = found.result
    errors = _errors(found.exception_info or {})
    if errors:
        return finding(f"error: {'; '.join(errors)}", False, "error")
    if "observed_value" in result:
        return finding(str(result["observed_value"]), bool(found.success), check.severity)
    count = result["unexpected_count"]
    rows = result["element_count"] - result.get("missing_count", 0)
    if not rows:  # an expectation holds where there is nothing to look at
        return finding("nothing to look at", False, "error")
    observed = f"{count} of {rows} fail" if count else f"all {rows} pass"
    key = table.columns[0]
    offenders = [
        Offender(str(row[key]), {name: value for name, value in row.items() if name != key})
        for row in result["unexpected_index_list"][:_SHOWN]
    ]
    return finding(observed, bool(found.success), check.severity, offenders, count - len(offenders))


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
