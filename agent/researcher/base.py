"""The seam to whoever proposes: prompt in, reply out.

Behind `Model` stands a service far away (`claude`) or a sampler in this process (`tpe`). A model
answers once. Who asks it again, and for how long, is the night's to decide.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from agent.record.events import Reserve, StopReason, Usage
from sandbox.contract.errors import NightlabError


@dataclass(frozen=True)
class Prompt:
    """Everything that a model is asked with."""

    system: str
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class ToolCall:
    """One tool that the model asks for."""

    id: str
    name: str
    input: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One whole answer of a model."""

    content: list[dict[str, Any]]
    """The blocks as they came; they go back to the model unchanged."""
    tool_calls: list[ToolCall]
    """Empty where the reply was cut or refused: it may hold half a call."""
    stop_reason: str
    model: str
    usage: Usage
    cost_usd: float | None
    """None when the model's price is not known."""
    request_id: str | None
    seconds: float
    explanation: str = ""
    """Why the service refused, in its words."""


@dataclass(frozen=True)
class LostCall:
    """A stream that was cut: paid for, but no reply."""

    model: str
    request_id: str | None
    usage: Usage
    """Input as the service counted it; output estimated from what had arrived."""
    cost_usd: float | None
    seconds: float


class ModelError(NightlabError):
    """No reply can be had, and asking again does not help.

    Args:
        reason: how a session ends because of it.
        message: what happened.
        hint: what the user can do next.
        history_rejected: the request itself was refused, so a new conversation may pass.
    """

    usual_hint = "Go on with `nightlab resume NAME`."

    def __init__(
        self, reason: StopReason, message: str, hint: str, *, history_rejected: bool = False
    ) -> None:
        super().__init__(message, hint)
        self.reason = reason
        self.history_rejected = history_rejected


@dataclass(eq=False)
class CallFailed(Exception):
    """One call brought no reply."""

    error: str
    """What happened, on one bounded line without secrets."""
    final: BaseException
    """What to raise when nobody asks again; Ctrl-C stays Ctrl-C."""
    lost: LostCall | None
    """What has to be paid all the same, if anything."""
    retry_after_seconds: float | None
    """The least to wait before asking again; None when that does not help."""
    may_be_ours: bool = False
    """Whether it may be due to what was asked: a service that works, and no answer of use."""


class Model(Protocol):
    """Whatever decides what to try next."""

    @property
    def name(self) -> str:
        """Name for the record."""

    def reply(self, prompt: Prompt, seconds_left: float) -> Reply:
        """Answer once.

        Args:
            prompt: the whole conversation.
            seconds_left: the most that this call may take.

        Raises:
            CallFailed: no reply came of it this time.
            ModelError: no reply can be had.
        """

    def worst_case(self, prompt: Prompt) -> Reserve:
        """The most that this call can use."""
