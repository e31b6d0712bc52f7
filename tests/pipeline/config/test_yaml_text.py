"""YAML that is hostile: bombs of aliases, depth, numbers and types end in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.file import load_config
from pipeline.config.yaml_text import MAX_CHARACTERS, parse_yaml, read_yaml
from pipeline.errors import UserError
from pipeline.registry.policy_file import load_policy

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
HOSTILE = {
    "aliases": (LAUGHS, "more than the 131072 values allowed, its aliases written out"),
    "itself": ("a: &a [*a]", "nested deeper than the 50 levels"),
    "depth": ("[" * 100_000, "nested deeper than the 50 levels|expected"),
    "levels": ("a: " + "[" * 60 + "]" * 60, "nested deeper than the 50 levels"),
    "digits": ("a: " + "9" * 5000, "a value cannot be read"),
    "bits": ("a: 0x" + "f" * 5000, "a whole number of 20000 bits, more than the 64 allowed"),
    "date": ("a: 2024-13-45", "a value cannot be read"),
    "python": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "key": ("{[a]: b}", "found unhashable key"),
    "NUL": ("a: \0", "special characters are not allowed"),
    "length": ("a" * (MAX_CHARACTERS + 1), "more than the 1048576 characters allowed"),
    "merge": ("a: {<<: 3}", "expected a mapping"),
    "alias": ("a: *b", "found undefined alias"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_parse_yaml__hostile_text_is_one_error(case: str, tmp_path: Path) -> None:
    text, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"x.yaml is not valid YAML: "):
        load_config(file)
    with pytest.raises(UserError, match=r"x.yaml is neither YAML nor JSON: "):
        load_policy(file)


def test_read_yaml__anchors_within_the_bounds_and_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": 1}, "c": {"b": 1}}
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="is not valid YAML: 'utf-8' codec can't decode"):
        load_config(tmp_path / "x.yaml")


def test_load_config__says_the_beginning_of_a_long_value_and_of_many_problems(tmp_path: Path) -> None:
    keys = "".join(f"key{number}: 1\n" for number in range(1000))
    (tmp_path / "x.yaml").write_text(f"name: {'n' * 100_000}\n{keys}")
    with pytest.raises(UserError, match=r"x.yaml: 100\d problem\(s\)") as caught:
        load_config(tmp_path / "x.yaml")
    assert len(str(caught.value).splitlines()) == 51
    assert len(str(caught.value)) < 10_000
