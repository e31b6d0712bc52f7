from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import DigitsConfig
from pipeline.config.file import load_config, parse_config
from pipeline.errors import UserError

CONFIGS = Path(__file__).parents[3] / "flows" / "configs"


def tree(**sections: Any) -> dict[str, Any]:
    whole: dict[str, Any] = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    for name, values in sections.items():
        whole[name] = {**whole.get(name, {}), **values}
    return whole


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_load_config__every_shipped_file_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGVIT_DATA", "/data")
    config = load_config(CONFIGS / name)
    assert set(config.variants) == {"full", "shrunk"}
    assert config.data.root in (None, "/data/camvid")


def test_parse_config__lists_all_problems_with_place_value_and_remedy() -> None:
    with pytest.raises(UserError) as caught:
        parse_config(tree(tune={"variant": ["a"]}, train={"stepz": 3, "batch_size": 0}), source="x.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "x.yaml: 3 problem(s)"
    assert any(line.startswith("  tune.variant: ['a']: ") for line in lines)
    assert "  train.stepz: unknown key; remove it or correct its spelling" in lines
    assert any(line.startswith("  train.batch_size: 0: ") and "greater than 0" in line for line in lines)


def test_parse_config__every_worker_has_a_sample() -> None:
    assert parse_config(tree(runtime={"num_workers": 3})).runtime.max_workers == 3
    elastic = parse_config(tree(runtime={"num_workers": [2, 5]})).runtime
    assert (elastic.num_workers, elastic.max_workers) == ((2, 5), 5)
    with pytest.raises(UserError, match=r"batch_size 16 / .* 4 = 4 leaves some of runtime.num_workers 5 without"):
        parse_config(tree(runtime={"num_workers": [2, 5]}, train={"batch_size": 16, "accumulation_steps": 4}))
    with pytest.raises(UserError, match=r"num_workers \[5, 2\] is \[least, most\]; swap them"):
        parse_config(tree(runtime={"num_workers": [5, 2]}))


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        ({"crop": [64, 64]}, "crop and stride have no meaning in mode whole"),
        ({"mode": "slide", "crop": [64, 64], "stride": [65, 64]}, r"stride \(65, 64\) exceeds crop \(64, 64\)"),
        ({"scales": []}, "evaluate.inference.scales"),
        ({"scales": [1.0, -1.0]}, "evaluate.inference.scales.1: -1.0"),
    ],
)
def test_parse_config__inference_that_leaves_pixels_out(inference: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree(evaluate={"inference": inference}))


def test_parse_config__stream_and_repeat_settings_are_bounded() -> None:
    whole = tree()
    whole["train"] |= {"stream_buffer": 0, "repeat_factor_threshold": 1.5}
    with pytest.raises(UserError) as caught:
        parse_config(whole)
    assert "train.stream_buffer: 0: " in str(caught.value)
    assert "train.repeat_factor_threshold: 1.5: " in str(caught.value)


def test_load_config__overrides_nested_values_as_yaml(tmp_path: Path) -> None:
    config = load_config(
        CONFIGS / "quickstart.yaml", ["train.steps=77", "train.learning_rate=3e-5", "model.image_size=[56, 70]"]
    )
    assert (config.train.steps, config.train.learning_rate) == (77, 3e-5)
    assert config.model.fields["image_size"] == [56, 70]
    with pytest.raises(UserError, match=r"--set 'train\.steps' is not of the form a\.b=c"):
        load_config(CONFIGS / "quickstart.yaml", ["train.steps"])
    with pytest.raises(UserError, match="'name' is a value, not a section"):
        load_config(CONFIGS / "quickstart.yaml", ["name.x=1"])


def test_load_config__unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGVIT_DATA", raising=False)
    with pytest.raises(UserError, match="SEGVIT_DATA"):
        load_config(CONFIGS / "camvid_cpu.yaml")


def test_load_config__missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="holds list, not a mapping"):
        load_config(tmp_path / "list.yaml")


def test_digits_config__digit_must_fit_the_scene() -> None:
    with pytest.raises(ValueError, match="at most image_size 112"):
        DigitsConfig(digit_size=(44, 130))
