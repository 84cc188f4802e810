"""What a person may get wrong: each ends in a sentence, a hint and an exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner, Result

from agent.cli.app import EXIT_CODES, app, guarded
from agent.record.chain import read_ledger
from agent.report.console import closing_lines
from agent.report.summary import summary
from sandbox.contract.errors import NightlabError
from tests.support.sessions import forge, sampled, talked

NO_TOML = "Improve it.\n"
BROKEN_TOML = "Improve it.\n```toml\n[session\nattempts = 3\n```\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's directory with one session that is over, and some files that are no programs."""
    root = tmp_path_factory.mktemp("person")
    sampled(root / "runs", attempts=2)
    (root / "prose.md").write_text(NO_TOML)
    (root / "broken.md").write_text(BROKEN_TOML)
    (root / "alone.md").write_bytes((Path(__file__).parents[3] / "program.md").read_bytes())
    (root / "long.md").write_bytes(b"x" * (256 * 1024 + 1))
    os.mkfifo(root / "pipe.md")
    (root / "gitconfig").write_text("[user]\nname = Somebody\nemail = somebody@example.org\n")
    return root


def nightlab(place: Path, *words: str, **variables: str) -> Result:
    here = Path.cwd()
    os.chdir(place)
    try:
        environ = {
            "GIT_CONFIG_GLOBAL": str(place / "gitconfig"),
            "NIGHTLAB_HOME": str(place / "home"),
            "COLUMNS": "200",
        }
        return CliRunner().invoke(app, words, env=environ | variables)
    finally:
        os.chdir(here)


WRONG: list[tuple[str, int, str, str]] = [
    ("report nothing", 2, "there is no session 'nothing' in runs", "known sessions: night"),
    ("report runs/night", 2, "runs/night is a path", "name it night"),
    ("report ..", 2, "there is no session '..'", "known sessions: night"),
    ("report night --runs elsewhere", 2, "no session 'night' in elsewhere", "nightlab run"),
    ("run --program alone.md --session ../x", 2, "cannot be called '../x'", "letters, digits"),
    (
        "run --program alone.md --session .hidden",
        2,
        "cannot be called '.hidden'",
        "letters, digits",
    ),
    ("run --program alone.md --session a/b", 2, "cannot be called 'a/b'", "letters, digits"),
    ("run --program nowhere/program.md", 2, "nowhere/program.md: No such file", "--program"),
    ("run --program prose.md", 2, "prose.md: holds no toml block", "nightlab init"),
    ("run --program broken.md", 2, "broken.md:3: not toml", "name = value"),
    ("run --program runs", 2, "runs: Is a directory", "--program"),
    *(
        (command, 2, "program.md: No such file", "nightlab init")
        for command in (
            *("run", "setup", "check", "gpus", "calibrate", "image show", "box -- true"),
            "run --program ./program.md",
        )
    ),
    *(
        (f"{command} --program {path}", 2, words, "name")
        for command in ("run", "setup", "check", "gpus", "calibrate", "image show")
        for path, words in (
            ("/dev/zero", "/dev/zero: not a plain file"),
            ("pipe.md", "pipe.md: not a plain file"),
            ("long.md", "long.md: larger than 256 KiB"),
        )
    ),
    ("run --program alone.md", 2, "workspace is no directory", "nightlab init"),
    ("run --program alone.md --attempts 0", 2, "--attempts 0: input should be greater", "--help"),
    (
        "run --program alone.md --researcher gpt",
        2,
        "--researcher gpt: input should be 'auto'",
        "--help",
    ),
    (
        "run --program alone.md --researcher claude",
        2,
        "needs ANTHROPIC_API_KEY",
        "--researcher tpe",
    ),
    ("init prose.md", 3, "prose.md: File exists", "look at that path"),
    (
        "box --program alone.md --memory 1x -- true",
        2,
        "--memory 1x: not a size",
        "write it like 512m",
    ),
    (
        "box --program alone.md --mount-ro data -- true",
        2,
        "not HOST:BOX",
        "write it like data:/data",
    ),
    ("stop night", 2, "night has ended already (attempts)", "nightlab resume night"),
    ("resume night --hours -1", 2, "--hours -1.0: input should be greater", "--help"),
    ("watch night --tui --json", 2, "exclude each other", "leave one of them out"),
    ("audit night --type verdict", 2, "no event of type verdict", "known types: session_started"),
    ("audit night --since yesterday", 2, "neither a time nor a duration", "--since 1h30m"),
    ("audit night --attempt 9", 2, "there is no attempt 9", "0 to 2"),
    ("audit night --head xyz", 2, "xyz is no hash", "12 to 64 digits"),
    ("approve night --reason x --repo runs", 2, "runs lies inside runs", "your own repository"),
    ("approve night --reason x --branch a..b", 2, "git check-ref-format failed", "--branch"),
    ("rejct night", 2, "No such command 'rejct'", "Did you mean"),
    ("reject night", 2, "Missing option '--reason'", "reject --help"),
    ("replay night first", 2, "Invalid value for 'attempt'", "replay --help"),
]


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"), WRONG, ids=[words for words, *_ in WRONG]
)
def test_what_is_wrong_is_said_with_what_to_do_next(
    place: Path, words: str, code: int, message: str, hint: str
) -> None:
    before = sorted(place.rglob("*"))
    done = nightlab(place, *words.split())
    assert isinstance(done.exception, SystemExit), done.exception
    assert code == done.exit_code
    assert "--json" in words or not done.stdout
    assert message in done.stderr
    assert hint in done.stderr
    assert before == sorted(place.rglob("*"))


