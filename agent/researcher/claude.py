"""A language model behind the Messages API: one call, priced.

With `wire` and `api_errors` the only module that knows the SDK. A call is a stream that was opened
and read to its end with a stop reason; everything less is a call that failed, and may be paid for
all the same.
"""

import asyncio
import contextvars
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
from anthropic import (
    APIConnectionError,
    APIError,
    AsyncAnthropic,
    AsyncAnthropicBedrock,
    AsyncAnthropicVertex,
    AuthenticationError,
    NotFoundError,
)

from agent.record.events import Reserve, StopReason, Usage
from agent.researcher.api_errors import (
    ERROR_CHARACTERS,
    OTHER_MODEL,
    CredentialsFailed,
    StreamBroken,
    credential_errors,
    credentials_failed,
    describe,
    final_error,
    may_be_ours,
    retry_after,
    unreachable,
)
from agent.researcher.base import CallFailed, LostCall, ModelError, Prompt, Reply
from agent.researcher.providers import (
    CERTIFICATES,
    PROXIES,
    WITHOUT_A_KEY,
    Provider,
    base_url,
    cost_usd,
)
from agent.researcher.redaction import hidden, hidden_in, secrets_in
from agent.researcher.wire import Arrival, request_of, tool_calls, tool_ids
from agent.settings import ResearcherSettings
from agent.text import one_line

CONNECT_SECONDS = 5.0
CALL_SECONDS = 1800.0
"""Longest call: a stream that only pings is never silent, and never ends."""
OFFERED_MODELS = 20
RESERVED_BYTES_PER_TOKEN = 2
"""Estimates a request from above: real text has more bytes per token than this."""
SERVICE_ERRORS = (APIError, httpx2.HTTPError, StreamBroken, CredentialsFailed)
NOBODY_THERE = (httpx2.ConnectError, httpx2.UnsupportedProtocol)
"""Errors of an address where no service is: no such name, or a port that refuses."""

Client = AsyncAnthropic | AsyncAnthropicBedrock | AsyncAnthropicVertex


