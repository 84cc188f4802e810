"""The session: while nothing says stop, reply, act, persist."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from agent.budget import reason_to_stop
from agent.conversation import Conversation
from agent.experiment import run_patiently
from agent.history import History
from agent.lab import Lab
from agent.measurement import score_holdout
from agent.model import Model, ModelError, Reply, ToolCall
from agent.records import (
    ModelCalled,
    Noticed,
    SessionEnded,
    StopReason,
    ToolCalled,
    ToolReturned,
    Verdict,
)
from agent.tools import Toolbox
from sandbox.contract import SandboxError

MAX_IDLE_REPLIES = 3
MAX_REFUSALS = 3

INTERRUPTED_CALL = "interrupted: nightlab stopped before this was done; see history and try again"

Ending = tuple[StopReason, str]


class Words(Protocol):
    """What nightlab says to a researcher."""

    def system(self) -> str: ...
    def brief(self) -> str: ...
    def nudge(self) -> str: ...
    def cut_reply(self) -> str: ...
    def new_guidance(self) -> str | None: ...


@dataclass
class Night:
    """One session at work."""

    lab: Lab
    model: Model
    toolbox: Toolbox
    words: Words
    idle_replies: int = 0
    refusals: int = 0

    @property
    def history(self) -> History:
        return self.lab.ledger.history


def run_session(night: Night, after_attempt: Callable[[], object]) -> SessionEnded:
    """Work until there is a reason to stop, and record it.

    Args:
        night: what to work with; its ledger holds a started or resumed session.
        after_attempt: called after the baseline, and after every reply that was acted on.

    Raises:
        KeyboardInterrupt: passed on; the session can be resumed.
    """
    try:
        try:
            reason, explanation = _measure_baseline(night) or _research(night, after_attempt)
        except ModelError as error:
            reason, explanation = error.reason, f"{error.message} {error.hint}".strip()
        _score_holdout(night)
    except SandboxError as error:
        reason, explanation = StopReason.SANDBOX_FAULT, f"{error.message} {error.hint}".strip()
    ended = SessionEnded(reason=reason, explanation=explanation)
    night.lab.ledger.append(ended)
    return ended


def _measure_baseline(night: Night) -> Ending | None:
    if night.history.baseline is not None:
        return None
    attempt = run_patiently(night.lab, "baseline", "the files as they are", "nightlab")
    assert attempt.finished is not None
    if attempt.finished.verdict is Verdict.KEPT:
        return None
    return StopReason.BASELINE_FAILED, attempt.finished.explanation


def _research(night: Night, after_attempt: Callable[[], object]) -> Ending:
    conversation = _continue_or_start(night)
    while True:
        reserve_usd = night.model.worst_case_usd(
            conversation.system, conversation.tools, conversation.messages
        )
        if stop := _reason_to_stop(night, reserve_usd):
            return stop
        reply = _reply(night, conversation)
        if reply is None:
            conversation = _start(night, "the service no longer accepts the conversation")
        elif reply.tool_calls:
            night.idle_replies = 0
            conversation.add_assistant(reply.content)
            ending = _act(night, conversation, reply.tool_calls)
            after_attempt()
            if ending is not None:
                return ending
            if _conversation_tokens(reply) > night.lab.settings.researcher.max_conversation_tokens:
                conversation = _start(night, "the conversation reached its token ceiling")
        else:
            after, ending = _without_tool_calls(night, conversation, reply)
            if ending is not None:
                return ending
            conversation = after


def _reply(night: Night, conversation: Conversation) -> Reply | None:
    """The model's reply, on record; none when the service rejects this history for good."""
    try:
        reply = night.model.reply(conversation.system, conversation.tools, conversation.messages)
    except ModelError as error:
        if error.history_rejected and len(conversation.messages) > 1:
            _notice(night, "history_rejected", error.message)
            return None
        raise
    night.lab.ledger.append(
        ModelCalled(
            conversation=conversation.number,
            model=reply.model,
            request_id=reply.request_id,
            stop_reason=reply.stop_reason,
            usage=reply.usage,
            cost_usd=reply.cost_usd,
            seconds=reply.seconds,
        )
    )
    return reply


def _act(night: Night, conversation: Conversation, calls: list[ToolCall]) -> Ending | None:
    """Do what a reply asks for, in its order, and answer every call."""
    results: list[dict[str, Any]] = []
    ending: Ending | None = None
    for call in calls:
        if ending is None and call.name == "run":
            ending = _reason_to_stop(night, 0.0)
        if ending is not None:
            results.append(tool_result(call.id, "not done: the session is over", is_error=True))
            continue
        finished = _do(night, call, results)
        if finished is not None:
            ending = StopReason.FINISHED, finished
    if guidance := night.words.new_guidance():
        results.append({"type": "text", "text": guidance})
    conversation.add_user(results)
    return ending