@pytest.mark.parametrize("command", ["approve", "reject"])
def test_a_decision_without_a_reason_is_none(place: Path, command: str) -> None:
    done = nightlab(place, command, "night", "--reason", " ")
    assert 2 == done.exit_code
    assert "say why" in done.stderr


def test_a_path_that_cannot_be_written_is_named_as_it_was_asked_for(place: Path) -> None:
    report = place / "runs" / "night" / "report.html"
    report.unlink(missing_ok=True)
    report.mkdir()
    try:
        done = nightlab(place, "report", "night")
    finally:
        report.rmdir()
    assert 3 == done.exit_code
    assert f"{report}: Is a directory" in done.stderr
    assert not list(report.parent.glob(".*.tmp"))


def test_a_session_that_reached_a_limit_says_how_to_allow_more(place: Path) -> None:
    directory = place / "runs" / "night"
    told = closing_lines(summary(read_ledger(directory)), directory)
    assert "more     nightlab resume night --attempts N" == told[-1]


def test_the_end_of_a_night_leads_into_the_morning(place: Path, tmp_path: Path) -> None:
    directory = place / "runs" / "night"
    entries = read_ledger(directory)
    assert [] == [line for line in closing_lines(summary(entries), directory) if "next " in line]
    ended = next(n for n, e in enumerate(entries, 1) if e.event.type == "session_ended")
    told = "\n".join(closing_lines(summary(entries[:ended]), directory))
    assert re.search(
        r"next     not reviewed: nightlab review night \(at most \d+ trainings, about \d+ min\)",
        told,
    )
    assert "next     not decided: nightlab approve night --reason … or nightlab reject" in told
    shutil.copytree(directory, tmp_path / "runs" / "fresh")
    lines = (directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "runs" / "fresh" / "ledger.jsonl").write_bytes(b"".join(lines[:ended]))
    (tmp_path / "gitconfig").write_bytes((place / "gitconfig").read_bytes())
    told = nightlab(tmp_path, "report", "fresh").stdout
    assert "next     not reviewed" in told
    assert "best     distance" in told
    page = (tmp_path / "runs" / "fresh" / "report.html").read_text(encoding="utf-8")
    assert "Not reviewed: nightlab review night" in page
    assert "Nothing needs you" not in page
    taken = nightlab(tmp_path, "approve", "fresh", "--reason", "it is better")
    assert "kept" in taken.stdout
    assert "it was not reviewed" in taken.stderr


def test_the_sessions_are_listed_with_what_they_came_to(place: Path, tmp_path: Path) -> None:
    row = nightlab(place, "list").stdout.splitlines()[1]
    assert row.startswith("night  ")
    assert "ended: attempts" in row
    (line,) = nightlab(place, "list", "--json").stdout.splitlines()
    assert ("session", "night") == (json.loads(line)["event"], json.loads(line)["session"])
    shutil.copytree(place / "runs" / "night", tmp_path / "runs" / "beheaded")
    (tmp_path / "runs" / "beheaded" / "ledger.jsonl").write_text("no line of a ledger\n")
    assert "beheaded" in nightlab(tmp_path, "list").stdout
    assert "no session in" in nightlab(tmp_path, "list", "--runs", "elsewhere").stdout


