"""The report and the model card: every figure is there, nothing is loaded from elsewhere, any name is harmless."""

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from d2r_core.errors import UserError
from tasks import charts, report
from tasks import settings as settings_file
from tasks.paths import Paths
from tasks.settings import Settings

ROOT = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
DIGITS = [str(digit) for digit in range(10)]
EPS = 0.1
Booleans = npt.NDArray[np.bool_]


def make_inputs(
    root: Path,
    *,
    classes: list[str] = DIGITS,
    pretrain_epochs: int = 10,
    autoattack_images: int = 50,
    empty_class: int | None = None,
    **changes: dict[str, Any],
) -> tuple[Settings, Paths]:
    """All that the report reads, consistent in itself: the figures are counted from made-up predictions per image.

    `empty_class` has no test image; `changes` are laid over the sections of params.yaml.
    """
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, change in changes.items():
        values[section] |= change
    values["pretrain"]["epochs"] = pretrain_epochs
    settings, paths = settings_file.parse(values), Paths(root)
    rng = np.random.default_rng(0)
    count = len(classes)
    labels = np.tile(np.array([label for label in range(count) if label != empty_class]), 12)
    manifest = _manifest(classes, labels)
    _write(paths.manifest, manifest)
    _write(paths.validation / "validation.json", {"success": True, "expectations": EXPECTATIONS})

    metadata = {name: _metadata(name, count) for name in ("guidance", "target")}
    _write(paths.guidance.with_suffix(".json"), metadata["guidance"])
    _write(paths.target.with_suffix(".json"), metadata["target"])
    _histories(paths, pretrain_epochs)

    subset = np.arange(min(autoattack_images, len(labels)))
    rows, models = [], {}
    for name, chances in {"guidance": (0.99, 0.3, 0.02, 0.01), "target": (0.97, 0.85, 0.72, 0.7)}.items():
        toughness = rng.random(len(labels))  # an image that falls to a weak attack falls to most strong ones
        right = {
            key: toughness + 0.02 * rng.standard_normal(len(labels)) < chance
            for key, chance in zip(ATTACKS, chances, strict=True)
        }
        worst = np.logical_and.reduce(list(right.values()))
        attacks = {key: _figure(key, right[key], labels, count) for key in ATTACKS}
        attacks["worst"] = _figure("worst", worst, labels, count)
        if autoattack_images:
            right["autoattack"] = worst[subset] & (rng.random(len(subset)) < 0.95)
            attacks["autoattack"] = _figure("autoattack", right["autoattack"], labels[subset], count)
        models[name] = {
            "architecture": metadata[name]["architecture"],
            "weights_sha256": metadata[name]["weights_sha256"],
            "attacks": attacks,
        }
        for key, hits in right.items():
            wrong = (labels[: len(hits)] + 1 + rng.integers(0, count - 1, len(hits))) % count
            prediction = np.where(hits, labels[: len(hits)], wrong)
            frame = {"model": name, "attack": key, "index": np.arange(len(hits)), "label": labels[: len(hits)]}
            margin = np.where(hits, 1.0, -1.0) * rng.random(len(hits))
            rows.append(pd.DataFrame({**frame, "prediction": prediction, "margin": margin, "correct": hits}))
    examples = pd.concat(rows, ignore_index=True)
    examples.to_parquet(paths.examples)
    _gallery(paths, examples, labels, rng)
    data = {"source": "digits", "hash": manifest["hash"], "classes": classes, "test_images": len(labels)}
    about = {"seed": 0, "precision": "fp32", "device": "cpu", "settings_hash": settings.hash("seed", "evaluate")}
    _write(paths.robustness, {"data": data, **about, "norm": "Linf", "models": models})
    return settings, paths