class ClaudeModel:
    """A model behind the Messages API or a compatible server.

    Args:
        name: its id.
        settings: whose service it is, how long its replies are, how much it thinks.
        environ: holds its credentials and maybe the address of a compatible server. Of the
            secrets in it, none is in any text that comes from here.
        clock: monotonic seconds.
        call_seconds: longest single call.
    """

    def __init__(
        self,
        name: str,
        settings: ResearcherSettings,
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self.name = name
        self._effort = None if settings.thinking == "off" else settings.effort
        self._own_price = settings.price_usd_per_million
        self._provider: Provider = settings.provider
        self._max_output_tokens = settings.max_output_tokens
        self._secrets = secrets_in(environ)
        self._clock = clock
        self._call_seconds = call_seconds
        self._runner = asyncio.Runner()
        self._closed = False
        try:
            self._client = _client(settings.provider, environ, settings.read_seconds)
        except Exception as error:  # of a cloud without a region, a proxy, a certificate's file
            self._runner.close()
            text = one_line(hidden(f"{error}", self._secrets), ERROR_CHARACTERS)
            read = CERTIFICATES if isinstance(error, OSError) else PROXIES
            names = sorted(name for name in environ if name.upper() in read and environ[name])
            check = f"Check {', '.join(names)}. " if names else ""
            raise ModelError(StopReason.API_REFUSED, text, f"{check}{WITHOUT_A_KEY}") from error

    def reply(self, prompt: Prompt, seconds_left: float) -> Reply:
        """Ask once; see `Model.reply`."""
        request = self._request(prompt)
        arrival, started = Arrival(self._clock), self._clock()
        received = self._receive(request, arrival, min(self._call_seconds, seconds_left))
        try:
            # Without a context of its own, every call would belong to the first one's span.
            self._runner.run(received, context=contextvars.copy_context())
            return self._whole(prompt, request, arrival, self._clock() - started)
        except BaseException as error:  # also Ctrl-C: what has arrived until then is paid for
            if not isinstance(error, Exception):
                self.close()  # a handler of our caller's own may leave the call half done in there
            seconds = self._clock() - started
            lost = self._lost(arrival, request, seconds)
            raise self._failed(error, lost, seconds, seconds_left) from error

    def worst_case(self, prompt: Prompt) -> Reserve:
        """The most that one call can use: nothing cached, all written, the longest answer."""
        worst = self._worst(self._request(prompt))
        tokens = worst.output_tokens + worst.cache_write_tokens
        return Reserve(calls=1, tokens=tokens, usd=self._cost_usd(worst), usage=worst)

    def facts(self, *, must_be_there: bool = False) -> dict[str, Any] | None:
        """What the service says of the model, such as its limits and when it retires.

        None where the service does not answer that question: compatible servers need not, and a
        session does not depend on it.

        Args:
            must_be_there: whether a service that cannot be reached at all is an error.

        Raises:
            ModelError: the service has no such model, or no longer, does not know the key, or is
                not there.
        """
        if not isinstance(self._client, AsyncAnthropic):
            return None
        try:
            facts, offered = self._runner.run(_ask_facts(self._client, self.name))
        except AuthenticationError as error:
            raise final_error(error, describe(error, self._secrets), self._provider) from error
        except APIConnectionError as error:
            if must_be_there and isinstance(cause := error.__cause__, NOBODY_THERE):
                text = describe(cause, self._secrets)
                raise unreachable(self._client.base_url.host, text, self._provider) from error
            return None
        except Exception:  # noqa: BLE001 - a catalogue of any form keeps no session from its work
            return None
        if facts is None and (not offered or self.name in offered):
            return None
        if facts is None or facts.get("lifecycle") == "retired":
            names = [one_line(hidden(name, self._secrets), 60) for name in offered]
            raise _unavailable(self.name, names, retired=facts is not None)
        if isinstance(most := facts.get("max_tokens"), int) and most > 0:
            self._max_output_tokens = min(self._max_output_tokens, most)
        said: dict[str, Any] = self._hidden(facts)
        return said

    def close(self) -> None:
        """Close connections and the event loop."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    async def _receive(self, request: dict[str, Any], arrival: Arrival, seconds: float) -> None:
        # Only an event loop ends a call at its time: a stream that pings keeps a read from
        # timing out, and the SDK shows no pings.
        async with asyncio.timeout(seconds):
            async with await self._client.messages.create(**request, stream=True) as stream:
                await arrival.read(stream)

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        return request_of(prompt, self.name, self._max_output_tokens, self._effort)

    def _cost_usd(self, usage: Usage, model: str | None = None) -> float | None:
        """What `usage` costs with the model that answered, or with the one that was asked."""
        names = (self.name,) if model is None else (model, self.name)
        prices = (cost_usd(n, usage, provider=self._provider, own=self._own_price) for n in names)
        return next((price for price in prices if price is not None), None)

    def _worst(self, request: dict[str, Any]) -> Usage:
        return Usage(
            input_tokens=0,
            output_tokens=self._max_output_tokens,
            cache_read_tokens=0,
            cache_write_tokens=-(-_size_bytes(request) // RESERVED_BYTES_PER_TOKEN),
        )

    def _whole(
        self, prompt: Prompt, request: dict[str, Any], arrival: Arrival, seconds: float
    ) -> Reply:
        # Signed thinking that repeats a secret is refused later: a new conversation, no leak.
        content = self._hidden(arrival.content(tool_ids(prompt.messages)))
        stop_reason = self._hidden(arrival.stop_reason)
        usage, details = arrival.usage(_size_bytes(request)), arrival.stop_details
        model = arrival.model if isinstance(arrival.model, str) else None
        refusal = "" if details is None else json.dumps(details, ensure_ascii=False)
        return Reply(
            content=content,
            tool_calls=tool_calls(content, stop_reason),
            stop_reason=stop_reason,
            model=self._hidden(model or self.name),
            usage=usage,
            cost_usd=self._cost_usd(usage, model),
            request_id=self._hidden(arrival.request_id),
            seconds=seconds,
            explanation=one_line(self._hidden(refusal), ERROR_CHARACTERS),
        )

    def _failed(
        self, error: BaseException, lost: LostCall | None, seconds: float, seconds_left: float
    ) -> CallFailed:
        """What to make of an error, and what the service charges for the call nevertheless."""
        if isinstance(error, TimeoutError):
            error = StreamBroken(f"the reply did not end in {self._call_seconds:.0f} s")
        elif isinstance(error, credential_errors(self._provider)):
            error = credentials_failed(error)
        elif isinstance(error, Exception) and not isinstance(error, SERVICE_ERRORS):
            # Whatever a server sends, the night does not end with a traceback.
            error = StreamBroken(f"the answer could not be read ({type(error).__name__}: {error})")
        text = describe(error, self._secrets)
        if not isinstance(error, Exception):
            return CallFailed(text, error, lost, None)
        if seconds >= seconds_left:  # whatever broke it off
            ending = "the session's time ended during a model call"
            return CallFailed(text, ModelError(StopReason.HOURS, ending, ""), lost, None)
        final = final_error(error, text, self._provider)
        return CallFailed(text, final, lost, retry_after(error), may_be_ours(error))

    def _lost(self, arrival: Arrival, request: dict[str, Any], seconds: float) -> LostCall | None:
        usage = arrival.lost_usage(self._worst(request))
        if usage is None:
            return None
        told = self._hidden(arrival.request_id)
        return LostCall(self.name, told, usage, self._cost_usd(usage), seconds)

    def _hidden(self, told: Any) -> Any:
        return hidden_in(told, self._secrets)


def _size_bytes(request: dict[str, Any]) -> int:
    return len(json.dumps(request, ensure_ascii=False).encode())


def _client(provider: Provider, environ: Mapping[str, str], read_seconds: float) -> Client:
    # Proxies and certificates that cannot work fail here, and not in a client that is half made.
    httpx2.AsyncClient()
    timeout = httpx2.Timeout(read_seconds, connect=CONNECT_SECONDS)
    # No retries of the SDK's own: it obeys `retry-after` without a limit, and never repeats a
    # stream that was cut. The clouds' clients read addresses and keys from variables of their own.
    if provider == "bedrock":
        return AsyncAnthropicBedrock(max_retries=0, timeout=timeout)
    if provider == "vertex":
        return AsyncAnthropicVertex(max_retries=0, timeout=timeout)
    key = environ.get("ANTHROPIC_API_KEY") or None
    return AsyncAnthropic(
        api_key=key,
        # Both at once are an error; the key wins, as in the SDK.
        auth_token=None if key else environ.get("ANTHROPIC_AUTH_TOKEN"),
        base_url=base_url(environ),
        max_retries=0,
        timeout=timeout,
    )


async def _ask_facts(client: AsyncAnthropic, model: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What the service says of a model, and what it offers instead if that one is not there."""
    try:
        found = await client.models.retrieve(model)
    except NotFoundError:
        return None, await _offered(client)
    facts: dict[str, Any] = json.loads(found.to_json(warnings=False))
    if facts.get("type") != "model" or "lifecycle" not in facts:
        return None, []  # not the service's own: other catalogues say little of what is served
    return facts, await _offered(client) if facts.get("lifecycle") == "retired" else []


async def _offered(client: AsyncAnthropic) -> list[str]:
    """Models that the service offers; none where it has no such list."""
    try:
        page = await client.models.list(limit=1000)
    except NotFoundError:
        return []
    lives = [(str(one.id), one.lifecycle) for one in page.data if one.type == "model"]
    return [name for name, life in lives if isinstance(life, str) and life != "retired"]


def _unavailable(model: str, offered: list[str], *, retired: bool) -> ModelError:
    what = f"{model} is retired" if retired else f"the model's service knows no {model}"
    names = f"It offers {', '.join(offered[:OFFERED_MODELS])}. " if offered else ""
    hint = f"{names}{OTHER_MODEL} {WITHOUT_A_KEY}"
    return ModelError(StopReason.API_REFUSED, one_line(what, ERROR_CHARACTERS), hint)