def test_one_attempt_is_shown_in_its_parts(place: Path) -> None:
    whole = nightlab(place, "show", "night", "1").stdout
    for part in ("--- verdict", "--- change", "--- log", "--- words", "needs 0."):
        assert part in whole
    changed = nightlab(place, "show", "night", "1", "--diff").stdout
    assert changed.startswith("--- a/train.py")
    assert "--- verdict" not in changed
    (line,) = nightlab(place, "show", "night", "1", "--json").stdout.splitlines()
    assert {"verdict", "change", "log", "words"} < json.loads(line).keys()
    between = nightlab(place, "show", "night", "1", "--against", "0").stdout
    assert changed == between
    assert "(none)\n" == nightlab(place, "show", "night", "1", "--against", "1").stdout
    assert 2 == nightlab(place, "show", "night", "1", "--against", "9").exit_code
    refused = nightlab(place, "show", "night", "9")
    assert (2, "") == (refused.exit_code, refused.stdout)
    assert "there is no attempt 9 in night" in refused.stderr


def test_the_researchers_words_can_be_read(tmp_path: Path) -> None:
    made = talked(tmp_path / "runs", attempts=2)
    name = made.directory.name if hasattr(made, "directory") else "night"
    first, second = (
        nightlab(tmp_path, "show", name, number, "--messages").stdout for number in ("1", "2")
    )
    for words in (first, second):
        assert "[researcher calls run]" in words
        assert "hypothesis = " in words
    assert "[nightlab]" in first  # the brief
    assert "[told]" in second  # what came of the first
    assert not {c for c in first if unicodedata.category(c) in ("Cc", "Cf")} - {"\n", "\t"}


def test_version_and_exit_codes_are_told(place: Path) -> None:
    assert re.fullmatch(r"nightlab \d+\.\d+.*\n", nightlab(place, "--version").stdout)
    told = " ".join(nightlab(place, "-h").stdout.split())
    assert EXIT_CODES in told
    page = (Path(__file__).parents[3] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert EXIT_CODES in " ".join(page.split())


@pytest.mark.parametrize("command", ["list", "review night --no-runs", "image list"])
def test_no_column_is_lost_in_a_narrow_terminal(place: Path, command: str) -> None:
    wide, narrow = (nightlab(place, *command.split(), COLUMNS=str(n)).stdout for n in (200, 40))
    assert wide.split() == narrow.split()


def test_no_line_of_the_help_is_cut_short(place: Path) -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    commands = told.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(get_command(app).commands) == len(commands)  # type: ignore[attr-defined]
    assert [] == [line for line in commands if line.endswith("...")]


def test_a_command_starts_without_what_only_some_need() -> None:
    slow = ("anthropic", "matplotlib", "numpy", "optuna", "scipy", "torch")
    look = f"import sys, agent.cli.app; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", look], capture_output=True, check=True)
    assert b"[]" == done.stdout.strip()


def test_a_money_limit_needs_a_known_price(place: Path) -> None:
    shipped = (Path(__file__).parents[3] / "program.md").read_text(encoding="utf-8")
    (place / "dear.md").write_text(shipped.replace("claude-sonnet-5-5", "some-other-model"))
    words = ("run", "--program", "dear.md", "--researcher", "claude", "--usd", "5")
    done = nightlab(place, *words, ANTHROPIC_API_KEY="not-a-real-key")
    assert 2 == done.exit_code
    assert "the price of some-other-model is not known" in done.stderr
    assert "leave usd out" in done.stderr


def test_every_kind_of_error_has_something_to_do_next() -> None:
    kinds = _below(NightlabError)
    assert {"LedgerError", "ModelError", "UsageError"} <= {kind.__name__ for kind in kinds}
    assert [] == [kind for kind in kinds if not kind.usual_hint]


def _below(kind: type[NightlabError]) -> list[type[NightlabError]]:
    return [found for one in kind.__subclasses__() for found in (one, *_below(one))]


@pytest.mark.parametrize(
    "command", ["resume", "report", "audit", "review", "replay 1", "approve --reason good"]
)
def test_a_ledger_that_begins_in_the_middle_gets_a_sentence(
    place: Path, tmp_path: Path, command: str
) -> None:
    shutil.copytree(place / "runs" / "night", tmp_path / "runs" / "beheaded")
    forge(tmp_path / "runs" / "beheaded", lambda lines: lines.pop(0))
    verb, *words = command.split()
    refused = nightlab(tmp_path, verb, "beheaded", *words)
    assert not refused.exception or isinstance(refused.exception, SystemExit), refused.exception
    assert refused.exit_code != 0 or verb == "report"  # which shows what there is


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_sentence(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def locks() -> None:
        raise OSError(number, os.strerror(number))  # as flock says it, without a file's name

    with pytest.raises(typer.Exit) as left:
        guarded(locks)()
    assert 3 == left.value.exit_code
    assert "cannot lock files" in (said := capsys.readouterr().err)
    assert "local disk" in said
