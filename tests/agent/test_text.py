"""Hostile text is shown, never obeyed."""

from __future__ import annotations

import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.text import bounded, fenced, for_markdown, for_terminal, one_line, visible
from tests.support.histories import HOSTILE_TEXTS

STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
ANY_TEXT = st.text(alphabet=st.characters(), max_size=200) | st.sampled_from(HOSTILE_TEXTS)


def hidden_in(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in STEERING} - {"\n", "\t"}


def test_every_invisible_or_steering_character_of_unicode_becomes_a_sign() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert hidden_in(visible(everything)) == set()
    visible(everything).encode()


def test_ordinary_text_of_any_script_stays_as_it_is() -> None:
    text = "Loss ↓ 5 %, ReLU² → SwiGLU\n\t你好, مرحبا, café ✅"
    assert text == visible(text)


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "⟨U+001B⟩[31mred"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("99%\r100%\r\nnext", "99%\n100%\nnext"),
        ("\ud800", "⟨U+D800⟩"),
        ("tag\U000e0041", "tag⟨U+E0041⟩"),
    ],
)
def test_signs_say_what_was_there(hostile: str, shown: str) -> None:
    assert shown == visible(hostile)


@given(ANY_TEXT, st.integers(1, 120))
def test_one_line_is_one_line_within_its_limit(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert len(line) <= limit
    assert not hidden_in(line)
    assert not re.search(r"[\n\t]", line)


@given(ANY_TEXT, st.integers(0, 120))
def test_bounded_text_keeps_its_limit(text: str, limit: int) -> None:
    assert len(bounded(text, limit)) <= limit
    assert len(for_terminal(text, limit)) <= limit


def test_bounded_text_keeps_head_and_tail_and_names_the_cut() -> None:
    cut = bounded("a" * 500 + "b" * 500, 200)
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")
    assert "800 characters left out" in cut


@given(st.text(alphabet="`~x\n \r", max_size=80))
def test_no_text_closes_its_fence(text: str) -> None:
    first, *body, last = fenced(text, 200).split("\n")
    fence = first.removesuffix("text")
    assert last == fence
    assert set(fence) == {"`"}
    assert all(fence not in line for line in body)


@given(ANY_TEXT)
def test_markdown_leaves_no_mark_unescaped(text: str) -> None:
    unescaped = re.sub(r"\\[^a-zA-Z0-9\s]", "", for_markdown(text, 300))
    assert not re.search(r"[\\`*_\[\]()#<>|&~!{}$]", unescaped)
    assert "\n" not in unescaped
