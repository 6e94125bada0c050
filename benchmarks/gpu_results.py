"""The list's figures in a Markdown file: one block a measurement, between two comments that also say how old it is."""

import re
from pathlib import Path

from d2r_core import files

# In the place of the commit and its date.
NEVER, UNFINISHED = "never", "unfinished"


def finished(results: Path) -> dict[str, str]:
    """By measurement, the commit and its date that its figures stand for; those without finished figures are absent."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    stamps = re.findall(r"^<!-- gpu:(\S+) (.*?) -->$", text, re.MULTILINE)
    return {key: stamp for key, stamp in stamps if stamp not in (NEVER, UNFINISHED)}


def write(results: Path, key: str, stamp: str, block: str) -> None:
    """Put the measurement's block in the place of its old one, or at the file's end; the rest stays byte for byte."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    written = f"<!-- gpu:{key} {stamp} -->\n{block.strip()}\n<!-- /gpu:{key} -->\n"
    old = re.compile(rf"^<!-- gpu:{re.escape(key)} .*?^<!-- /gpu:{re.escape(key)} -->\n", re.DOTALL | re.MULTILINE)
    if old.search(text):
        text = old.sub(lambda match: written, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{written}".lstrip()
    files.write_text(results, text)
