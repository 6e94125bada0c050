"""Stage `prepare` as a process: interruptions leave the previous files, memory is bounded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from photos import make_folder, settings, snapshot
from PIL import Image
from project import ROOT

from tasks import prepare
from tasks.config.paths import Paths


@pytest.mark.parametrize("place", ["image_decoding.decode", "split_writer.write", "split_writer.content_hash"])
def test_an_interrupt_leaves_the_previous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    before = snapshot(tmp_path)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tasks.data.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(settings(seed=1), Paths(tmp_path))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_the_stage_and_leaves_the_previous_files(tmp_path: Path, number: signal.Signals) -> None:
    folder = make_folder(tmp_path)
    prepare.run(settings(), Paths(tmp_path))
    before = snapshot(tmp_path / "data")
    Image.new("RGB", (6000, 6000)).save(folder / "train/cat/large.png")  # slow enough to be interrupted
    for i in range(30):
        (folder / f"train/cat/large_{i}.png").hardlink_to(folder / "train/cat/large.png")
    params = json.dumps(settings(seed=1).model_dump(mode="json", by_alias=True))  # JSON is YAML
    (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
    stage = subprocess.Popen(
        [sys.executable, "-m", "tasks.prepare"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    unfinished = tmp_path / "data/prepared/.unfinished"
    try:
        while not unfinished.exists() and stage.poll() is None:
            time.sleep(0.01)
        stage.send_signal(number)
        output, errors = stage.communicate(timeout=60)
    finally:
        stage.kill()
        stage.wait()
    assert stage.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in output + errors
    after = snapshot(tmp_path / "data")
    if number == signal.SIGKILL:  # leaves its scratch folder, which the next run deletes
        assert unfinished.exists()
        after = {name: content for name, content in after.items() if ".unfinished" not in name}
    assert after == before
    for large in folder.rglob("large*.png"):
        large.unlink()
    prepare.run(settings(), Paths(tmp_path))
    assert snapshot(tmp_path / "data") == before


def test_memory_is_bounded_and_the_stage_needs_no_torch(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=100)
    for i in range(100):
        (folder / f"train/cat/more_{i}.png").hardlink_to(folder / "train/cat/00.png")
    values = settings(image_size=512).model_dump(mode="json", by_alias=True)
    script = f"""
import resource, sys
from pathlib import Path
from tasks import prepare
from tasks.config import settings
from tasks.config.paths import Paths

parsed = settings.parse({values!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare.run(parsed, Paths(Path(sys.argv[1])), threads=1)
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    written = sum(file.stat().st_size for file in Paths(tmp_path).prepared.iterdir())
    assert written > 200 * 2**20
    assert int(output.split()[-1]) * 1024 < 120 * 2**20
