"""Stage `validate`: is the prepared data fit to train on? Stops the chain if not; says what it found in either case."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from d2r_core.data import Split, load_split
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks.config import entry_point
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.data.manifest import read_manifest
from tasks.validation import data_report, drift, great_expectations_runner, suite, tables
from tasks.validation.great_expectations_runner import Finding


def run(settings: Settings, paths: Paths) -> list[Finding]:
    """Examine the prepared data; write reports/validation (Data Docs, validation.json, validation.md) and data.html.

    Accepted data are remembered in data/baseline.json, for the next ones to be compared with.

    Raises:
        UserError: the data cannot be read, or a finding is so severe that it stops the chain (validate.stop_on); the
            reports are written in the second case.
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
    before = drift.predecessor(paths.baseline, manifest["source"], manifest["hash"])
    if before:
        frames["drift"] = drift.table(profile, before)
    checks = suite.checks(frames, manifest, settings.validate_)
    paths.reports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.reports, prefix=".validation.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        findings = great_expectations_runner.examine(frames, checks, new, run_name=f"data-{manifest['hash'][:12]}")
        failed = [finding for finding in findings if not finding.ok]
        stops = any(finding.severity in ("error", settings.validate_.stop_on) for finding in failed)
        summary = {
            "success": not stops,
            "data_hash": manifest["hash"],
            "compared_with": before["hash"] if before else None,
            "images": len(images),
            "expectations": [_entry(finding) for finding in findings],
        }
        write_text(new / "validation.json", json.dumps(summary, indent=2) + "\n")
        write_text(new / "validation.md", _markdown(findings, manifest, images))
        page = data_report.render(splits, images, manifest, findings, frames.get("drift"), quarantine, stops=stops)
        write_text(Path(scratch, paths.data_page.name), page)
        if not stops:
            write_text(new / paths.accepted.name, json.dumps({"data_hash": manifest["hash"]}) + "\n")
        if paths.validation.exists():
            paths.validation.rename(old)
        new.rename(paths.validation)
        Path(scratch, paths.data_page.name).replace(paths.data_page)
    if stops:
        raise UserError(_message(failed, len(findings), paths))
    drift.accept(paths.baseline, manifest["source"], profile)
    for line in _table(failed):
        print(line)
    print(
        f"validated {len(images)} images: {len(findings) - len(failed)} of {len(findings)} expectations hold"
        f"{f', {len(failed)} to look at (warnings)' if failed else ''} -> {paths.data_page}"
    )
    return findings


def _names(splits: Mapping[str, Split], paths: Paths) -> dict[str, list[str]]:
    """Where each image came from. Raises UserError if names.json is of another preparation."""
    names = _json(paths.names)
    lengths = {name: len(found) for name, found in names.items()}
    if lengths != {name: len(split) for name, split in splits.items()}:
        raise UserError(f"{paths.names}: does not name the images that lie beside it. `dvc repro prepare` makes it.")
    return dict(names)


def _quarantine(paths: Paths) -> list[dict[str, str]]:
    return list(_json(paths.quarantine))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). `dvc repro prepare` makes it.") from None


def _entry(finding: Finding) -> dict[str, Any]:
    return {
        "what": finding.what,
        "severity": finding.severity,
        "observed": finding.observed,
        "allowed": finding.allowed,
        "ok": finding.ok,
        "offenders": [str(offender) for offender in finding.offenders],
        "more": finding.more,
    }


def _markdown(findings: list[Finding], manifest: dict[str, Any], images: pd.DataFrame) -> str:
    failed = sum(not finding.ok for finding in findings)
    lines = [
        "# Data validation",
        "",
        f"{len(images)} images of {len(manifest['classes'])} classes, source `{manifest['source']}`, "
        f"hash `{manifest['hash'][:12]}`: "
        + (f"**{failed} of {len(findings)} expectations failed**." if failed else "every expectation holds."),
        "",
        "| | expectation | observed | allowed |",
        "|---|---|---|---|",
    ]
    lines += [f"| {'ok' if f.ok else f'**{f.severity}**'} | {f.what} | {f.observed} | {f.allowed} |" for f in findings]
    for finding in findings:
        if finding.offenders:
            lines += ["", f"## {finding.what}", "", *(f"- {offender}" for offender in finding.offenders)]
            lines += [f"- and {finding.more} more"] if finding.more else []
    return "\n".join(lines) + "\n"


def _table(failed: Sequence[Finding]) -> list[str]:
    """The failing expectations as lines of plain text, errors first, each with its offenders below it."""
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
        table += [line, *(f"    {offender}" for offender in finding.offenders)]
        table += [f"    and {finding.more} more"] if finding.more else []
    return table


def _message(failed: list[Finding], total: int, paths: Paths) -> str:
    return "\n".join(
        [
            f"{paths.prepared}: {len(failed)} of {total} expectations failed",
            *_table(failed),
            f"Mend the data, or change the limits under validate (params.yaml). Look at it: {paths.data_page}; all "
            f"findings: {paths.validation}: index.html, validation.json, validation.md",
        ]
    )


if __name__ == "__main__":
    entry_point.main(run)
