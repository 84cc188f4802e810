"""program.md says what is wrong with it, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.program import Program, load_program, parse_program, section_type
from agent.settings import ProgramError, Settings, parse_size

SHIPPED = Path(__file__).parents[2] / "program.md"
TEXT = SHIPPED.read_text(encoding="utf-8")


def changed(old: str, new: str) -> Program:
    assert old in TEXT
    return parse_program(TEXT.replace(old, new, 1).encode(), "program.md")


def line_of(text: str, source: str = TEXT) -> int:
    return next(n for n, line in enumerate(source.splitlines(), 1) if line.startswith(text))


def refusal(old: str, new: str) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        changed(old, new)
    return caught.value


def test_the_shipped_file_is_a_valid_program() -> None:
    program = load_program(SHIPPED)

    assert TEXT.encode() == program.source
    assert program.settings.budget.seconds == 300
    assert program.settings.session.usd == 20


def test_the_prose_is_the_file_without_its_settings() -> None:
    program = load_program(SHIPPED)

    assert program.prose.startswith("# Tonight's program")
    assert "[limits]" not in program.prose
    assert "```" not in program.prose


def test_the_shipped_file_states_every_setting_in_its_section() -> None:
    stated, section = set(), ""
    for line in TEXT.split("```toml")[1].split("```")[0].splitlines():
        section = line[1 : line.index("]")] if line.startswith("[") else section
        if " = " in line:
            stated.add((section, line.removeprefix("# ").split("=")[0].strip()))
    known = {
        (section, field.alias or name)
        for section in Settings.model_fields
        for name, field in section_type(section).model_fields.items()
    }

    assert known == stated


def test_every_setting_of_the_shipped_file_carries_a_comment() -> None:
    block = TEXT.split("```toml")[1].split("```")[0]
    bare = [
        line for line in block.splitlines() if "=" in line and "#" not in line.removeprefix("# ")
    ]

    assert [] == bare


@pytest.mark.parametrize(
    "line",
    [
        line
        for table in ("limits", "scoring", "budget", "session")
        for line in TEXT.split(f"\n[{table}]")[1].split("\n[")[0].splitlines()
        if "=" in line and not line.startswith(("#", "usd", "model_boxes"))
    ],
)
def test_a_bound_that_is_missing_is_an_error_not_infinity(line: str) -> None:
    error = refusal(line + "\n", "")

    name = line.split("=")[0].strip()
    assert f"{name} is missing" in error.message
    assert f"{name} =" in error.hint


def test_without_usd_there_is_no_money_limit() -> None:
    usd_line = TEXT.splitlines()[line_of("usd") - 1]

    assert changed(usd_line + "\n", "").settings.session.usd is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"4g"', '"4 gigs"', "not a size"),
        ("hours = 10.0", "hours = nan", "finite"),
        ("hours = 10.0", "hours = -1", "greater than 0"),
        ("seconds = 300 ", 'seconds = "300" ', "valid number"),
        ("attempts = 100 ", "attempts = 1.5 ", "valid integer"),
        ('editable = ["train.py"]', 'editable = ["../x.py"]', "plain and relative"),
        ('editable = ["train.py"]', 'editable = ["/etc/x"]', "plain and relative"),
        ('editable = ["train.py"]', 'editable = ["evaluate.py"]', "stays fixed"),
        ('editable = ["train.py"]', "editable = []", "at least 1"),
        ('name = "auto"', 'name = "gpt"', "'auto', 'claude', 'tpe' or 'random'"),
        ("false_keep_rate_per_night = 0.05", "false_keep_rate_per_night = 0.5", "less than 0.5"),
        ("vocab_size = 1024", "vocab_size = 100000", "65536"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(old: str, new: str, said: str) -> None:
    error = refusal(old, new)

    line = next(
        n for n, text in enumerate(TEXT.splitlines(), 1) if text.startswith(old[:8]) or old in text
    )
    assert error.message.startswith(f"program.md:{line}: [")
    assert said in error.message
    assert error.hint.startswith("write for example")


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    error = refusal("hours = 10.0", "hour = 10.0")

    assert f"program.md:{line_of('hours')}: [session] hour is not a setting" in error.message
    assert "did you mean hours?" in error.hint


def test_an_unknown_section_is_refused_with_the_nearest_known_one() -> None:
    error = refusal("[noise]", "[nose]")

    assert error.message == f"program.md:{line_of('[noise]')}: [nose] is not a setting"
    assert error.hint == "did you mean noise?"


def test_a_missing_section_is_named() -> None:
    error = refusal("[scoring] ", "[hardware2] ")

    assert "[scoring] is missing" in error.message
    assert "[scoring] needs wall_seconds, memory" in error.hint


def test_broken_toml_is_named_with_its_line() -> None:
    error = refusal("pids = 256", "pids = ")

    assert error.message.startswith(f"program.md:{line_of('pids')}: not toml")


def test_a_tokens_budget_needs_tokens() -> None:
    assert "add a line like tokens" in refusal('kind = "wall"', 'kind = "tokens"').message
    assert "remove tokens" in refusal("# tokens", "tokens").message


def test_a_tokens_budget_with_tokens_is_accepted() -> None:
    text = TEXT.replace('kind = "wall"', 'kind = "tokens"').replace("# tokens =", "tokens =")

    assert parse_program(text.encode(), "p.md").settings.budget.tokens == 2_000_000


def test_the_toml_block_must_be_exactly_one() -> None:
    with pytest.raises(ProgramError, match="no toml block"):
        parse_program(b"# Only words\n", "program.md")
    with pytest.raises(ProgramError, match="second toml block"):
        parse_program((TEXT + "\n```toml\na = 1\n```\n").encode(), "program.md")
    with pytest.raises(ProgramError, match="no end"):
        parse_program(TEXT.rstrip().removesuffix("```").encode(), "program.md")


def test_other_fenced_blocks_belong_to_the_prose() -> None:
    example = "```python\nx = 1\n```\n\n````\n```toml\nnot = settings\n```\n````\n"
    program = parse_program((example + TEXT).encode(), "program.md")

    assert "x = 1" in program.prose
    assert "not = settings" in program.prose


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"none\.md: No such file"):
        load_program(tmp_path / "none.md")


def test_a_file_that_is_not_utf8_is_named_with_its_line() -> None:
    with pytest.raises(ProgramError, match=r"program\.md:2: not UTF-8"):
        parse_program(b"# fine\n\xff\xfe\n", "program.md")


@given(number=st.integers(0, 10**9), unit=st.sampled_from(["", "k", "m", "g", "K", "M", "G"]))
def test_sizes_are_powers_of_1024(number: int, unit: str) -> None:
    factor = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}[unit.lower()]

    assert number * factor == parse_size(f"{number}{unit}")


@given(text=st.text())
def test_no_text_gets_past_with_another_error(text: str) -> None:
    source = ("```toml\n" + text + "\n```\n").encode("utf-8", "replace")

    with pytest.raises(ProgramError, match=r"^program\.md"):
        parse_program(source, "program.md")


def test_train_limits_add_the_grace_to_the_budget() -> None:
    limits = load_program(SHIPPED).settings.train_limits()

    assert limits.wall_seconds == 360
    assert limits.memory_bytes == 4 * 2**30
    assert limits.log_bytes == 256 * 2**10


def test_scoring_limits_take_what_they_do_not_state_from_the_train_box() -> None:
    limits = load_program(SHIPPED).settings.scoring_limits()

    assert limits.wall_seconds == 300
    assert limits.memory_bytes == 2 * 2**30
    assert limits.pids == 256


def test_flags_override_settings_and_leave_the_others() -> None:
    settings = load_program(SHIPPED).settings
    demo = settings.with_overrides(attempts=6, budget_seconds=15, researcher="tpe")

    assert (demo.session.attempts, demo.budget.seconds, demo.researcher.name) == (6, 15, "tpe")
    assert demo.session.hours == settings.session.hours
    assert settings == settings.with_overrides()


def test_a_flag_out_of_range_is_named() -> None:
    with pytest.raises(ProgramError, match=r"--hours -1: input should be greater than 0"):
        load_program(SHIPPED).settings.with_overrides(hours=-1)


def test_settings_survive_the_ledger() -> None:
    settings = load_program(SHIPPED).settings

    assert settings == Settings.model_validate(settings.model_dump(mode="json"))
