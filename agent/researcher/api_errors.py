"""What a service error means: wait, or stop, and why.

Errors before a stream begins come from the SDK; after its first byte they reach us raw, and a
cloud's client raises errors of that cloud's own library.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from anthropic import APIConnectionError, APIStatusError

from agent.record.events import StopReason
from agent.researcher.base import ModelError
from agent.researcher.providers import WITHOUT_A_KEY, Provider
from agent.researcher.redaction import hidden
from agent.text import one_line

ERROR_CHARACTERS = 300
TRANSIENT_STATUSES = frozenset({408, 409, 429})
TRANSIENT_TYPES = frozenset(
    {
        *("overloaded_error", "api_error", "rate_limit_error", "timeout_error"),
        # What Bedrock calls them inside its streams.
        *("throttlingException", "serviceUnavailableException", "internalServerException"),
        *("modelTimeoutException", "modelStreamErrorException"),
    }
)
FINAL_TYPES = frozenset(
    {
        *("invalid_request_error", "authentication_error", "permission_error", "not_found_error"),
        *("request_too_large", "billing_error", "validationException", "accessDeniedException"),
    }
)
"""Of an error event inside a stream: those that asking again does not mend."""
SPEND_CAPS = frozenset(
    {
        "enforced_spend_limit_reached",
        "contract_spend_limit_reached",
        "linked_organization_spend_limit_reached",
    }
)
"""Error codes that only the next month or a person changes, whatever their status says."""
NEW_CONVERSATION = "Go on with `nightlab resume NAME`: it opens a new conversation."
AGAIN = "A session goes on with `nightlab resume NAME --researcher claude`."
OTHER_MODEL = "Take another model: in program.md, or `nightlab resume NAME --model OTHER`."
CREDENTIALS: dict[Provider, str] = {
    "anthropic": "ANTHROPIC_API_KEY",
    "bedrock": "the AWS credentials and AWS_REGION",
    "vertex": "Google's application default credentials, CLOUD_ML_REGION and "
    "ANTHROPIC_VERTEX_PROJECT_ID",
}
ADDRESSES: dict[Provider, str] = {
    "anthropic": "ANTHROPIC_BASE_URL",
    "bedrock": "AWS_REGION",
    "vertex": "CLOUD_ML_REGION",
}


REFUSED_WORDS = (
    (r"credit balance", f"The account has no credit: add some. {AGAIN} {WITHOUT_A_KEY}"),
    (
        r"(usage|spend(ing)?) limits?",
        f"The account's usage limit is reached: raise it, or wait. {AGAIN} {WITHOUT_A_KEY}",
    ),
    (
        r"prompt is too long|context (length|window)|maximum context",
        "Set max_conversation_tokens and max_output_tokens well below what the server's window "
        "holds: in program.md, or "
        "`nightlab resume NAME --max-conversation-tokens N --max-output-tokens M`.",
    ),
    (
        r"max_tokens",
        "Set max_output_tokens to what the server allows: in program.md, or "
        "`nightlab resume NAME --max-output-tokens N`.",
    ),
    (
        r"\btools?\b.*(support|allow|enable)|(support|allow|enable).*\btools?\b|tool.choice",
        "nightlab needs a model that calls tools: switch them on (vLLM: --enable-auto-tool-choice "
        f"--tool-call-parser NAME; llama.cpp: --jinja). {AGAIN} {OTHER_MODEL}",
    ),
    (
        r"thinking(?!` block)|output_config|effort",
        f'Set thinking = "off" in program.md for a new session. {OTHER_MODEL}',
    ),
)
"""What a refused request says of its reason, and what a person does about it."""


class StreamBroken(Exception):
    """A stream broke before its reply was whole; what came is told uncut, for `describe`."""


class CredentialsFailed(Exception):
    """A cloud's client found no credentials, or could not renew them.

    Args:
        explanation: what that client says.
        passes: whether it may find them later, as after an outage of whoever renews them.
    """

    def __init__(self, explanation: str, *, passes: bool) -> None:
        super().__init__(explanation)
        self.passes = passes


def is_transient(error: BaseException | None) -> bool:
    """Whether the same request may pass later."""
    if isinstance(error, APIStatusError):
        return _is_transient_status(error)
    if isinstance(error, APIConnectionError):
        return not isinstance(error.__cause__, httpx2.UnsupportedProtocol)
    if isinstance(error, CredentialsFailed):
        return error.passes
    # Errors after the first byte of a stream reach us raw.
    return isinstance(error, (StreamBroken, httpx2.RequestError))


def _is_transient_status(error: APIStatusError) -> bool:
    # Before anything else: these come as 429, and waiting all night would not lift them.
    if error.error_code in SPEND_CAPS:
        return False
    verdict = error.response.headers.get("x-should-retry")
    if verdict in ("true", "false"):
        return bool(verdict == "true")
    if error.status_code == 200:  # an error event inside a stream that had begun
        return error.type not in FINAL_TYPES
    if error.status_code == 400:  # our upload was cut
        return "unexpected end of data" in (error.api_message or "")
    return error.status_code in TRANSIENT_STATUSES or error.status_code >= 500


def may_be_ours(error: BaseException) -> bool:
    """Whether the service is at work and may fail over what it was asked, however often it is."""
    if isinstance(error, APIStatusError) and is_transient(error):
        return error.status_code == 500 or (
            error.status_code == 200 and error.type not in TRANSIENT_TYPES
        )
    return isinstance(error, StreamBroken)


def describe(error: BaseException | None, secrets: Sequence[str]) -> str:
    """One bounded line about an error, fit for a record: a server's text is not trusted.

    Args:
        error: what happened.
        secrets: what a service may repeat of what it was sent; they go before the text is cut,
            since half a key is one too.
    """
    if isinstance(error, APIStatusError):
        detail = error.api_message or error.message or "no message"
        text = f"{error.status_code} {error.error_code or error.type or 'error'}: {detail}"
    elif isinstance(error, StreamBroken | CredentialsFailed):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return one_line(hidden(text, secrets), ERROR_CHARACTERS)


def retry_after(error: BaseException) -> float | None:
    """Seconds to wait at least before the same request may pass; None when it never will."""
    if not is_transient(error):
        return None
    if isinstance(error, APIStatusError):
        return retry_after_seconds(error.response.headers, datetime.now(UTC))
    return 0.0


def retry_after_seconds(headers: Mapping[str, str], now: datetime) -> float:
    """How long a response asks to be left alone; 0 when it does not say."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    seconds = _number(value)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _number(text: str) -> float | None:
    """A non-negative finite number, if that is what `text` says."""
    digits = text.strip()  # which takes more off than float() does
    return float(digits) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", digits) else None