ATTACKS = {
    "clean": {"name": "clean", "eps": 0.0, "step_size": 0.0, "steps": 0},
    "fgsm": {"name": "FGSM", "eps": EPS, "step_size": EPS, "steps": 1},
    "pgd": {"name": "PGD-20", "eps": EPS, "step_size": 0.025, "steps": 20},
    "cw": {"name": "CW-20", "eps": EPS, "step_size": 0.025, "steps": 20},
}
MORE_ATTACKS = {
    "worst": {"name": "worst of these", "eps": EPS, "step_size": 0.025, "steps": 20},
    "autoattack": {"name": "AutoAttack", "eps": EPS, "step_size": None, "steps": None},
}
EXPECTATIONS: list[dict[str, Any]] = [
    {"what": "known labels", "observed": "all 1420 pass", "allowed": "0 to 9", "ok": True, "offenders": [], "more": 0},
    {"what": "balance", "observed": 1.04, "allowed": "at most 1.5", "ok": True, "offenders": [], "more": 0},
    {"what": "shared images", "observed": {"train, test": 0}, "allowed": None, "ok": True, "offenders": [], "more": 0},
    {
        "what": "no constant image",
        "observed": "2 of 1420 fail",
        "allowed": "none",
        "ok": False,
        "offenders": ["train[17]", "test[3]"],
        "more": 0,
    },
]


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _manifest(classes: list[str], labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    test = np.bincount(labels, minlength=len(classes)).tolist()
    splits = {"train": [117] * len(classes), "validation": [13] * len(classes), "test": test}
    return {
        "source": "digits",
        "path": None,
        "classes": classes,
        "image_size": 16,
        "channels": 3,
        "splits": {name: {"images": sum(counts), "per_class": counts} for name, counts in splits.items()},
        "hash": "d47a" * 16,
        "converted": {"grey": 1797, "resized": 1797},
    }


def _metadata(name: str, classes: int) -> dict[str, Any]:
    network = {"guidance": {"name": "resnet18", "width": 16, "strides": [1, 1, 2, 2]}}
    network["target"] = {"name": "wide_resnet", "depth": 10, "widen_factor": 1}
    return {
        "architecture": {**network[name], "num_classes": classes, "image_size": 16},
        "metrics": {"epoch": 27, "clean_accuracy": 0.969, "robust_accuracy": 0.734}
        if name == "target"
        else {"epoch": 9},
        "seed": 0,
        "git_commit": "0123456789abcdef" * 2 + "01234567",
        "git_dirty": name == "target",
        "data_hash": "d47a" * 16,
        "settings_hash": "5e77" * 16,
        "mlflow_run_id": "f0" * 16,
        "weights_sha256": {"guidance": "9d" * 32, "target": "7a" * 32}[name],
    }


def _histories(paths: Paths, pretrain_epochs: int) -> None:
    epoch = np.arange(1, pretrain_epochs + 1)
    pretrain = {
        "epoch": epoch,
        "loss": 2.0 * np.exp(-0.5 * epoch) + 0.02,
        "batch_accuracy": 0.99 - 0.6 * np.exp(-0.6 * epoch),
        "accuracy": 0.985 - 0.75 * np.exp(-0.6 * epoch),
        "learning_rate": 0.1,
        "images_per_second": 900.0,
    }
    pd.DataFrame(pretrain).to_csv(paths.pretrain_history, index=False)
    epoch = np.arange(1, 31)
    wobble = 0.015 * np.sin(2.1 * epoch)
    terms = {"ce": np.exp(-0.2 * epoch) + 0.05, "logit": 2 * np.exp(-0.05 * epoch) + wobble}
    terms |= {"clean": 0.05 * np.exp(-0.1 * epoch), "adv": 1.2 * np.exp(-0.06 * epoch)}
    accuracies = {"clean_accuracy": 0.97 - 0.6 * np.exp(-0.25 * epoch) + wobble / 3}
    accuracies |= {"robust_accuracy": 0.73 - 0.5 * np.exp(-0.12 * epoch) + wobble}
    train = {"epoch": epoch, "loss": sum(terms.values()), **terms, "learning_rate": 0.1, **accuracies}
    pd.DataFrame({**train, "images_per_second": 400.0}).to_csv(paths.train_history, index=False)


def _figure(key: str, right: Booleans, labels: npt.NDArray[np.int64], classes: int) -> dict[str, Any]:
    of_class = [right[labels == label] for label in range(classes)]
    return {
        **{**ATTACKS, **MORE_ATTACKS}[key],
        "accuracy": float(right.mean()),
        "correct": int(right.sum()),
        "images": len(right),
        "per_class": [float(hits.mean()) if len(hits) else None for hits in of_class],
    }


def _gallery(paths: Paths, examples: pd.DataFrame, labels: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
    count = min(32, len(labels))
    clean = rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    tensors: dict[str, npt.NDArray[Any]] = {"index": np.arange(count), "labels": labels[:count], "clean": clean}
    for model in ("guidance", "target"):
        noise = EPS * np.sign(rng.standard_normal(clean.shape))
        tensors[f"{model}_adversarial"] = (clean / 255 + noise).clip(0, 1).astype(np.float32)
        for kind, attack in (("clean", "clean"), ("adversarial", "pgd")):
            chosen = examples[(examples["model"] == model) & (examples["attack"] == attack)]
            tensors[f"{model}_{kind}_prediction"] = chosen["prediction"].to_numpy()[:count].astype(np.int64)
    save_file(tensors, paths.gallery)


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
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def images(self) -> list[npt.NDArray[np.uint8]]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def make_report(root: Path, **choices: Any) -> tuple[Page, str, Paths]:
    settings, paths = make_inputs(root, **choices)
    report.run(settings, paths)
    return Page(paths.report), paths.model_card.read_text(), paths


def test_every_figure_is_on_the_page_and_the_card(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    for model in json.loads(paths.robustness.read_text())["models"].values():
        for attack in model["attacks"].values():
            figure = f"{100 * attack['accuracy']:.1f}%"
            assert figure + f"{attack['correct']} / {attack['images']}" in page.text
            assert re.search(rf"\| {attack['name']} \|.* {attack['images']} \|.*{figure}", card)
        for share in model["attacks"]["worst"]["per_class"]:
            assert f"{100 * share:.1f}%" in page.text or model["architecture"]["name"] == "resnet18"
    for said in (
        "eps 0.1, 20 steps of 0.025",
        "kept: epoch 27",
        "no constant image",
        "train[17]",
        "7a" * 32,
        "\N{MULTIPLICATION SIGN} 5",
    ):
        assert said in page.text


def test_headline_says_what_the_figures_say(tmp_path: Path) -> None:
    page, card, paths = make_report(tmp_path)
    attacks = json.loads(paths.robustness.read_text())["models"]["target"]["attacks"]
    clean, worst = (f"{100 * attacks[key]['accuracy']:.1f}%" for key in ("clean", "worst"))
    assert f"right on {clean} of the clean test images and on {worst} under the worst attack" in page.text
    assert f"right on **{clean}** of the clean test images and on **{worst}**" in card


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page, _, paths = make_report(tmp_path)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(|@import|://", paths.report.read_text())


def test_images_have_texts_and_regions_have_names(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all(
        "aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in page.tags if tag == "svg"
    )
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in ids | {None}
        assert (attributes.get("href") or "#robustness").removeprefix("#") in ids


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    classes = ["<script>alert(1)</script>", "a|b", "*c*", "{{ 1 + 1 }}", 'd" onload="x']
    page, card, _ = make_report(tmp_path, classes=classes, promote={"model_name": "<u>m</u>"})
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onload" in attributes for _, attributes in page.tags)
    for label in classes:
        assert label in page.text
    assert "<script" not in card
    assert "u" not in {tag for tag, _ in page.tags}
    assert "<u>" not in card
    assert r"a\|b" in card
    assert r"\*c\*" in card


def test_perturbation_spans_the_grey_range(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path, report={"gallery_images": 3})
    tensors = load_file(paths.gallery)
    tensors["clean"][:] = 128
    half = np.full(tensors["clean"].shape[1:], EPS / 2) * (np.arange(16) - 8 > 0)
    for name in ("guidance_adversarial", "target_adversarial"):
        tensors[name] = (tensors["clean"] / 255 + 2 * half).astype(np.float32)
    tensors["target_adversarial"][0] -= (3 * half).astype(np.float32)
    save_file(tensors, paths.gallery)
    report.run(settings, paths)
    images = Page(paths.report).images()
    assert len(images) == 3 * 5
    clean, guidance, at_eps, target, at_minus_half = images[:5]
    assert (clean == 128).all()
    assert (guidance[:, 9:] == round(128 + 255 * EPS)).all()
    assert (at_eps[:, 9:] == 255).all()
    assert (at_eps[:, :9] == 128).all()
    assert (target[:, 9:] == round(128 - 255 * EPS / 2)).all()
    assert (at_minus_half[:, 9:] == 64).all()


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    _, _, first = make_report(tmp_path / "one")
    _, _, second = make_report(tmp_path / "two")
    assert first.report.read_bytes() == second.report.read_bytes()
    assert first.model_card.read_bytes() == second.model_card.read_bytes()


def test_guidance_without_pretraining_is_called_random(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, pretrain_epochs=0)
    assert "with the random weights it starts from" in page.text
    assert "Not pretrained (0 epochs)" in page.text
    assert "not pretrained: random weights" in card
    assert sum(attributes.get("class") == "chart" for _, attributes in page.tags) == 2


def test_absent_autoattack_is_said(tmp_path: Path) -> None:
    page, card, _ = make_report(tmp_path, autoattack_images=0)
    assert page.text.count("AutoAttack") == 1
    assert "AutoAttack was not run." in page.text
    assert "AutoAttack was not run." in card


def test_class_without_test_images_has_no_figure(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path, classes=["full", "empty", "other"], empty_class=1)
    assert "empty0———" in page.text


def test_checks_may_be_a_plain_list(tmp_path: Path) -> None:
    settings, paths = make_inputs(tmp_path)
    _write(paths.validation / "validation.json", EXPECTATIONS)
    report.run(settings, paths)
    assert "3 of 4 expectations met" in Page(paths.report).text


@pytest.mark.parametrize(
    ("eps", "printed"),
    [(8 / 255, "0.03137 (8/255)"), (0.031, "0.031"), (0.1, "0.1"), (1 / 255, "0.003922 (1/255)"), (0.001, "0.001")],
)
def test_eps_is_also_a_fraction_where_it_is_one(eps: float, printed: str) -> None:
    assert report.distance(eps) == printed


@pytest.mark.parametrize("artifact", ["manifest", "train_history", "robustness", "examples", "gallery"])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_missing_or_damaged_artifact_is_named(tmp_path: Path, artifact: str, damage: str) -> None:
    settings, paths = make_inputs(tmp_path)
    path: Path = getattr(paths, artifact)
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read .*`dvc repro"):
        report.run(settings, paths)
    assert not paths.report.exists()


@pytest.mark.parametrize("change", [("models", "target", "weights_sha256"), ("data", "hash")])
def test_figures_of_something_else_are_refused(tmp_path: Path, change: tuple[str, ...]) -> None:
    settings, paths = make_inputs(tmp_path)
    robustness = part = json.loads(paths.robustness.read_text())
    for key in change[:-1]:
        part = part[key]
    part[change[-1]] = "00" * 32
    _write(paths.robustness, robustness)
    with pytest.raises(UserError, match=r"was measured on other (weights|data)"):
        report.run(settings, paths)
    assert not paths.report.exists()
    assert not paths.model_card.exists()


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        *itertools.product(["percent", "log"], [[0.5], [0.1, 0.9], [math.nan, 0.2, 0.0], [math.nan]]),
        ("log", [1e-6, 100.0, 3.0]),
        ("log", [5.0, 5.0]),
        ("log", [0.0, 0.0]),
    ],
)
def test_curves_of_any_history_are_drawn(scale: Any, values: list[float]) -> None:
    series = [charts.Series("<&", "target", values), charts.Series("other", "soft", values)]
    epochs = list(range(1, len(values) + 1))
    drawing = ElementTree.fromstring(charts.curves(epochs, series, scale=scale, description='"a" < b', kept=1))
    assert drawing.get("aria-label") == '"a" < b'
    visible = [value for value in values if value > 0 or (scale == "percent" and value == 0)]
    assert [text.text for text in drawing if text.get("class") == "name"] == (["<&", "other"] if visible else [])
    for line in drawing.iter("polyline"):
        for number in re.split("[ ,]", line.get("points", "")):
            assert 0 <= float(number) <= 400


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "gpu", "quic", "sync"]
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_opens_in_a_browser(tmp_path: Path, browser: Any, width: int, colours: str) -> None:
    classes = ["aeroplane_with_a_very_long_name_and_no_space_to_break_it", *DIGITS]
    _, _, paths = make_report(tmp_path, classes=classes)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(request.url[:80]))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url[:80]))
    page.goto(paths.report.as_uri())
    assert page.locator("#robustness table").is_visible()
    images = page.locator("img").evaluate_all("images => images.map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) == 10 * 5
    assert all(complete and natural == 16 and shown > 40 for complete, natural, shown in images)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert troubles == []
    page.close()
