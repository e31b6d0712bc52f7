"""docs/extending.md, done: four files outside the package, trained with from YAML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXPERIMENT: dict[str, Any] = {
    "name": "extended",
    "recipe": "twice",
    "data": {"dataset": "digits", "samples_per_shard": 6, "digits": {"num_train": 6, "num_val": 3, "image_size": 96}},
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {"depth": 2, "embed_dim": 48, "num_heads": 3},
        "weights": "random",
        "image_size": [48, 64],
        "decoder_layers": 1,
        "structure": "pooled",
        "pooling": 2,
    },
    "variants": {"full": {}},
    "loss": {"tversky": 2.0},
    "train": {
        "optimizer": "radam",
        "schedule": {"name": "staircase", "every": 2},
        "steps": 4,
        "batch_size": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-4,
        "validate_every_steps": 2,
        "checkpoint_every_steps": 2,
    },
    "tune": {"num_trials": 1, "steps": 1, "report_every_steps": 1, "max_val_samples": 1},
    "evaluate": {"num_examples": 1, "latency_repeats": 1},
    "runtime": {"log_every_steps": 1, "trials_at_once": 1},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the documented package would leave on the path."""
    folder = tmp_path_factory.mktemp("package")
    text = (ROOT / "docs" / "extending.md").read_text()
    names = re.findall(r"^## .*: `(\w+\.py)`$", text, flags=re.M)
    sources = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert len(names) == len(sources) == 5
    for name, source in zip(names, sources, strict=True):
        (folder / name).write_text(source)
    [groups] = re.findall(r"^```toml\n(.*?)^```$", text, flags=re.M | re.S)
    groups = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", groups).replace('"', "")
    information = folder / "extending-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: extending\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(groups)
    return folder


def segvit(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(package)])
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=package,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_four_files_outside__train_from_yaml(package: Path) -> None:
    config = package / "extended.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    refused = segvit(package, "plan", str(config), "--set", "model.pooling=0", "--set", "train.schedule.evry=2")
    assert refused.returncode == 1
    assert "pooling must be >= 1, got 0" in refused.stderr
    assert "unknown option evry of schedule staircase; choose from every" in refused.stderr

    done = segvit(package, "run", str(config), "--workspace", "ws", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["records"]["pick"]["variant"] == "full"
    assert facts["records"]["pick"]["miou"] == facts["evaluations"]["full"]["miou"]
    # The search space holds the term, and the log and the report name it.
    assert set(facts["records"]["tune"]["values"]) == {"loss.class", "loss.focal", "loss.dice", "loss.tversky"}
    assert re.search(r"full  step 1/4 .* tversky \d", done.stderr)
    history = Path(facts["records"]["train/full"]["history_uri"]).read_text().splitlines()
    rows = [row for row in map(json.loads, history) if "tversky" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    page = Path(facts["report"]).read_text()
    assert "tversky" in page
    stored = json.loads((Path(facts["records"]["train/full"]["uri"]) / "config.json").read_text())
    assert (stored["model"]["structure"], stored["model"]["pooling"]) == ("pooled", 2)