def final_error(error: BaseException, text: str, provider: Provider) -> ModelError:
    """What a session ends with once asking again does not help; `text` describes the error."""
    status = error.status_code if isinstance(error, APIStatusError) else 0
    if may_be_ours(error) and status != 500:
        return ModelError(
            StopReason.API_REFUSED,
            f"the model's service answers, but with nothing that can be used ({text})",
            f"See that {ADDRESSES[provider]} is a server that speaks the Messages API. {AGAIN}",
        )
    if is_transient(error):
        return ModelError(
            StopReason.API_OUTAGE,
            f"the model's service did not come back in time ({text})",
            "Go on with `nightlab resume NAME` when it answers again.",
        )
    return ModelError(
        StopReason.API_REFUSED,
        f"the model's service refused the request ({text})",
        _hint(error, status, provider),
        history_rejected=status in (200, 400, 413, 422),
    )


def unreachable(host: str, text: str, provider: Provider) -> ModelError:
    """What keeps a session from its beginning: nobody is where the model's service should be."""
    return ModelError(
        StopReason.API_OUTAGE,
        f"nobody answers at {one_line(host, 100)} ({text})",
        f"Check {ADDRESSES[provider]} and this machine's network. {WITHOUT_A_KEY}",
    )


def _hint(error: BaseException, status: int, provider: Provider) -> str:
    if isinstance(error, APIStatusError) and error.error_code in SPEND_CAPS:
        return f"The account's spend limit is reached: raise it. {AGAIN} {WITHOUT_A_KEY}"
    if status in (400, 422, 500):
        for words, cure in REFUSED_WORDS:
            if re.search(words, str(error), re.IGNORECASE | re.DOTALL):
                return cure
    check = f"Check {CREDENTIALS[provider]}."
    if isinstance(error, CredentialsFailed):
        return f"{check} {AGAIN} {WITHOUT_A_KEY}"
    hints = {
        0: f"Check {ADDRESSES[provider]}. {AGAIN}",
        401: f"{check} {AGAIN} {WITHOUT_A_KEY}",
        402: f"The account has no credit: add some. {AGAIN} {WITHOUT_A_KEY}",
        403: f"The account may not use this model. {check} {OTHER_MODEL} {WITHOUT_A_KEY}",
        404: f"Check the model's id, and {ADDRESSES[provider]}. {OTHER_MODEL}",
    }
    return hints.get(status, NEW_CONVERSATION)


def credential_errors(provider: Provider) -> tuple[type[BaseException], ...]:
    """What a cloud's client raises before it asks; only that cloud's library knows its own."""
    if provider == "bedrock":
        from botocore.exceptions import BotoCoreError

        return RuntimeError, ValueError, BotoCoreError
    if provider == "vertex":
        from google.auth.exceptions import GoogleAuthError

        return RuntimeError, ValueError, GoogleAuthError
    return ()


def credentials_failed(error: BaseException) -> CredentialsFailed:
    """One of `credential_errors` in words of ours."""
    # google-auth says what may pass; of botocore's errors it is those of the connection.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    passes = bool(getattr(error, "retryable", False)) or "HTTPClientError" in kinds
    return CredentialsFailed(f"{type(error).__name__}: {error}", passes=passes)
