"""Asks a model once before anything is measured.

What a set-up gets wrong (a key, an address, a model that calls no tools, a window that is too
small) shows in one real call with the night's own prompt and tools, and not after an hour of
baselines. What it costs goes on the night's bill, and what it wrote into the cache is the night's.
"""

import json
from collections.abc import Callable

from agent.night.asking import called
from agent.night.budget import reason_for_no_call
from agent.record.events import ModelCalled, StopReason
from agent.record.history import History
from agent.researcher.api_errors import NEW_CONVERSATION
from agent.researcher.arguments import INVALID_JSON, calls_in_words, schemas
from agent.researcher.base import CallFailed, Model, ModelError, Prompt, Reply
from agent.researcher.prompt import FIRST_QUESTION, system_prompt
from agent.researcher.providers import WITHOUT_A_KEY
from agent.researcher.wire import CUT_SHORT
from agent.settings import Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError

WAITS_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before each try; a service that is away for longer is waited for at night."""
MOST_CALL_SECONDS = 900.0
MOST_BYTES_PER_TOKEN = 10
"""Of any text in any model's tokens; who counts fewer tokens has not read it all."""
CHECK_SETTINGS = f"Check [researcher] in program.md and ANTHROPIC_BASE_URL. {WITHOUT_A_KEY}"
BEFORE_THE_NIGHT = 0
"""The number of no conversation."""


def first_call(
    model: Model,
    settings: Settings,
    prose: str,
    spent: History,
    pay: Callable[[ModelCalled], None],
    sleep: Callable[[float], None],
) -> None:
    """Ask for one tool call, as long as the session's limits allow it.

    Args:
        model: who is asked.
        settings: of the session.
        prose: of program.md.
        spent: what the session has spent, with what `pay` takes.
        pay: takes what each call costs, also that of one which failed.
        sleep: waits between two tries.

    Raises:
        UsageError: a night with this model could not work; it says what to change.
    """
    question = {"role": "user", "content": [{"type": "text", "text": FIRST_QUESTION}]}
    prompt = Prompt(system_prompt(prose, settings), schemas(), [question])

    def may_ask() -> bool:
        return reason_for_no_call(spent, settings.session, model.worst_case(prompt)) is None

    why = ""
    for _ in range(2):
        reply = _asked(model, prompt, may_ask, pay, sleep)
        if reply is None:
            return
        _check(reply, prompt, settings, model.name)
        if reply.stop_reason == "refusal":
            return
        if any(INVALID_JSON not in call.input for call in reply.tool_calls):
            return
        said = one_line(" ".join(b["text"] for b in reply.content if b["type"] == "text"), 120)
        why = calls_in_words(reply.content) or f", and said: {said or 'nothing'}"
        if reply.tool_calls:
            why = " whose input is one JSON object"
    raise UsageError(
        f"{model.name} was asked twice for a tool call and made none{why}",
        "take a model and a server that call tools, or --researcher tpe",
    )


def _asked(
    model: Model,
    prompt: Prompt,
    may_ask: Callable[[], bool],
    pay: Callable[[ModelCalled], None],
    sleep: Callable[[float], None],
) -> Reply | None:
    """The reply; None where the service is away for a while, or a limit allows no call."""
    for wait_seconds in WAITS_SECONDS:
        if not may_ask():
            return None  # which the night says itself, before its first call
        sleep(wait_seconds)
        try:
            reply = model.reply(prompt, MOST_CALL_SECONDS)
        except CallFailed as failed:
            if failed.lost is not None:
                pay(ModelCalled.lost(BEFORE_THE_NIGHT, **vars(failed.lost)))
            if not isinstance(final := failed.final, ModelError):
                raise final from failed
            is_last = wait_seconds == WAITS_SECONDS[-1]
            if final.reason is not StopReason.API_OUTAGE and (
                failed.retry_after_seconds is None or is_last
            ):
                hint = CHECK_SETTINGS if final.hint == NEW_CONVERSATION else final.hint
                raise UsageError(final.message, hint) from failed
            continue
        pay(called(BEFORE_THE_NIGHT, reply))
        return reply
    return None


def _check(reply: Reply, prompt: Prompt, settings: Settings, name: str) -> None:
    usage, most = reply.usage, settings.researcher.max_output_tokens
    if reply.stop_reason in CUT_SHORT - {"refusal"}:
        raise UsageError(
            f"{name} could not end its first reply ({reply.stop_reason}) in {most} tokens",
            "raise max_output_tokens (program.md; at a resume --max-output-tokens), or the "
            "server's context window",
        )
    if usage.estimated and settings.session.usd is not None:
        raise UsageError(
            f"{name}'s service counts no tokens, so usd cannot be kept",
            "leave usd out of program.md and --usd; tokens and calls bound a night as well",
        )
    read = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
    sent = len(prompt.system) + len(json.dumps(prompt.tools))
    if read * MOST_BYTES_PER_TOKEN < sent:
        raise UsageError(
            f"{name}'s server counts {read} tokens in a prompt of {sent} characters: it cuts it",
            "raise its context window (Ollama: OLLAMA_CONTEXT_LENGTH, llama.cpp: --ctx-size, "
            "vLLM: --max-model-len)",
        )
