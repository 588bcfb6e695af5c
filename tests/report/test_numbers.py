"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from curvscope.report.headings import setting_title, setting_word
from curvscope.report.numbers import percent, powers, seconds, shown, with_error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4217, "0.422"),
        (0.99961, "1.00"),
        (1.0, "1.00"),
        (12345.6, "12,300"),
        (123456.0, "123,000"),
        (1.2e7, "1.2·10⁷"),
        (0.00123, "0.00123"),
        (9.96e-4, "9.96·10⁻⁴"),
        (1.2e-7, "1.2·10⁻⁷"),
        (-0.25, "−0.250"),
        (-3e-9, "−3·10⁻⁹"),
        (0.0, "0"),
        (math.nan, "–"),
        (None, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (1234, "1,234"),
        (True, "yes"),
        ("word", "word"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.4237, 0.0121, "0.424 ± 0.012"),
        (0.42, 0.0996, "0.42 ± 0.10"),
        (12.766, 0.05, "12.766 ± 0.050"),
        (3.0, 1.5, "3.0 ± 1.5"),
        (250.0, 40.0, "250 ± 40"),
        (0.995527, 3.5e-5, "0.9955 ± 3.5·10⁻⁵"),
        (1.0, 1.8e-11, "1.00"),
        (0.5, 0.0, "0.500"),
        (0.5, math.nan, "0.500"),
        (math.nan, 0.1, "–"),
        (2e-7, 3e-8, "2·10⁻⁷ ± 3·10⁻⁸"),
        (-0.25, 0.012, "−0.250 ± 0.012"),
    ],
)
def test_with_error(value: float, stderr: float, text: str) -> None:
    assert with_error(value, stderr) == text


def test_percent_and_seconds() -> None:
    assert [percent(x) for x in (0.0423, 0.00001, 1.0, 0.99999, 0.0, math.nan)] == [
        "4.2 %",
        "< 0.1 %",
        "100 %",
        "100 %",
        "0.0 %",
        "–",
    ]
    assert [seconds(x) for x in (0.0312, 12.3, 200.0, math.nan)] == [
        "0.031 s",
        "12 s",
        "3 min 20 s",
        "–",
    ]


def test_powers_in_sentences() -> None:
    assert powers("up to 9.6e-07 and 1e-15.") == "up to 9.6·10⁻⁷ and 1·10⁻¹⁵."
    assert powers("1.2e+06 rows, layer1e-2 and 0x1e-3") == "1.2·10⁶ rows, layer1e-2 and 0x1e-3"


def test_settings_in_words() -> None:
    assert setting_title("hessian") == "Hessian computed" and setting_title("a_b") == "a b"
    given = [True, None, 200.0, 0.023, "full", [], [1, 2], {"probe": 256, "budget": None}]
    words = ["yes", "not set", "200", "0.023", "full", "none", "1, 2", "probe 256, budget not set"]
    assert [setting_word(value) for value in given] == words
