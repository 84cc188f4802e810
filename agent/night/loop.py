"""The session: while nothing says stop, ask, act, persist.

What would grow this lies elsewhere: whose turn it is in `turns`, retries in `asking` and `waiting`,
the tools in `toolbox`. See docs/decisions/0016 for what ends a session, and what does not.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Span

from agent.attempt.experiment import dethrone, score_on_holdout
from agent.attempt.lab import Lab, SessionOver
from agent.night.asking import ask
from agent.night.budget import NOTHING, Ending, reason_to_stop
from agent.night.circles import Act
from agent.night.toolbox import Toolbox, ToolResult
from agent.night.turns import Turns, tool_result
from agent.night.waiting import FAULT_PAUSE_SECONDS, run_with_retries, wait_while_paused
from agent.record.attempts import Attempt
from agent.record.events import Reserve, SessionEnded, StopReason, ToolCalled, ToolReturned, Verdict
from agent.record.history import HOLDOUT_MISSING, TRIES, History
from agent.researcher.base import ModelError, Reply, ToolCall
from agent.researcher.conversation import Conversation
from agent.researcher.prompt import STUCK
from sandbox.contract.errors import SandboxError

TRAINING_TOOLS = ("run", "sweep")
FEWEST_MESSAGES = 9
"""Of a conversation: who has just begun and is asked anew would never see an answer. A brief, and
four replies with their answers."""


@dataclass
class Night:
    """One session at work."""

    lab: Lab
    toolbox: Toolbox
    turns: Turns

    @property
    def history(self) -> History:
        return self.lab.history

    def span(self, name: str) -> AbstractContextManager[Span]:
        """An OpenTelemetry span; without an exporter it costs nothing."""
        return self.lab.worker.tracer.start_as_current_span(name)


def run_session(night: Night, after_attempt: Callable[[], object]) -> SessionEnded:
    """Work until there is a reason to stop, and record it.

    Args:
        night: its ledger holds a started or resumed session.
        after_attempt: called after the baseline and after every reply that led to a verdict.

    Raises:
        KeyboardInterrupt: passed on; the session can be resumed.
    """
    with night.span("invoke_agent nightlab") as span:
        reason, explanation = _work(night, after_attempt)
        if reason is not StopReason.SANDBOX_FAULT:
            _score_holdout(night)
        ended = SessionEnded(reason=reason, explanation=explanation)
        night.lab.ledger.append(ended)
        span.set_attribute("nightlab.ended", reason.value)
    return ended


def _work(night: Night, after_attempt: Callable[[], object]) -> Ending:
    try:
        return _measure_baseline(night) or _research(night, after_attempt)
    except SessionOver as over:
        return over.reason, over.message
    except ModelError as error:
        return error.reason, f"{error.message} {error.hint}".strip()
    except SandboxError as error:
        return StopReason.SANDBOX_FAULT, f"{error.message} {error.hint}".strip()


def _measure_baseline(night: Night) -> Ending | None:
    if night.history.baseline is not None:
        return None
    attempt = run_with_retries(night.lab, "baseline", "the files as they are", "nightlab")
    assert attempt.finished is not None
    if attempt.finished.verdict is Verdict.KEPT:
        return None
    return StopReason.BASELINE_FAILED, attempt.finished.explanation


def _research(night: Night, after_attempt: Callable[[], object]) -> Ending:
    after_attempt()
    following = night.turns.instead(night.turns.begin())
    while isinstance(following, Conversation):
        following = night.turns.before() or _step(night, following, after_attempt)
        following = night.turns.instead(following)
    return following


def _step(
    night: Night, conversation: Conversation, after_attempt: Callable[[], object]
) -> Conversation | Ending:
    """One reply, and what it asks for."""
    attempts = len(night.history.completed)
    # What the answer could cost at most is set aside before it is asked for: a limit that is
    # noticed afterwards is broken already.
    reserve = night.turns.model.worst_case(conversation.prompt)
    if stop := _reason_to_stop(night, reserve):
        return stop
    try:
        reply = _reply(night, conversation, reserve)
    except SessionOver as over:
        return over.reason, over.message
    except ModelError as error:
        return error.reason, f"{error.message} {error.hint}".strip()
    following: Conversation | Ending
    if reply is None:
        following = night.turns.start("the service no longer accepts the conversation")
    elif reply.tool_calls:
        following = _act(night, conversation, reply)
        night.turns.acted(attempts)
    else:
        following = night.turns.after(reply, conversation)
    if len(night.history.completed) > attempts:
        after_attempt()
    return following


def _reply(night: Night, conversation: Conversation, reserve: Reserve) -> Reply | None:
    """The model's reply; none when the service rejects this history for good."""
    model = night.turns.model
    try:
        with night.span(f"chat {model.name}"):
            reply = ask(night.lab, model, conversation, reserve, night.turns.patience_seconds)
    except ModelError as error:
        if not error.history_rejected or len(conversation.messages) == 1:
            raise
        night.turns.notice("history_rejected", error.message)
        if not night.turns.may_start_over():
            raise
        return None
    night.turns.asked_again = 0
    return reply


