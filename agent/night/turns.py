"""Whose turn it is, in which conversation, after which reply.

A reply may end in many ways, and none of them may end a night by itself: a refusal opens a new
conversation and then brings a stand-in, a reply that asks for nothing is answered with a reminder,
and what a crash cut off is answered as far as the ledger knows.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from agent.attempt.lab import Lab
from agent.night.budget import Ending, is_refused_too_often, seconds_left
from agent.night.circles import CircleWatch
from agent.night.toolbox import Toolbox
from agent.record.events import (
    SAMPLERS,
    MessageAdded,
    Noticed,
    SessionEnded,
    StopReason,
    ToolCalled,
    ToolReturned,
)
from agent.researcher.arguments import calls_in_words, schemas
from agent.researcher.base import Model, Reply
from agent.researcher.conversation import Conversation
from agent.researcher.prompt import CUT_REPLY, NUDGE, brief, guidance, system_prompt
from agent.text import one_line

MAX_IDLE_REPLIES = 3
MAX_REJECTIONS = 3
MAX_GUIDANCE_BYTES = 32 * 1024
OUTAGE_PATIENCE_SECONDS = 600.0
PASSING = frozenset({StopReason.API_OUTAGE, StopReason.MONEY, StopReason.TOKENS, StopReason.CALLS})
"""Reasons that may be gone when the session is resumed."""
REPLACED = PASSING | {
    StopReason.AGENT_IDLE,
    StopReason.STUCK,
    StopReason.API_REFUSED,
    StopReason.EXHAUSTED,
    StopReason.REFUSED,
    StopReason.REFUSED_SCORES,
}
"""Why one researcher cannot go on where another may."""
MEANWHILE = "stand_in_meanwhile"

WINDOW_FULL = (
    "the model's context window was full in every conversation; below what it holds: "
    "`nightlab resume NAME --max-conversation-tokens N --max-output-tokens M`"
)
INTERRUPTED_CALL = (
    "interrupted: nightlab stopped during this call, and a part of it may be done; "
    "see history and read the files, then go on"
)


@dataclass
class Turns:
    """Whose turn it is in one session, and in which conversation.

    Args:
        lab: of the session.
        models: who proposes; each one stands in for the one before, should that not go on.
        toolbox: what they act through.
        prose: of program.md.
    """

    lab: Lab
    models: list[Model]
    toolbox: Toolbox
    prose: str
    idle_replies: int = 0
    refusals: int = 0
    """Since the last judged attempt."""
    rejections: int = 0
    """How many conversations the service would not go on with, since the last judged attempt."""
    away: list[Model] = field(default_factory=list)
    """Whom an outage keeps away, in their order."""
    away_since: int = 0
    """How many attempts were done then."""
    asked_again: int = 0
    """How many of the first models were away, and may be so still."""
    watch: CircleWatch = field(default_factory=CircleWatch)
    shown_guidance: str | None = None
    """The guidance that the researcher has; None after a resume, when nobody knows."""

    @property
    def model(self) -> Model:
        """Who speaks now."""
        return self.models[0]

    def begin(self) -> Conversation | Ending:
        """What a crash or a stop cut off: an ending or a conversation; else a new one."""
        conversation = Conversation.last(self.lab.ledger)
        if conversation is None:
            return self.start("the session began")
        if conversation.messages and conversation.messages[-1]["role"] == "assistant":
            conversation.add_user(self._answers_after_a_crash(conversation.orphans()))
        if ending := self._unfinished_ending():
            return ending
        # A resume that names a researcher overrules who stood in when the session ended.
        names = [model.name for model in self.models]
        if self._is_meanwhile():
            return self.start("the researcher is asked again")
        is_chosen = self.lab.history.is_newly_chosen and conversation.researcher != names[0]
        if is_chosen or conversation.researcher not in names:
            return self.start("another researcher took over")
        del self.models[: names.index(conversation.researcher)]
        if conversation.researcher in SAMPLERS:  # which know the attempts and no conversation
            return self.start("nightlab was stopped")
        if not conversation.messages:
            return self.start("nightlab stopped before the conversation began")
        return conversation

    def start(self, reason: str) -> Conversation:
        """A new conversation, from a brief; a sampler starts from the best, not from edits."""
        best = self.lab.history.best
        if self.model.name in SAMPLERS and best is not None:
            self.lab.workspace.restore(self.lab.stored_files(best))
            self.toolbox.files.forget_reads()
        return Conversation.start(
            self.lab.ledger,
            researcher=self.model.name,
            system=system_prompt(self.prose, self.lab.settings),
            tools=schemas(),
            brief=self._brief(),
            reason=reason,
        )

    def acted(self, attempts_before: int) -> None:
        """Take note of a reply that called tools."""
        self.idle_replies = 0
        if len(self.lab.history.completed) > attempts_before:
            self.refusals = self.rejections = 0

    def may_start_over(self) -> bool:
        """Whether a rejected conversation is worth another one; not when they all are rejected."""
        self.rejections += 1
        return self.rejections <= MAX_REJECTIONS

    def after(self, reply: Reply, conversation: Conversation) -> Conversation | Ending:
        """Go on after a reply that asks for nothing; see the stop reasons of the Messages API."""
        match reply.stop_reason:
            case "refusal":
                return self._after_refusal(reply)
            case "model_context_window_exceeded":
                if self.may_start_over():
                    return self.start("the context window was full")
                return StopReason.API_REFUSED, WINDOW_FULL
            case "max_tokens":
                most = self.lab.settings.researcher.max_output_tokens
                text = CUT_REPLY.format(tokens=most)
            case _:
                if reply.content:
                    conversation.add_assistant(reply.content)
                text = NUDGE
        return self._nudged(reply, conversation, text)

    def out_of_the_circle(self, circle: str, conversation: Conversation) -> Conversation | Ending:
        """On with a warning, then in a new conversation; the third circle ends the session."""
        self.notice("stuck", circle)
        if self.watch.warnings > 2:
            return (
                StopReason.STUCK,
                f"{circle}, and neither warning nor new conversation helped",
            )
        if self.watch.warnings > 1:
            return self.start(f"the researcher went in circles: {circle}")
        return conversation

    def is_over(self) -> Ending | None:
        """Why the one who speaks may try nothing more, while others may."""
        limits = self.lab.settings.session
        return is_refused_too_often(self.lab.history, limits, self.model.name)

    def before(self) -> Conversation | Ending | None:
        """What comes before the next reply: an end of one's part, or a service that may be back."""
        if (over := self.is_over()) is not None:
            return over
        if not self.away or len(self.lab.history.completed) <= self.away_since:
            return None
        self.asked_again = len(self.away)
        self.models, self.away = [*self.away, *self.models], []
        return self.start("the service is asked again")

    def instead(self, following: Conversation | Ending) -> Conversation | Ending:
        """Who goes on where one cannot; the last one's outage and all else is passed on."""
        if isinstance(following, Conversation) or following[0] not in REPLACED:
            return following
        reason, is_last = following[0], len(self.models) == 1
        if is_last and (reason is StopReason.API_OUTAGE or not self.away):
            return following
        gone = self.models.pop(0)
        if reason is StopReason.API_OUTAGE:
            self.away, self.away_since = [*self.away, gone], len(self.lab.history.completed)
        kind = MEANWHILE if reason in PASSING or self.away else "stand_in"
        is_still_away = self.asked_again > 0 and reason is StopReason.API_OUTAGE
        self.asked_again = max(0, self.asked_again - 1)
        if is_last:  # all but one of them are asked once, and that one until it answers
            self.models, self.away, self.asked_again = self.away, [], len(self.away) - 1
        if not is_still_away:  # which an outage of hours would say after each attempt
            self.notice(reason.value, following[1])
            self.notice(kind, f"{self.model.name} goes on where {gone.name} cannot")
        self.idle_replies = self.refusals = self.rejections = 0
        self.watch = CircleWatch()
        return self.start(f"{gone.name} cannot go on ({reason.value})")

    @property
    def patience_seconds(self) -> float:
        """How long an outage is waited out before somebody else goes on."""
        if self.asked_again:
            return 0.0
        return math.inf if len(self.models) == 1 else OUTAGE_PATIENCE_SECONDS

    def new_guidance(self) -> str | None:
        """The person's guidance.md when it changed since the researcher last got it."""
        text = self._guidance()
        if text == self.shown_guidance:
            return None
        self.shown_guidance = text
        return guidance(text)

    def notice(self, kind: str, explanation: str) -> None:
        """Put something on record that a person may look for."""
        self.lab.ledger.append(Noticed(kind=kind, explanation=explanation))

    def _brief(self) -> str:
        ledger, settings = self.lab.ledger, self.lab.settings
        self.shown_guidance = self._guidance()
        return brief(
            settings,
            ledger.history,
            ledger.get_blob,
            guidance=self.shown_guidance,
            hours_left=seconds_left(ledger.history, settings.session) / 3600,
        )

    def _guidance(self) -> str:
        path = self.lab.worker.directory / "guidance.md"
        try:
            with path.open("rb") as file:
                return file.read(MAX_GUIDANCE_BYTES).decode(errors="replace").strip()
        except OSError:  # the person deleted it, or it is a directory: that ends no night
            return ""

    def _nudged(
        self, reply: Reply, conversation: Conversation, reminder: str
    ) -> Conversation | Ending:
        self.idle_replies += 1
        if self.idle_replies > MAX_IDLE_REPLIES:
            why = f"{MAX_IDLE_REPLIES} reminders did not bring a tool call"
            return StopReason.AGENT_IDLE, f"{why}{calls_in_words(reply.content)}"
        ended = one_line(reply.stop_reason, 60)
        self.notice("nudge", f"reply ended with {ended} and no tool call that counts")
        # What a reply asks for is done only where it ends with `tool_use`; it is answered anyway.
        undone = f"not done: the reply ended with {ended}"
        answers = [tool_result(i, undone, is_error=True) for i in conversation.orphans()]
        conversation.add_user([*answers, {"type": "text", "text": reminder}])
        return conversation

    def _after_refusal(self, reply: Reply) -> Conversation | Ending:
        """Ask anew in a conversation without what was refused; then ask somebody else."""
        self.refusals += 1
        self.notice("refusal", reply.explanation or "the model refused without a reason")
        if self.refusals == 1:
            return self.start("the model refused")
        return StopReason.REFUSED, f"{self.model.name} refused {self.refusals} times"

    def _answers_after_a_crash(self, orphans: list[str]) -> list[dict[str, Any]]:
        """What the calls of the last reply came to, as far as the ledger knows; else a nudge."""
        ledger = self.lab.ledger
        events = (entry.event for entry in reversed(ledger.entries))
        # Only those younger than the reply: servers may use an id again in later ones.
        since = takewhile(lambda event: not isinstance(event, MessageAdded), events)
        returned = {event.call_id: event for event in since if isinstance(event, ToolReturned)}
        answers = []
        for call_id in orphans:
            if (done := returned.get(call_id)) is not None:
                text, is_error = ledger.get_blob(done.output).decode(), done.is_error
            else:
                text, is_error = INTERRUPTED_CALL, True
            answers.append(tool_result(call_id, text, is_error=is_error))
        return answers or [{"type": "text", "text": NUDGE}]

    def _is_meanwhile(self) -> bool:
        """Whether somebody stands in for a reason that may be gone."""
        kinds = (
            e.event.kind for e in reversed(self.lab.ledger.entries) if isinstance(e.event, Noticed)
        )
        return next((kind for kind in kinds if kind in ("stand_in", MEANWHILE)), "") == MEANWHILE

    def _unfinished_ending(self) -> Ending | None:
        """The end that the researcher asked for, if a crash came before it was on record."""
        for entry in reversed(self.lab.ledger.entries):
            match entry.event:
                case SessionEnded():
                    return None
                case ToolCalled(name="finish", input=sha):
                    wish = json.loads(self.lab.ledger.get_blob(sha))
                    result = self.toolbox.call("finish", wish, self.model.name)
                    if result.finished is None:  # it was refused then as well
                        return None
                    return StopReason.FINISHED, result.finished
        return None


def tool_result(call_id: str, text: str, *, is_error: bool) -> dict[str, Any]:
    """An answer to one tool call, as the Messages API wants it."""
    return {"type": "tool_result", "tool_use_id": call_id, "content": text, "is_error": is_error}
