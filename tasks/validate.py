"""Stage `validate`: checks that the prepared data are fit for training. Stops the pipeline if not; always reports."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2r_core.data import Split, load_split
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.validation import data_report, drift, findings_table, great_expectations_runner, suite, tables
from tasks.validation.great_expectations_runner import Finding


def run(settings: Settings, paths: Paths) -> list[Finding]:
    """Validate the prepared data; write reports/validation (Data Docs, JSON, findings.csv) and reports/data.html.

    Accepted data are recorded in data/baseline.json, which the next data are compared with.

    Raises:
        UserError: the data cannot be read, or a failed expectation is severe enough to stop the pipeline
            (validate.stop_on); in the second case the reports are written first.
    """
    manifest = read_manifest(paths)
    splits = {name: load_split(paths.prepared / f"{name}.safetensors") for name in manifest["splits"]}
    quarantine = _quarantine(paths)
    images = tables.images(splits, manifest["classes"], _names(splits, paths))
    frames = {
        "images": images,
        "classes": tables.classes(images, manifest),
        "files": tables.files(images, quarantine),
        "dataset": tables.dataset(splits, manifest),
    }
    profile = drift.profile(splits, manifest)
    baseline = drift.predecessor(paths.baseline, manifest["source"], manifest["hash"])
    if baseline:
        frames["drift"] = drift.table(profile, baseline)
    expectations = suite.expectations(frames, manifest, settings.validate_)
    paths.reports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.reports, prefix=".validation.") as scratch:
        docs, page = Path(scratch, "docs"), Path(scratch, paths.data_page.name)
        docs.mkdir()
        run_name = f"data-{manifest['hash'][:12]}"
        findings = great_expectations_runner.run_expectations(frames, expectations, docs, run_name)
        failed = [finding for finding in findings if not finding.ok]
        stops = any(finding.severity in ("error", settings.validate_.stop_on) for finding in failed)
        compared_with = baseline["hash"] if baseline else None
        summary = _summary(findings, manifest["hash"], compared_with, len(images), stops=stops)
        findings_table.write(docs / "findings.csv", findings, images, quarantine)
        write_text(docs / "validation.json", json.dumps(summary, indent=2) + "\n")
        drift_table = frames.get("drift")
        write_text(page, data_report.render(splits, images, manifest, findings, drift_table, quarantine, stops=stops))
        if not stops:
            write_text(docs / paths.accepted.name, json.dumps({"data_hash": manifest["hash"]}) + "\n")
        if paths.validation.exists():
            paths.validation.rename(Path(scratch, "previous"))
        docs.rename(paths.validation)
        page.replace(paths.data_page)
    if stops:
        raise UserError(_message(failed, len(findings), paths))
    drift.accept(paths.baseline, manifest["source"], profile)
    for line in _table(failed):
        print(line)
    print(
        f"validated {len(images)} images: {len(findings) - len(failed)} of {len(findings)} expectations met"
        f"{f', {len(failed)} warnings' if failed else ''} -> {paths.data_page}"
    )
    return findings


def _names(splits: Mapping[str, Split], paths: Paths) -> dict[str, list[str]]:
    """The origin of each image. Raises UserError if names.json belongs to other data."""
    names = _json(paths.names)
    lengths = {name: len(split_names) for name, split_names in names.items()}
    if lengths != {name: len(split) for name, split in splits.items()}:
        raise UserError(f"{paths.names}: does not match the prepared images. `dvc repro prepare` creates it.")
    return dict(names)


def _quarantine(paths: Paths) -> list[dict[str, str]]:
    return list(_json(paths.quarantine))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `dvc repro prepare` creates it.") from None


def _summary(
    findings: Sequence[Finding], data_hash: str, compared_with: str | None, images: int, *, stops: bool
) -> dict[str, Any]:
    """The content of validation.json."""
    return {
        "success": not stops,
        "data_hash": data_hash,
        "compared_with": compared_with,
        "images": images,
        "expectations": [
            {
                "what": finding.what,
                "severity": finding.severity,
                "observed": finding.observed,
                "allowed": finding.allowed,
                "ok": finding.ok,
                "offenders": [str(offender) for offender in finding.listed],
                "more": finding.more,
            }
            for finding in findings
        ],
    }


def _table(failed: Sequence[Finding]) -> list[str]:
    """The failed expectations as lines of plain text, errors first, each followed by its offenders."""
    if not failed:
        return []
    failed = sorted(failed, key=lambda finding: finding.severity)
    rows = [
        ("severity", "expectation", "observed", "allowed"),
        *((f.severity, f.what, f.observed, f.allowed) for f in failed),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    ]
    table = lines[:1]
    for line, finding in zip(lines[1:], failed, strict=True):
        table += [line, *(f"    {offender}" for offender in finding.listed)]
        table += [f"    and {finding.more} more"] if finding.more else []
    return table


def _message(failed: list[Finding], total: int, paths: Paths) -> str:
    return "\n".join(
        [
            f"{paths.prepared}: {len(failed)} of {total} expectations failed",
            *_table(failed),
            "Fix the data, or change the limits in the section validate (params.yaml). "
            f"See {paths.data_page}; every image concerned is in {paths.validation / 'findings.csv'}.",
        ]
    )


if __name__ == "__main__":
    entry_point.main(run)
