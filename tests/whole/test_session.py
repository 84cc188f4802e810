"""Whole sessions through the command line, on the real engine, with a task that costs no time."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from agent.record.chain import read_ledger
from agent.record.events import (
    AttemptInterrupted,
    Noticed,
    SessionEnded,
    SessionResumed,
    StopReason,
    ToolReturned,
    Verdict,
)
from sandbox.engine.find import Engine, connect
from sandbox.image.image import ImageRecord
from tests.support.command_line import CommandLine, wait_for
from tests.support.messages_server import MessagesServer, say, text, tinker, tool

pytestmark = [pytest.mark.docker]

NOTHING_ALLOWED = """
import agent.attempt.disturbance as disturbance, agent.attempt.lab as lab
import agent.attempt.trial as trial, agent.cli.app
trial.idle_cores = lambda _: 0.0
lab.usual_of = lambda *_: disturbance.Usual(cores=0.0, speed=None)
agent.cli.app.main()
"""
"""nightlab on a machine that has no core to spare, and had no neighbour beside the baseline."""


def test_a_session_finds_something_better_and_leaves_nothing_behind(place: CommandLine) -> None:
    done = place.nightlab("run", "--researcher", "tpe", "--session", "one", "--seed", "7")

    assert done.returncode == 0, done.stderr
    history = place.history("one")
    assert history.baseline is not None
    assert history.best is not None
    assert len(history.completed) == 4
    assert history.best is not history.baseline
    assert history.best.values("holdout")
    assert "of the gain" in done.stdout
    assert place.containers("one") == []
    assert not any((place.session("one") / "boxes").iterdir())
    for name in ("report.html", "results.tsv", "progress.png"):
        assert (place.session("one") / name).stat().st_size > 0


def test_equal_seeds_make_equal_nights(place: CommandLine) -> None:
    place.foretell_seeds()
    verdicts = []
    for name in ("left", "right"):
        place.nightlab("run", "--researcher", "tpe", "--session", name, "--seed", "11")
        history = place.history(name)
        verdicts.append([(a.started.files, a.values()) for a in history.attempts])

    assert verdicts[0] == verdicts[1]


def test_json_output_is_one_object_a_line(place: CommandLine) -> None:
    done = place.nightlab("run", "--researcher", "tpe", "--attempts", "1", "--json")

    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events[-1] == "session_ended"
    assert "attempt_finished" in events


def test_a_killed_session_goes_on_and_loses_nothing(place: CommandLine) -> None:
    place.rewrite("workspace/train.py", "PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 1.5")
    running = place.start("run", "--researcher", "tpe", "--session", "cut", "--attempts", "3")
    wait_for(lambda: (place.session("cut") / "ledger.jsonl").exists())
    wait_for(lambda: any(a.started.kind == "candidate" for a in place.history("cut").attempts))
    wait_for(lambda: bool(place.containers("cut")))
    running.send_signal(signal.SIGKILL)
    running.communicate()
    before = place.history("cut")
    cut = before.attempts[-1].number

    done = place.nightlab("resume", "cut")

    assert done.returncode == 0, done.stderr
    after = place.history("cut")
    assert [cut] == [event.attempt for event in place.events("cut", AttemptInterrupted)]
    assert [(cut,)] == [event.interrupted_attempts for event in place.events("cut", SessionResumed)]
    assert list(range(len(after.attempts))) == [a.number for a in after.attempts]
    assert len(after.completed) == 3
    kept = [(a.started, a.finished) for a in before.attempts[:-1]]
    assert kept == [(a.started, a.finished) for a in after.attempts[: len(kept)]]
    assert place.containers("cut") == []


def test_ctrl_c_says_how_to_go_on_and_leaves_no_container(place: CommandLine) -> None:
    place.rewrite("workspace/train.py", "PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 15.0")
    running = place.start("run", "--researcher", "tpe", "--session", "stopped")
    wait_for(lambda: bool(place.containers("stopped")))
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)

    assert running.returncode == 130
    assert "nightlab resume stopped" in said
    assert place.containers("stopped") == []


def test_a_night_goes_on_when_its_terminal_and_its_readers_go_away(place: CommandLine) -> None:
    place.rewrite("workspace/train.py", "PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 1.0")
    running = place.start("run", "--researcher", "tpe", "--session", "alone", "--attempts", "2")
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.readline().endswith("nightlab watch alone\n")
    assert any(line.startswith("#0") for line in running.stdout)
    running.stdout.close()
    running.stderr.close()
    running.send_signal(signal.SIGHUP)

    assert 0 == running.wait(120)
    ended = place.history("alone").ended
    assert ended is not None
    assert "attempts" == ended.reason
    assert (place.session("alone") / "report.html").is_file()


def test_a_box_ends_with_the_terminal_that_waits_for_it(place: CommandLine) -> None:
    flags = ("--wall-seconds", "60", "--", "python3", "-c", "import time; time.sleep(60)")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may be run by nohup
    try:
        running = place.start("box", *flags)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: place.boxes_of(running.pid, running=True) != [])
    running.send_signal(signal.SIGHUP)
    running.communicate(timeout=30)

    assert 130 == running.returncode
    assert [] == place.boxes_of(running.pid)


def test_a_second_process_on_the_same_session_is_refused(place: CommandLine) -> None:
    place.rewrite("workspace/train.py", "PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 15.0")
    running = place.start("run", "--researcher", "tpe", "--session", "mine")
    try:
        wait_for(lambda: bool(place.containers("mine")))
        done = place.nightlab("resume", "mine")
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)

    assert done.returncode == 3
    assert str(running.pid) in done.stderr


def test_claude_without_a_key_is_refused_before_anything_runs(place: CommandLine) -> None:
    done = place.nightlab("run", "--researcher", "claude", "--session", "none")

    assert done.returncode == 2
    assert "--researcher tpe" in done.stderr
    assert not place.session("none").exists()


def test_claude_works_through_a_compatible_server(
    place: CommandLine, messages_server: Callable[..., MessagesServer]
) -> None:
    server = messages_server(itertools.repeat(tinker), endless=True)

    done = place.nightlab(
        "run", "--researcher", "claude", "--session", "talk", "--attempts", "3",
        ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    history = place.history("talk")
    assert len(history.completed) == 3
    assert history.spend.calls == len(server.bills)
    assert history.spend.usd == pytest.approx(server.billed_usd)


def test_a_reply_without_tools_is_nudged_and_then_ends_the_session(
    place: CommandLine, messages_server: Callable[..., MessagesServer]
) -> None:
    server = messages_server([say(text("I think we are done."))] * 4)
    program = place.root / "program.md"
    alone = program.read_text().rstrip().removesuffix("```") + "\n[researcher]\nthen = []\n```\n"
    program.write_text(alone)

    done = place.nightlab(
        "run", "--researcher", "claude", "--session", "idle",
        ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url,
    )  # fmt: skip

    assert done.returncode == 3
    assert [StopReason.AGENT_IDLE] == [e.reason for e in place.events("idle", SessionEnded)]
    assert len([e for e in place.events("idle", Noticed) if e.kind == "nudge"]) == 3


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ("raise SystemExit(5)", Verdict.FAILED, "failed"),
        ("import time; time.sleep(60)", Verdict.FAILED, "timed_out"),
        ("import time; time.sleep(3)", Verdict.INVALID, "over_budget"),
        ("import os; os._exit(0)", Verdict.FAILED, "no_checkpoint"),
        ("X = 'far'", Verdict.INVALID, "no_point"),
    ],
)
def test_what_goes_wrong_gets_its_own_verdict_and_the_best_comes_back(
    place: CommandLine,
    messages_server: Callable[..., MessagesServer],
    change: str,
    verdict: Verdict,
    reason: str,
) -> None:
    place.rewrite("program.md", "seconds = 20\ngrace_seconds = 5", "seconds = 2\ngrace_seconds = 2")
    guard = 'if __name__ == "__main__":'
    edit = tool("edit", file_path="train.py", old_string=guard, new_string=f"{guard}\n    {change}")
    run = tool("run", hypothesis="something goes wrong")
    server = messages_server([say(edit), say(run), say(tool("finish", reason="enough"))])

    place.nightlab(
        "run", "--researcher", "claude", "--session", "wrong",
        ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url,
    )  # fmt: skip

    history = place.history("wrong")
    attempt = history.attempts[-1]
    assert attempt.finished is not None
    assert (verdict, reason) == (attempt.finished.verdict, attempt.finished.reason)
    assert attempt.finished.value is None
    kept = (place.session("wrong") / "workspace" / "train.py").read_text()
    assert kept == (place.root / "workspace" / "train.py").read_text()
    assert not any(event.is_error for event in place.events("wrong", ToolReturned))


def test_a_disturbed_run_is_repeated_and_then_not_judged(place: CommandLine) -> None:
    place.rewrite(
        "program.md",
        "max_other_cores = 64\nmin_speed = 0\nmax_repeats = 0",
        "max_other_cores = 0\nmin_speed = 0\nmax_repeats = 1",
    )

    subprocess.run(
        [
            *(sys.executable, "-P", "-c", NOTHING_ALLOWED, "run", "--researcher", "tpe"),
            # A disturbed run waits for quiet, but no longer than a training takes.
            *("--session", "noisy", "--attempts", "1", "--budget-seconds", "6"),
        ],
        cwd=place.root,
        env=place.environ,
        check=True,
        timeout=240,
    )

    attempt = place.history("noisy").completed[0]
    assert attempt.finished is not None
    assert (Verdict.DISCARDED, "disturbed") == (attempt.finished.verdict, attempt.finished.reason)
    assert [True, True] == [run.disturbance is not None for run in attempt.runs]


def test_guidance_reaches_the_researcher_in_the_middle_of_the_night(
    place: CommandLine, messages_server: Callable[..., MessagesServer]
) -> None:
    def write_guidance(request: dict[str, Any]) -> Any:
        (place.session("steer") / "guidance.md").write_text("try larger Y first")
        return tinker(request)

    server = messages_server([write_guidance, *itertools.repeat(tinker, 12)], tolerant=True)

    place.nightlab(
        "run", "--researcher", "claude", "--session", "steer", "--attempts", "2",
        ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url,
    )  # fmt: skip

    assert "try larger Y first" not in json.dumps(server.requests[0])
    assert "try larger Y first" in json.dumps(server.requests[1])


def test_an_unknown_session_names_those_there_are(place: CommandLine) -> None:
    done = place.nightlab("resume", "nothing")

    assert done.returncode == 2
    assert "nightlab run" in done.stderr


@contextmanager
def image_on(engine: Engine, base: str, name: str, *lines: str) -> Iterator[str]:
    """An image that a person made of another one."""
    recipe = "\n".join([f"FROM {base}", "USER 0:0", f"RUN echo {name} > /whose", *lines])
    with closing(connect(engine)) as client:
        tag = f"nightlab-test:{name}"
        build = client.api.build(
            fileobj=io.BytesIO(recipe.encode()), tag=tag, network_mode="none", rm=True, decode=True
        )
        assert not [event for event in build if "error" in event]
        try:
            yield tag
        finally:
            client.images.remove(tag, force=True)


@pytest.mark.slow
def test_the_same_program_runs_on_two_bases_and_on_an_image_of_ones_own(
    place: CommandLine, engine: Engine, image: ImageRecord
) -> None:
    place.foretell_seeds()
    program = (place.root / "program.md").read_text().rstrip().removesuffix("```")
    greedy = ("ENV NVIDIA_VISIBLE_DEVICES=all", 'ENTRYPOINT ["/bin/false"]')
    base = f"nightlab-base:{image.base.image_id.removeprefix('sha256:')[:16]}"
    with (
        image_on(engine, base, "other-base") as other,
        image_on(engine, image.reference, "own-image", *greedy) as own,
    ):
        choices = {"shipped": ("cpu", ""), "other": ("cpu", other), "own": ("own-torch", own)}
        for name, (profile, base_image) in choices.items():
            hardware = f'[hardware]\nprofile = "{profile}"\nbase_image = "{base_image}"\n'
            (place.root / "program.md").write_text(f"{program}\n{hardware}```\n")
            made = place.nightlab("setup")
            assert made.returncode == 0, made.stderr
            options = ("--session", name, "--seed", "7", "--attempts", "2")
            done = place.nightlab("run", "--researcher", "tpe", *options)
            assert done.returncode == 0, done.stderr

    sessions = {name: place.history(name) for name in choices}
    used = {name: history.session.image for name, history in sessions.items() if history.session}
    assert [("cpu", "debian"), ("cpu", "given"), ("own-torch", "given")] == [
        (used[name]["profile"], used[name]["base"]["source"]) for name in choices
    ]
    assert 3 == len({record["image_id"] for record in used.values()})
    assert 1 == len({record["torch"] for record in used.values()})
    assert 1 == len({tuple(e.event.type for e in read_ledger(place.session(n))) for n in choices})
    assert 1 == len(
        {tuple(tuple(a.values().items()) for a in h.attempts) for h in sessions.values()}
    )
    for name in choices:
        assert (place.session(name) / "report.html").stat().st_size > 0


def test_an_image_that_changed_its_meaning_is_not_used_silently(
    place: CommandLine, engine: Engine, image: ImageRecord
) -> None:
    place.rewrite("program.md", "[noise]", '[hardware]\nprofile = "own-torch"\n\n[noise]')
    with image_on(engine, image.reference, "moving") as moving:
        made = place.nightlab("setup", "--base-image", moving)
        assert made.returncode == 0, made.stderr
        assert 0 == place.nightlab("image", "show", "--base-image", moving).returncode
        with (
            image_on(engine, image.reference, "moved") as moved,
            closing(connect(engine)) as client,
        ):
            client.images.get(moved).tag("nightlab-test", "moving")
            refused = place.nightlab("run", "--base-image", moving, "--session", "moved")

    assert 3 == refused.returncode
    assert "another image now than when it was set up" in refused.stderr
    assert "nightlab setup" in refused.stderr
