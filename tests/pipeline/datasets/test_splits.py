"""The draw of a val split: stable, of groups, and of sensible size where there are few to draw from."""

from __future__ import annotations

import pytest

from pipeline.config import FolderConfig
from pipeline.datasets.splits import draw_val, first_repeated
from pipeline.errors import UserError


def draw(names: list[str], fraction: float = 0.2, group: str | None = None, seed: int = 0) -> set[str]:
    return draw_val(names, FolderConfig(val_fraction=fraction, group=group), seed, "data.folder")


@pytest.mark.parametrize("seed", range(30))
def test_draw__of_a_few_neither_none_nor_most(seed: int) -> None:
    assert len(draw(["a", "b"], seed=seed)) == 1
    assert 1 <= len(draw(list("abcd"), 0.3, seed=seed)) <= 2
    assert 1 <= len(draw(list("abcdefghij"), seed=seed)) <= 3
    assert 1 <= len(draw(list("abcd"), 0.9, seed=seed)) <= 3


def test_draw__new_names_move_no_others() -> None:
    names = [f"f{number}" for number in range(1000)]
    before, after = draw(names), draw([*names, *(f"g{number}" for number in range(500))])
    assert 160 < len(before) < 240
    assert before == {name for name in after if name.startswith("f")}


def test_draw__groups_stay_together() -> None:
    names = [f"clip{clip}_frame{frame}" for clip in range(20) for frame in range(5)]
    drawn = draw(names, group="^(clip[0-9]+)_")
    clips = {name.partition("_")[0] for name in drawn}
    assert len(drawn) == 5 * len(clips)
    assert 1 <= len(clips) <= 6
    with pytest.raises(UserError, match=r"data\.folder\.group .* finds nothing in 'other'"):
        draw([*names, "other"], group="^(clip[0-9]+)_")
    with pytest.raises(UserError, match="has one group to draw from, 'clip0'; add others"):
        draw(names[:5], group="^(clip[0-9]+)_")


def test_first_repeated__of_a_million_names() -> None:
    names = [str(number) for number in range(1_000_000)]
    assert first_repeated(names) is None
    assert first_repeated([*names, "999999"]) == "999999"
