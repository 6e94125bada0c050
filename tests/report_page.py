"""A report made of made-up artifacts, and what a browser would see of it."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from report_inputs import make_inputs

from tasks import report
from tasks.config.paths import Paths


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data

    def images(self) -> list[npt.NDArray[np.uint8]]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def make_report(root: Path, **choices: Any) -> tuple[Page, str, Paths]:
    settings, paths = make_inputs(root, **choices)
    report.run(settings, paths)
    return Page(paths.report), paths.model_card.read_text(), paths
