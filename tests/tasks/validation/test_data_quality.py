"""What the validation shows but does not stop at: look-alikes, repeats, drift, the quarantine; and the page for it."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from photos import PROJECT, SHARED, load, photo, settings
from PIL import Image, ImageEnhance

from d2r_core.data import Split, content_hash, save_split
from d2r_core.errors import UserError
from tasks import prepare, validate
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings
from tasks.validation import data_report, drift, near_duplicates, tables
from tasks.validation.great_expectations_runner import Finding, Offender

CHROMIUM = Path("/usr/bin/chromium")


def limits(**values: Any) -> Settings:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["validate"] |= {"min_images_per_class": 1, "max_near_duplicates": 0} | values
    return settings_file.parse(params)


def finding(found: list[Finding], what: str) -> Finding:
    return next(one for one in found if one.what == what)


def blobs(seed: int, side: int = 32) -> Image.Image:
    """A picture with structure, unlike noise: large soft spots, and smaller ones of less contrast, as photos have."""
    rng = np.random.default_rng(seed)
    total = np.full((side, side, 3), 128.0)
    for spots, contrast in ((4, 160.0), (8, 80.0), (16, 40.0)):
        rough = Image.fromarray(rng.integers(0, 256, (spots, spots, 3), dtype=np.uint8))
        total += contrast * (np.asarray(rough.resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """photos/{train,test}/{cat,dog}: 6 and 3 pictures of each."""
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                blobs(1000 * label + 100 * (split == "test") + i).save(place / f"{i:02}.png")
    return tmp_path / "photos"


def prepared(root: Path) -> Paths:
    prepare.run(settings(image_size=32), Paths(root))
    return Paths(root)


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed": recompressed,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "reduced and enlarged": lambda image: image.resize((20, 20)).resize((32, 32)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_a_changed_copy_in_another_split_is_a_warning_and_named(
    folder: Path, copy: Callable[[Image.Image], Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    copy(Image.open(folder / "train/cat/03.png")).convert("RGB").save(folder / "test/cat/09.png")
    paths = prepared(folder.parent)
    found = finding(validate.run(limits(), paths), "no look-alike in another split")
    assert (found.ok, found.severity, found.observed) == (False, "warning", "1 of 19 fail")
    cat = f"{folder}/test/cat/09.png (looks_like {folder}/train/cat/03.png)"
    assert [str(offender) for offender in found.offenders] == [cat]
    said = capsys.readouterr().out
    assert "1 to look at (warnings)" in said
    assert cat in said
    assert "warning" in (paths.validation / "validation.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"no look-alike in another split +1 of 19 fail +at most 0"):
        validate.run(limits(stop_on="warning"), paths)
    assert not paths.accepted.exists()
    assert str(folder / "train/cat/03.png") in paths.data_page.read_text(encoding="utf-8")


def test_unrelated_pictures_do_not_look_alike() -> None:
    parts = [torch.stack([tensor(blobs(seed)) for seed in range(start, start + 300)]) for start in (0, 300)]
    assert (near_duplicates.near(parts) == -1).all()
    noise = [torch.stack([tensor(photo(seed)) for seed in range(start, start + 50)]) for start in (0, 50)]
    assert (near_duplicates.near(noise) == -1).all()


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_the_closest_hash_is_the_one_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(0)
    queries, references = (rng.integers(0, 2**63, count, dtype=np.uint64) for count in (100, 37))
    distances, positions = near_duplicates.closest(queries, references)
    for query, distance, position in zip(queries, distances, positions, strict=True):
        plain = [(int(query) ^ int(reference)).bit_count() for reference in references]
        assert (distance, position) == (min(plain), plain.index(min(plain)))


def test_splits_of_other_sizes_and_empty_ones_are_compared() -> None:
    picture = tensor(blobs(1))
    small = torch.nn.functional.adaptive_avg_pool2d(picture.float(), 16).byte()
    nothing = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert near_duplicates.near([nothing, picture[None], small[None], nothing]).tolist() == [-1, 0]


def test_repeats_and_label_conflicts_are_told_apart(folder: Path) -> None:
    shutil.copy(folder / "train/cat/00.png", folder / "train/cat/99.png")
    shutil.copy(folder / "test/cat/01.png", folder / "test/dog/99.png")
    with pytest.raises(UserError) as raised:
        validate.run(limits(), prepared(folder.parent))
    message = str(raised.value)
    assert f"{folder}/test/cat/01.png (also_labelled {folder}/test/dog/99.png (dog))" in message
    assert f"{folder}/test/dog/99.png (also_labelled {folder}/test/cat/01.png (cat))" in message
    assert message.index("one label for the same pixels") < message.index("no image twice in a split"), "errors first"
    page = Paths(folder.parent).data_page.read_text(encoding="utf-8")
    assert f'alt="{folder}/test/dog/99.png (test, dog)"' in page


def darken(splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        splits[name] = Split((split.images * 0.5).byte(), split.labels)


def rarer(splits: dict[str, Split]) -> None:
    train = splits["train"]
    splits["train"] = train.take(torch.cat([torch.where(train.labels == 0)[0][:2], torch.where(train.labels == 1)[0]]))


@pytest.mark.parametrize(
    ("change", "what", "named"),
    [
        (darken, "pixels as in the last accepted data", r"train: mean of red [\d.]+ -> [\d.]+ \(pixel_drift \d\.\d+\)"),
        (rarer, "class shares as in the last accepted data", r"train: class shares, most cat 50\.0% -> \d+\.\d%"),
    ],
)
def test_drift_against_the_last_accepted_data(
    folder: Path, change: Callable[[dict[str, Split]], None], what: str, named: str
) -> None:
    paths = prepared(folder.parent)
    first = validate.run(limits(max_imbalance=9.0), paths)
    assert not [one for one in first if "last accepted" in one.what], "there is nothing to compare with"
    old = json.loads(paths.manifest.read_text())["hash"]
    splits = load(paths)
    change(splits)
    store(paths, splits)
    found = finding(validate.run(limits(max_imbalance=9.0), paths), what)
    assert (found.ok, found.severity) == (False, "warning")
    assert re.search(named, " ".join(map(str, found.offenders)))
    report = paths.validation / "validation.json"
    assert json.loads(report.read_text())["compared_with"] == old
    written = report.read_bytes(), paths.baseline.read_bytes()
    validate.run(limits(max_imbalance=9.0), paths)
    assert (report.read_bytes(), paths.baseline.read_bytes()) == written, "the same data, the same predecessor"


def store(paths: Paths, splits: dict[str, Split]) -> None:
    manifest = json.loads(paths.manifest.read_text())
    names = json.loads(paths.names.read_text())
    for name, split in splits.items():
        save_split(paths.prepared / f"{name}.safetensors", split)
        manifest["splits"][name] = {"images": len(split), "per_class": split.labels.bincount(minlength=2).tolist()}
        names[name] = names[name][: len(split)]
    manifest["hash"] = content_hash(splits)
    paths.manifest.write_text(json.dumps(manifest))
    paths.names.write_text(json.dumps(names))


def test_refused_data_are_no_baseline_and_a_damaged_one_is_one_message(folder: Path) -> None:
    paths = prepared(folder.parent)
    with pytest.raises(UserError):
        validate.run(limits(min_images_per_class=50), paths)
    assert not paths.baseline.exists()
    for content in ("{half", "[]", '{"image_folder": {"accepted": 1}}'):
        paths.baseline.write_text(content)
        with pytest.raises(UserError, match=r"baseline\.json: .* Restore it from git, or remove it"):
            validate.run(limits(), paths)


def test_each_source_has_its_own_baseline(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    one, two, three = ({"hash": name, "splits": {"train": name}} for name in ("1", "2", "3"))
    drift.accept(path, "digits", one)
    drift.accept(path, "cifar10", two)
    assert drift.predecessor(path, "digits", "1") is None
    drift.accept(path, "digits", three)
    assert drift.predecessor(path, "digits", "3") == one
    assert drift.predecessor(path, "digits", "4") == three
    assert drift.predecessor(path, "cifar10", "4") == two


def test_the_quarantine_is_a_warning_with_its_reasons(folder: Path) -> None:
    paths = prepared(folder.parent)
    entry = {"name": "photos/train/cat/<b>.png", "split": "train", "class": "cat", "reason": "cannot identify it"}
    paths.quarantine.write_text(json.dumps([entry]))
    found = finding(validate.run(limits(), paths), "no image set aside")
    assert (found.ok, found.severity, found.observed) == (False, "warning", "1 of 19 fail")
    assert str(found.offenders[0]) == "photos/train/cat/<b>.png (train, cat) (set_aside cannot identify it)"
    page = paths.data_page.read_text(encoding="utf-8")
    assert "photos/train/cat/&lt;b&gt;.png" in page
    assert "<b>.png" not in page


def test_names_of_another_preparation_are_refused(folder: Path) -> None:
    paths = prepared(folder.parent)
    paths.names.write_text('{"train": []}')
    with pytest.raises(UserError, match=r"names\.json: does not name the images"):
        validate.run(limits(), paths)


def test_every_expectation_is_documented() -> None:
    text = (PROJECT / "docs/data.md").read_text(encoding="utf-8")
    source = (PROJECT / "tasks/validation/suite.py").read_text(encoding="utf-8")
    named = re.findall(r'Check\(\s*(?:#.*\s*)?f?"([^"]+)"', source)
    assert len(named) >= 15
    assert [what for what in named if f"| {what.replace('{column}', 'height, width, channels')} |" not in text] == []


def page_of(splits: dict[str, Split], classes: list[str], **changes: Any) -> str:
    names = {name: [f"{name}[{index}]" for index in range(len(split))] for name, split in splits.items()}
    counts = {
        name: {"images": len(split), "per_class": split.labels.bincount(minlength=len(classes)).tolist()}
        for name, split in splits.items()
    }
    manifest = {"source": "x", "path": "y", "classes": classes, "image_size": 64, "hash": "0" * 64, "splits": counts}
    images = tables.images(splits, classes, names)
    arguments: dict[str, Any] = {"findings": [], "drift": None, "quarantine": [], "stops": False} | changes
    return data_report.render(splits, images, manifest, **arguments)


def random_splits(classes: int, per_class: int, side: int) -> dict[str, Split]:
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for name, count in (("train", per_class), ("validation", 1), ("test", 2)):
        pixels = torch.randint(0, 256, (classes * count, 3, side, side), generator=generator, dtype=torch.uint8)
        splits[name] = Split(pixels, torch.arange(classes).repeat(count))
    return splits


def test_the_page_stays_small_and_stands_alone_with_many_classes() -> None:
    classes = [f"<class> & {number}" for number in range(200)]
    offenders = [Offender(f"train[{i}]", {"shared_with": "test[0]"}) for i in range(10)]
    found = [Finding("a < b", "10 of 9 fail", "none & nothing", False, "error", "why", offenders, 99_990)]
    page = page_of(random_splits(200, 8, 64), classes, findings=found, stops=True)
    assert len(page) < 6e6, "even noise, which does not compress"
    assert "99,990 more" in page
    assert "a &lt; b" in page
    assert "<class>" not in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', page)) <= {"data:"} | set(
        re.findall(r'href="(#[^"]{0,4})', page)
    )
    assert page.count('class="mean"') == 200


def test_a_page_of_empty_splits_can_be_made() -> None:
    empty = {
        name: Split(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
        for name in ("train", "test")
    }
    assert "0 images" in page_of(empty, ["cat", "dog"], stops=True)


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


@pytest.mark.parametrize(("width", "colours"), [(390, "dark"), (1200, "light")])
def test_the_page_opens_in_a_browser(folder: Path, browser: Any, width: int, colours: str) -> None:
    shutil.copy(folder / "train/cat/00.png", folder / "test/dog" / ("a_name_without_any_space" * 6 + ".png"))
    paths = prepared(folder.parent)
    with pytest.raises(UserError, match="one label for the same pixels"):
        validate.run(limits(), paths)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("requestfailed", lambda request: troubles.append(request.url[:80]))
    page.goto(paths.data_page.as_uri())
    assert page.locator("#validation table").is_visible()
    images = page.locator("img").evaluate_all("images => images.map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) > 15
    assert all(complete and natural == 32 and shown > 40 for complete, natural, shown in images)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert troubles == []
    page.close()


@pytest.mark.skipif(not SHARED.is_dir(), reason="real CIFAR-10 images are not here (../shared/data)")
def test_real_cifar10_has_look_alikes_across_its_splits() -> None:
    """Known ones: C. H. Barz and J. Denzler, Do We Train on Test Data?, 2020, count 3 % of the test images."""
    from zipfile import ZipFile

    def birds(archive: str, prefix: str) -> torch.Tensor:
        with ZipFile(SHARED / archive) as packed:
            names = sorted(name for name in packed.namelist() if name.startswith(f"{prefix}/automobile/"))
            return torch.stack([tensor(Image.open(io.BytesIO(packed.read(name))).convert("RGB")) for name in names])

    train, test = birds("cifar10-train-0.zip", "train"), birds("cifar10-test.zip", "test")
    found = near_duplicates.near([train, test])[len(train) :]
    assert 10 < (found >= 0).sum() < 60
