from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddlm.sampling.template import escape, from_tokens, parse, split
from ddlm.sampling.windows import windows
from ddlm.types import ConfigError


class Letters:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_the_three_kinds_of_template() -> None:
    assert split("{64}") == [64]
    assert split("The river {32}") == ["The river", 32]
    assert split("The river {32} sea.") == ["The river", 32, " sea."]
    assert split("a{1}b{2}{3}") == ["a", 1, "b", 2, 3]
    template = parse("ab {2}c", Letters())
    assert template.tokens.tolist() == [97, 98, 0, 0, 99]
    assert template.is_noised.tolist() == [False, False, True, True, False]
    assert len(template) == 5


@pytest.mark.parametrize("zeros", [1, 8, 5000])
def test_zeros_before_a_number_count_for_nothing(zeros: int) -> None:
    assert split("a {" + "0" * zeros + "32}") == ["a", 32]
    assert split("{ 032 }") == [32]
    for text in ("{" + "0" * zeros + "}", "{" + "0" * zeros + "1000001}"):
        with pytest.raises(ConfigError, match="between 1 and 1000000 tokens"):
            split(text)


def test_doubled_braces_are_literal() -> None:
    assert split("{{x}} {2} }}{{{{") == ["{x}", 2, " }{{"]
    assert split("{{{3}}}") == ["{", 3, "}"]


@given(st.text())
def test_an_escaped_text_is_kept_whole(text: str) -> None:
    parts = split(escape(text) + "{4}")
    kept = text.removesuffix(" ") if text.endswith(" ") else text
    assert parts == ([kept, 4] if kept else [4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{0}", "between 1 and"),
        ("{-3}", "positive whole number"),
        ("{x}", "positive whole number"),
        ("{}", "positive whole number"),
        ("{1.5}", "positive whole number"),
        ("a {3", "unbalanced '{'"),
        ("a 3}", "unbalanced '}'"),
        ("{{3}", "unbalanced '}'"),
        ("plain", "nothing to generate"),
        ("", "nothing to generate"),
        ("{{8}}", "nothing to generate"),
        ("{99999999}", "between 1 and"),
        ("{٣}", "positive whole number"),
        ("caf\udce9 {3}", r"'\\udce9' at character 4, .* UTF-8"),
    ],
)
def test_malformed_templates_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        split(text)
    assert "\n" not in str(error.value)


def test_a_prompt_of_tokens() -> None:
    template = from_tokens([5, 6], 3)
    assert template.tokens[:2].tolist() == [5, 6]
    assert template.is_noised.tolist() == [False, False, True, True, True]
    with pytest.raises(ConfigError):
        from_tokens([5], 0)


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_windows_cover_everything_with_overlap(
    length: int, window: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    found = list(windows(length, window, overlap))
    assert found[0][0] == 0
    assert found[-1][1] == length
    for (start, end), (after, later) in pairwise(found):
        assert end - start == later - after == window
        assert start < after <= end - overlap
    if length <= window:
        assert found == [(0, length)]


def test_an_impossible_overlap_is_refused() -> None:
    for overlap in (-1, 8):
        with pytest.raises(ConfigError, match="overlap"):
            list(windows(20, 8, overlap))