def _act(night: Night, conversation: Conversation, reply: Reply) -> Conversation | Ending:
    """Do what a reply asks for, in its order, and answer every call."""
    conversation.add_assistant(reply.content)
    answers: list[dict[str, Any]] = []
    done = []
    ending: Ending | None = None
    for call in reply.tool_calls:
        # One reply may hold several trainings, and a limit holds before each of them.
        if ending is None and call.name in TRAINING_TOOLS:
            ending = _reason_to_stop(night, NOTHING)
        is_over = call.name in TRAINING_TOOLS and night.turns.is_over() is not None
        if ending is not None or is_over:
            # Answered all the same: no service takes up a conversation with an open call.
            answers.append(tool_result(call.id, "not done: the session is over", is_error=True))
            continue
        result = _do(night, call)
        answers.append(tool_result(call.id, result.text, is_error=result.is_error))
        done.append(Act(call.name, call.input, result.text, result.is_error))
        if result.finished is not None:
            ending = StopReason.FINISHED, result.finished
    circle = night.turns.watch.circle(done, len(night.history.completed))
    notes = (night.turns.new_guidance(), circle and STUCK.format(circle=circle))
    conversation.add_user([*answers, *({"type": "text", "text": text} for text in notes if text)])
    if ending is None and circle:
        return night.turns.out_of_the_circle(circle, conversation)
    is_full = _tokens(reply) > night.lab.settings.researcher.max_conversation_tokens
    if ending is None and is_full and len(conversation.messages) >= FEWEST_MESSAGES:
        return night.turns.start("the conversation reached its token ceiling")
    return ending or conversation


def _do(night: Night, call: ToolCall) -> ToolResult:
    ledger = night.lab.ledger
    arguments = ledger.put_blob(json.dumps(call.input, ensure_ascii=False).encode())
    ledger.append(ToolCalled(call_id=call.id, name=call.name, input=arguments))
    with night.span(f"execute_tool {call.name}"):
        result = night.toolbox.call(call.name, call.input, night.turns.model.name)
    output = ledger.put_blob(result.text.encode())
    ledger.append(
        ToolReturned(call_id=call.id, name=call.name, is_error=result.is_error, output=output)
    )
    return result


def _reason_to_stop(night: Night, reserve: Reserve) -> Ending | None:
    """Why not to go on, once a pause that the person asked for is over."""
    try:
        wait_while_paused(night.lab)
    except SessionOver as over:
        return over.reason, over.message
    return reason_to_stop(night.history, night.lab.settings.session, reserve=reserve)


def _score_holdout(night: Night) -> None:
    """Score baseline and best on the split that decided nothing, once, when there is a gain.

    A best that is refused there is the best no more, and the one before it is scored instead.
    """
    is_dethroned = not night.lab.settings.goal.is_reported
    while is_dethroned:
        baseline, best = night.history.baseline, night.history.best
        if baseline is None or best is None or best is baseline:
            return
        is_scored = all(_score_on_holdout(night, attempt) for attempt in (baseline, best))
        is_dethroned = is_scored and dethrone(night.lab)


def _score_on_holdout(night: Night, attempt: Attempt) -> bool:
    """Whether an attempt is scored, after a few tries; the session ends as it was to end anyway."""
    for faults in range(TRIES):
        try:
            score_on_holdout(night.lab, attempt)
        except (SessionOver, SandboxError) as error:
            later = "a resume with hours left does it, and a review measures anew"
            text = f"attempt {attempt.number} is not scored on holdout: {error.message}; {later}"
            night.turns.notice(HOLDOUT_MISSING, text)
            if isinstance(error, SessionOver):
                return False
            night.lab.worker.sleep(FAULT_PAUSE_SECONDS * 2**faults)
        else:
            return True
    return False


def _tokens(reply: Reply) -> int:
    usage = reply.usage
    return usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
