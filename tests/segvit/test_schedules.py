from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from segvit.schedules import SCHEDULES, build_schedule


def test_poly__published_schedule() -> None:
    factor = build_schedule("poly", steps=1000, warmup_steps=100)
    assert factor(0) == pytest.approx(1e-6)
    assert factor(50) == pytest.approx(0.95 * (0.5 + 0.5e-6))
    assert factor(100) == pytest.approx(0.9)
    assert factor(500) == pytest.approx(0.5)
    assert factor(1000) == factor(2000) == 0.0


def test_poly__power_and_no_warmup() -> None:
    factor = build_schedule("poly", 10, power=2.0)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.25, 0.0])


def test_cosine__half_a_wave_to_its_final_share() -> None:
    factor = build_schedule("cosine", 12, warmup_steps=3, final=0.1)
    assert [factor(step) for step in (4, 6, 12, 99)] == pytest.approx([0.1 + 0.9 * 0.75, 0.55, 0.1, 0.1])
    assert factor(0) == pytest.approx(1e-6)


def test_constant__only_warms_up() -> None:
    factor = build_schedule("constant", 10, warmup_steps=4)
    assert [factor(step) for step in (2, 4, 10)] == pytest.approx([0.5, 1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "unknown schedule 'cosin'; choose from cosine, poly, constant"),
        ("poly", {"warmup_steps": 20}, "warmup_steps 20 must be between 0 and steps 10"),
        ("poly", {"powr": 2.0}, "unknown option powr of schedule poly; choose from power"),
        ("constant", {"power": 2.0}, "unknown option power of schedule constant; it has none"),
        ("poly", {"power": -1.0}, "schedule poly takes no {'power': -1.0}: "),
        ("poly", {"power": "high"}, "schedule poly takes no {'power': 'high'}: "),
        ("cosine", {"final": -0.5}, "gives factors .* they must be numbers >= 0"),
    ],
)
def test_build_schedule__what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(name, 10, **options)


def test_schedule__of_ones_own() -> None:
    SCHEDULES.register("halves", lambda done, at=0.5: 1.0 if done < at else 0.5)
    factor = build_schedule("halves", 10, at=0.2)
    assert [factor(step) for step in (1, 2, 10)] == [1.0, 0.5, 0.5]


def test_schedules__load_no_torch() -> None:
    code = "import sys, segvit.schedules as s; s.build_schedule('poly', 3); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
