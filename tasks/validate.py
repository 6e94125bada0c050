"""Stage `validate`: is the prepared data fit to train on? Stops the chain if not; says what it found in either case."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2r_core.data import load_split
from d2r_core.errors import UserError
from d2r_core.files import write_text
from tasks import expectations, image_table, lineage, stage
from tasks.expectations import Finding
from tasks.paths import Paths
from tasks.settings import Settings


def run(settings: Settings, paths: Paths) -> list[Finding]:
    """Examine the prepared data and write reports/validation: Data Docs, validation.json and validation.md.

    Raises:
        UserError: the data cannot be read, or an expectation failed; the reports are written in the second case.
    """
    manifest = lineage.manifest(paths)
    splits = {name: load_split(paths.prepared / f"{name}.safetensors") for name in manifest["splits"]}
    images = image_table.images(splits, manifest["classes"])
    tables = {
        "images": images,
        "classes": image_table.classes(images, manifest),
        "dataset": image_table.dataset(splits, manifest),
    }
    checks = expectations.checks(manifest, settings.validate_)
    paths.reports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.reports, prefix=".validation.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        findings = expectations.examine(tables, checks, new, run_name=f"data-{manifest['hash'][:12]}")
        summary = {
            "success": all(finding.ok for finding in findings),
            "data_hash": manifest["hash"],
            "images": len(images),
            "expectations": [asdict(finding) for finding in findings],
        }
        write_text(new / "validation.json", json.dumps(summary, indent=2) + "\n")
        write_text(new / "validation.md", _markdown(findings, manifest, len(images)))
        if summary["success"]:
            write_text(new / paths.accepted.name, json.dumps({"data_hash": manifest["hash"]}) + "\n")
        if paths.validation.exists():
            paths.validation.rename(old)
        new.rename(paths.validation)
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        raise UserError(_message(failed, len(findings), paths))
    print(f"validated {len(images)} images: {len(findings)} of {len(findings)} expectations hold -> {paths.validation}")
    return findings


def _markdown(findings: list[Finding], manifest: dict[str, Any], images: int) -> str:
    failed = sum(not finding.ok for finding in findings)
    lines = [
        "# Data validation",
        "",
        f"{images} images of {len(manifest['classes'])} classes, source `{manifest['source']}`, "
        f"hash `{manifest['hash'][:12]}`: "
        + (f"**{failed} of {len(findings)} expectations failed**." if failed else "every expectation holds."),
        "",
        "| | expectation | observed | allowed |",
        "|---|---|---|---|",
    ]
    lines += [f"| {'ok' if f.ok else '**failed**'} | {f.what} | {f.observed} | {f.allowed} |" for f in findings]
    for finding in findings:
        if finding.offenders:
            lines += ["", f"## {finding.what}", "", *(f"- {offender}" for offender in finding.offenders)]
            lines += [f"- and {finding.more} more"] if finding.more else []
    return "\n".join(lines) + "\n"


def _message(failed: list[Finding], total: int, paths: Paths) -> str:
    """The failing expectations as a table in plain text, each with its offenders below it."""
    rows = [("expectation", "observed", "allowed"), *((f.what, f.observed, f.allowed) for f in failed)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {what:<{widths[0]}}  {observed:<{widths[1]}}  {allowed}" for what, observed, allowed in rows]
    table = lines[:1]
    for line, finding in zip(lines[1:], failed, strict=True):
        table += [line, *(f"    {offender}" for offender in finding.offenders)]
        table += [f"    and {finding.more} more"] if finding.more else []
    return "\n".join(
        [
            f"{paths.prepared}: {len(failed)} of {total} expectations failed",
            *table,
            f"Mend the data, or change the limits under validate (params.yaml). All findings: {paths.validation}: "
            "index.html, validation.json, validation.md",
        ]
    )


if __name__ == "__main__":
    stage.main(run)
