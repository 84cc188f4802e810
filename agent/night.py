"""Puts a session's parts together: model, tools, words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from agent.budget import seconds_left
from agent.experiment import run_patiently
from agent.lab import Lab, find_known
from agent.ledger import Ledger
from agent.loop import Night
from agent.model import ClaudeModel, LostCall, Model
from agent.program import Program
from agent.prompt import brief, cut_reply, guidance, nudge, system_prompt
from agent.records import ModelCalled, RetryWaited
from agent.tools import Toolbox
from agent.tpe import TpeModel

MAX_GUIDANCE_BYTES = 32 * 1024


def assemble(lab: Lab, program: Program, model: Model) -> Night:
    """A session ready to run."""
    ledger = lab.ledger
    toolbox = Toolbox(
        workspace=lab.workspace,
        history=lambda: ledger.history,
        get_blob=ledger.get_blob,
        run_attempt=lambda hypothesis: run_patiently(lab, "candidate", hypothesis, model.name),
        find_known=lambda files: find_known(lab, files),
        suggest=_sampler(lab).suggestion,
        goal=lab.settings.goal,
    )
    return Night(lab, model, toolbox, SessionWords(lab, program))


@contextmanager
def open_model(
    lab: Lab,
    researcher: str,
    environ: Mapping[str, str],
    on_wait: Callable[[str, float], None],
) -> Iterator[Model]:
    """The researcher's model, closed afterwards.

    Args:
        lab: of the session.
        researcher: `claude` or `tpe`.
        environ: holds credentials and maybe the address of a compatible server.
        on_wait: told what failed and for how many seconds it is waited now.
    """
    if researcher == "tpe":
        yield _sampler(lab)
        return
    settings, ledger = lab.settings, lab.ledger

    def note_wait(error: str, wait_seconds: float) -> None:
        ledger.append(
            RetryWaited(
                conversation=ledger.history.conversation, error=error, wait_seconds=wait_seconds
            )
        )
        on_wait(error, wait_seconds)

    with ClaudeModel(
        model=settings.researcher.model,
        max_output_tokens=settings.researcher.max_output_tokens,
        effort=settings.researcher.effort,
        api_key=environ.get("ANTHROPIC_API_KEY"),
        auth_token=environ.get("ANTHROPIC_AUTH_TOKEN"),
        base_url=environ.get("ANTHROPIC_BASE_URL"),
        deadline=lambda: seconds_left(ledger.history, settings.session),
        on_retry=note_wait,
        on_lost=lambda lost: _charge_lost(ledger, lost),
    ) as model:
        yield model


@dataclass
class SessionWords:
    """What nightlab says in one session; see `loop.Words`."""

    lab: Lab
    program: Program
    told_guidance: str = ""

    def system(self) -> str:
        """The frozen system prompt."""
        return system_prompt(self.program.prose, self.lab.settings)

    def brief(self) -> str:
        """The first message of a conversation, from the ledger alone."""
        self.told_guidance = self._guidance()
        return brief(
            self.lab.settings,
            self.lab.ledger.history,
            self.lab.ledger.get_blob,
            guidance=self.told_guidance,
        )

    def nudge(self) -> str:
        """A reminder to use a tool."""
        return nudge()

    def cut_reply(self) -> str:
        """What to do after a reply that was cut at its limit."""
        return cut_reply(self.lab.settings.researcher.max_output_tokens)

    def new_guidance(self) -> str | None:
        """The person's guidance.md when it changed since it was last told."""
        text = self._guidance()
        if text == self.told_guidance:
            return None
        self.told_guidance = text
        return guidance(text)

    def _guidance(self) -> str:
        path = self.lab.directory / "guidance.md"
        try:
            return path.read_bytes()[:MAX_GUIDANCE_BYTES].decode(errors="replace").strip()
        except OSError:
            return ""


def _sampler(lab: Lab) -> TpeModel:
    ledger = lab.ledger
    session = ledger.history.session
    assert session is not None
    return TpeModel(
        history=lambda: ledger.history,
        get_blob=ledger.get_blob,
        best_files=lab.workspace.editable_files,
        seed=session.seeds[0],
        direction=lab.settings.goal.direction,
    )


def _charge_lost(ledger: Ledger, lost: LostCall) -> None:
    ledger.append(
        ModelCalled(
            conversation=ledger.history.conversation,
            model=lost.model,
            request_id=lost.request_id,
            stop_reason="lost",
            usage=lost.usage,
            cost_usd=lost.cost_usd,
            seconds=lost.seconds,
        )
    )