def _do(night: Night, call: ToolCall, results: list[dict[str, Any]]) -> str | None:
    ledger = night.lab.ledger
    ledger.append(
        ToolCalled(call_id=call.id, name=call.name, input=ledger.put_blob(_json(call.input)))
    )
    result = night.toolbox.call(call.name, call.input)
    ledger.append(
        ToolReturned(
            call_id=call.id,
            name=call.name,
            is_error=result.is_error,
            output=ledger.put_blob(result.text.encode()),
        )
    )
    results.append(tool_result(call.id, result.text, is_error=result.is_error))
    return result.finished


def _without_tool_calls(
    night: Night, conversation: Conversation, reply: Reply
) -> tuple[Conversation, Ending | None]:
    """Go on after a reply that asks for nothing; see the stop reasons of the Messages API."""
    match reply.stop_reason:
        case "refusal":
            return _after_refusal(night, reply, conversation)
        case "model_context_window_exceeded":
            return _start(night, "the context window was full"), None
        case "max_tokens":
            words = night.words.cut_reply()
        case _:
            if reply.content:
                conversation.add_assistant(reply.content)
            words = night.words.nudge()
    night.idle_replies += 1
    if night.idle_replies > MAX_IDLE_REPLIES:
        text = f"{MAX_IDLE_REPLIES} reminders did not bring a tool call"
        return conversation, (StopReason.AGENT_IDLE, text)
    _notice(night, "nudge", f"reply ended with {reply.stop_reason} and no tool call")
    conversation.add_user([{"type": "text", "text": words}])
    return conversation, None


def _after_refusal(
    night: Night, reply: Reply, conversation: Conversation
) -> tuple[Conversation, Ending | None]:
    night.refusals += 1
    _notice(night, "refusal", reply.explanation or "the model refused without a reason")
    if night.refusals >= MAX_REFUSALS:
        text = f"the model refused {MAX_REFUSALS} times; go on with --researcher tpe"
        return conversation, (StopReason.REFUSED, text)
    return _start(night, "the model refused"), None


def _continue_or_start(night: Night) -> Conversation:
    conversation = Conversation.last(night.lab.ledger)
    if conversation is None:
        return _start(night, "the session began")
    if conversation.researcher != night.model.name:
        return _start(night, "another researcher took over")
    if conversation.messages[-1]["role"] == "assistant":
        conversation.add_user(_answers_after_a_crash(night, conversation.orphans()))
    return conversation


def _answers_after_a_crash(night: Night, orphans: list[str]) -> list[dict[str, Any]]:
    """What the calls of the last reply came to, as far as the ledger knows; else a nudge."""
    ledger = night.lab.ledger
    returned = {
        entry.event.call_id: entry.event
        for entry in ledger.entries
        if isinstance(entry.event, ToolReturned)
    }
    answers = []
    for call_id in orphans:
        if (done := returned.get(call_id)) is not None:
            text, is_error = ledger.get_blob(done.output).decode(), done.is_error
        else:
            text, is_error = INTERRUPTED_CALL, True
        answers.append(tool_result(call_id, text, is_error=is_error))
    return answers or [{"type": "text", "text": night.words.nudge()}]


def _start(night: Night, reason: str) -> Conversation:
    return Conversation.start(
        night.lab.ledger,
        researcher=night.model.name,
        system=night.words.system(),
        tools=night.toolbox.schemas(),
        brief=night.words.brief(),
        reason=reason,
    )


def _reason_to_stop(night: Night, reserve_usd: float | None) -> Ending | None:
    return reason_to_stop(night.history, night.lab.settings.session, reserve_usd=reserve_usd)


def _score_holdout(night: Night) -> None:
    """Score baseline and best on the split that decided nothing, once, when there is a gain."""
    baseline, best = night.history.baseline, night.history.best
    if baseline is None or best is None or best is baseline:
        return
    for attempt in (baseline, best):
        if not attempt.values("holdout"):
            score_holdout(night.lab, attempt)


def _notice(night: Night, kind: str, explanation: str) -> None:
    night.lab.ledger.append(Noticed(kind=kind, explanation=explanation))


def tool_result(call_id: str, text: str, *, is_error: bool) -> dict[str, Any]:
    """An answer to one tool call, as the Messages API wants it."""
    return {"type": "tool_result", "tool_use_id": call_id, "content": text, "is_error": is_error}


def _conversation_tokens(reply: Reply) -> int:
    usage = reply.usage
    return usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
