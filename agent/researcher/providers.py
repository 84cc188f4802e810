"""Who serves a model: credentials, prices, retirement.

No SDK here: a command that only asks whether there is a key must not wait for one to be imported.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import genai_prices

from agent.record.events import Usage
from agent.text import one_line

Provider = Literal["anthropic", "bedrock", "vertex"]
PRICE_LISTS: dict[Provider, str] = {"anthropic": "anthropic", "bedrock": "aws", "vertex": "google"}
"""What the price library calls each provider."""
CLOUDS: dict[Provider, tuple[tuple[str, ...], str]] = {
    "bedrock": (("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"), "botocore"),
    "vertex": (("CLOUD_ML_REGION",), "google.auth"),
}
"""Variables that give a region, and the library that the client of that cloud needs."""
HOST = re.compile(r"([^@\s]*@)?([^@:/\s\[\]]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?")
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""These two: variables that the HTTP library reads by itself."""
HEADER_VALUE = re.compile(r"[!-~]*")
"""What a key may consist of: visible ASCII."""
WITHOUT_A_KEY = "Or go on without a key: --researcher tpe."


def base_url(environ: Mapping[str, str]) -> str | None:
    """The service's address as the SDK wants it, which is without `/v1`; None for its own.

    Raises:
        ValueError: it is no address of a web server; the message does not show it.
    """
    told = environ.get("ANTHROPIC_BASE_URL", "").strip()
    if not told:
        return None
    if "://" not in told:
        is_near = re.match(r"(localhost|\[?[0-9a-f.:]+\]?$|[^/]*:\d)", told)
        told = f"{'http' if is_near else 'https'}://{told}"
    parts = urlsplit(told)
    if parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.netloc):
        raise ValueError("ANTHROPIC_BASE_URL is no address such as http://127.0.0.1:4000")
    if parts.query or parts.fragment:
        raise ValueError("ANTHROPIC_BASE_URL holds a ? or a #, which no path can follow")
    path = re.sub(r"(/v1(/messages)?)+$", "", parts.path.rstrip("/"))
    return parts._replace(path=path).geturl()


def check_credentials(
    environ: Mapping[str, str], *, provider: Provider = "anthropic"
) -> str | None:
    """What to tell a user whose environment has no credentials; None when it has some.

    The clouds' own credentials come from many places; their clients look for them. What can be
    seen from here is a region and the library that signs requests.
    """
    if provider != "anthropic":
        return _missing_for_cloud(environ, provider)
    if environ.get("ANTHROPIC_API_KEY") or environ.get("ANTHROPIC_AUTH_TOKEN"):
        return None
    return (
        "The claude researcher needs ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN), "
        "and neither is set."
    )


def unusable_credentials(
    environ: Mapping[str, str], *, provider: Provider = "anthropic"
) -> str | None:
    """What is wrong with credentials that no request could carry; None when nothing is."""
    if provider != "anthropic":
        return None
    name = "ANTHROPIC_API_KEY" if environ.get("ANTHROPIC_API_KEY") else "ANTHROPIC_AUTH_TOKEN"
    if HEADER_VALUE.fullmatch(environ.get(name, "")):
        return None
    return f"{name} holds a blank, a line break or a sign that is not ASCII: copy it once more"


def _missing_for_cloud(environ: Mapping[str, str], provider: Provider) -> str | None:
    variables, library = CLOUDS[provider]
    if not any(environ.get(variable) for variable in variables):
        return f"{provider} needs a region: set {variables[0]}."
    if not _is_installed(library):
        return f"{provider} needs {library}: pip install 'nightlab[{provider}]'."
    return None


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def retirement(facts: Mapping[str, Any], session_end: datetime) -> str | None:
    """What a person should know whose model is on its way out; None when it is not.

    Args:
        facts: what the service says of the model; nothing in them is trusted to be there.
        session_end: when the session ends at the latest.
    """
    name, retires_at = one_line(str(facts.get("id")), 80), _date(facts.get("retires_at"))
    on = "" if retires_at is None else f" and retires on {retires_at:%Y-%m-%d}"
    if retires_at is not None and retires_at <= session_end:
        return f"{name} retires at {retires_at:%Y-%m-%d %H:%M} UTC, before this session has to end"
    if facts.get("lifecycle") == "deprecated":
        return f"{name} is deprecated{on}: choose another model soon"
    return None


def _date(text: object) -> datetime | None:
    try:
        date = datetime.fromisoformat(str(text))
        return date.astimezone(UTC) if date.tzinfo else date.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def price_known(model: str, *, provider: Provider = "anthropic", own: Sequence[float] = ()) -> bool:
    """Whether a money limit can be kept with this model."""
    nothing = Usage(input_tokens=0, output_tokens=0, cache_read_tokens=0, cache_write_tokens=0)
    return cost_usd(model, nothing, provider=provider, own=own) is not None


def cost_usd(
    model: str, usage: Usage, *, provider: Provider = "anthropic", own: Sequence[float] = ()
) -> float | None:
    """List price of `usage`; None for a model without a known price, or where nobody counted.

    Every cache write is a one-hour write, since `ClaudeModel` asks for no other.

    Args:
        model: its id.
        usage: what was counted.
        provider: whose list.
        own: `price_usd_per_million` of the settings, which goes before any list.
    """
    if usage.estimated:
        return None
    if own:
        of_input, of_output, of_read, of_write = (*own, own[0], own[0])[:4]
        return (
            usage.input_tokens * of_input
            + usage.output_tokens * of_output
            + usage.cache_read_tokens * of_read
            + usage.cache_write_tokens * of_write
        ) / 1e6
    counted = genai_prices.Usage(
        # The library's input includes what was read from and written to the cache.
        input_tokens=usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_tokens,
    )
    try:
        price = genai_prices.calc_price(counted, model, provider_id=PRICE_LISTS[provider])
    except LookupError:
        return None
    return float(price.total_price)
