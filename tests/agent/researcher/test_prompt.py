"""What nightlab says to a language model."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from agent.program import parse_program
from agent.record.history import History
from agent.researcher.prompt import (
    CUT_REPLY,
    FILES_CHARACTERS,
    GUIDANCE_CHARACTERS,
    NUDGE,
    SHOWN_ATTEMPTS,
    brief,
    guidance,
    system_prompt,
)
from agent.settings import Settings
from tests.support.histories import HOSTILE_TEXTS, night

PROGRAM = parse_program(
    b"""\
# Tonight

Lower val_bpb of the small GPT. Prefer simple code.

```toml
[budget]
kind = "wall"
seconds = 300
grace_seconds = 60

[limits]
memory = "8g"
cpus = 2
pids = 256
tmp = "1g"
shm = "1g"
output = "2g"
output_files = 64
open_files = 1024
log = "256k"

[scoring]
wall_seconds = 300
memory = "2g"

[session]
attempts = 100
hours = 10.0
usd = 20.0
max_failures_in_a_row = 10
```
""",
    "program.md",
)
SETTINGS: Settings = PROGRAM.settings


def brief_after(attempts: int, *, hostile: bool = False, words: str = "") -> str:
    made = night(attempts, hostile=hostile)
    hours_left = SETTINGS.session.hours - made.history.time.active_seconds / 3600
    return brief(SETTINGS, made.history, made.get_blob, guidance=words, hours_left=hours_left)


def test_the_system_prompt_is_the_reviewed_one(golden: Callable[[str, str], None]) -> None:
    golden("system_prompt.txt", system_prompt(PROGRAM.prose, SETTINGS))


def test_the_opening_brief_is_the_reviewed_one(golden: Callable[[str, str], None]) -> None:
    golden("brief_opening.txt", brief_after(0))


def test_the_brief_of_a_long_night_is_the_reviewed_one(golden: Callable[[str, str], None]) -> None:
    golden("brief_long_night.txt", brief_after(60, words="No SwiGLU tonight, please."))


def test_the_same_record_gives_the_same_brief() -> None:
    assert brief_after(30) == brief_after(30)


def test_a_brief_does_not_grow_with_the_night() -> None:
    assert len(brief_after(400)) < 1.5 * len(brief_after(60))


def test_a_brief_is_bounded_however_many_files_there_are() -> None:
    made = night(3)
    history = made.history
    best = history.best
    assert best is not None
    sha = next(iter(best.started.files.values()))
    many = {f"part_{number:04d}.py": sha for number in range(3000)}
    best.started = best.started.model_copy(update={"files": best.started.files | many})
    workspace = SETTINGS.workspace.model_copy(update={"editable": ("*.py",)})
    sizes = []
    for ceiling in (16_000, 1_000_000):
        researcher = SETTINGS.researcher.model_copy(update={"max_conversation_tokens": ceiling})
        changed = {"workspace": workspace, "researcher": researcher}
        settings = SETTINGS.model_copy(update=changed)
        told = brief(settings, history, lambda _: b"x = 1\n" * 300, guidance="", hours_left=10.0)
        assert "more files; `read` shows them: part_" in told
        sizes.append(len(told))
    assert sizes[0] < 16_000 + 8_000
    assert sizes[0] < sizes[1] < FILES_CHARACTERS + 8_000


def test_the_first_file_is_shown_even_where_there_is_little_room() -> None:
    made = night(3)
    researcher = SETTINGS.researcher.model_copy(update={"max_conversation_tokens": 16_000})
    settings = SETTINGS.model_copy(update={"researcher": researcher})
    told = brief(
        settings, made.history, lambda _: b"x = 1\n" * 30_000, guidance="", hours_left=10.0
    )
    assert "characters left out" in told
    assert len(told) < 16_000 + 8_000


def test_the_newest_attempts_are_shown_one_by_one() -> None:
    text = brief_after(100)
    shown = [line for line in text.splitlines() if line.split(" | ")[0].isdigit()]
    numbers = [int(line.split(" | ")[0]) for line in shown]
    assert numbers[-SHOWN_ATTEMPTS:] == list(range(61, 101))


def test_a_brief_says_that_nothing_was_measured_yet() -> None:
    def no_blob(sha: str) -> bytes:
        raise AssertionError(sha)

    assert "Nothing was measured yet." in brief(
        SETTINGS, History(), no_blob, guidance="", hours_left=10.0
    )


def test_an_attempt_in_progress_is_not_told_as_tried() -> None:
    made = night(3, ended=False)
    opened = [e for e in made.entries if e.event.type == "attempt_started"][-1]
    cut = made.entries[: opened.seq + 1]
    made.entries[:] = cut
    text = brief(SETTINGS, made.history, made.get_blob, guidance="", hours_left=10.0)
    assert "\n2 | " in text
    assert "\n3 | " not in text


def test_hostile_words_of_a_run_stay_inside_fences() -> None:
    outside = text_outside_fences(brief_after(40, hostile=True))
    for words in ("# heading", "[click]", "</script>", "HYPERLINK", "\x1b", "\u202e"):
        assert words not in outside


@given(st.text(max_size=400))
def test_guidance_cannot_leave_its_fence(words: str) -> None:
    note = guidance("marker " + words)
    assert "marker" not in text_outside_fences(note)
    assert text_outside_fences(note).count("\n") <= 3


def test_guidance_is_bounded() -> None:
    assert len(guidance("x" * 100_000)) < GUIDANCE_CHARACTERS + 500


def test_the_prompts_hold_no_invisible_characters() -> None:
    text = brief_after(40, hostile=True, words="".join(HOSTILE_TEXTS))
    assert not {"\x1b", "\u202e", "\u200b", "\x07", "\ufeff"} & set(text)


def text_outside_fences(text: str) -> str:
    outside: list[str] = []
    fence = ""
    for line in text.splitlines():
        if not fence and line.startswith("```"):
            fence = line.removesuffix("text")
        elif fence and line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    return "\n".join(outside)


def test_withdrawn_guidance_is_told_too() -> None:
    assert "no guidance for this session now" in guidance("  \n")


def test_a_cut_reply_is_told_its_limit() -> None:
    assert "32000 tokens" in CUT_REPLY.format(tokens=32_000)


def test_a_nudge_names_the_tools_that_move_the_night_on() -> None:
    assert "`run`" in NUDGE
    assert "`finish`" in NUDGE


def test_braces_in_a_program_are_words() -> None:
    assert "{editable} {0}" in system_prompt("Write {editable} {0}", SETTINGS)
