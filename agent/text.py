"""Hostile text made safe to show: terminal, Markdown, prompt.

Whatever a model or a run wrote may hold escape sequences, direction overrides and zero-width
characters. Here they become visible signs, and every text has an end. HTML needs one step more,
which jinja2 does: its autoescape is on wherever nightlab renders HTML.
"""

import re

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # zero width, bidi, separators
    "\ud800-\udfff"  # lone surrogates cannot be written as UTF-8
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"  # tags and variation selectors: text that only a model reads
    "]"
)
_LINE_BREAK = re.compile(r"\r\n?")
_BLANK = re.compile(r"\s+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@$])")
_BACKTICKS = re.compile(r"`+")

_REASONS = {
    "not_better": "not better by enough",
    "did_not_hold": "the gain did not hold",
    "hidden_gain": "gain too small for its checks",
    "noise_unknown": "noise not known",
    "only_a_seed": "only the seed changed",
    "parent_dethroned": "built on what was refused",
    "answers_change": "answers depend on other rows",
    "looks_ahead": "looks ahead",
    "not_causal": "looks ahead",
    "holds_held_out_text": "carries held-out text",
    "literals_unread": "literals too large to read",
    "too_slow": "scoring too slow",
    "no_checkpoint": "no model was written",
    "failed": "ended with an error",
    "timed_out": "ran out of time",
    "api_outage": "the model's service was down",
}


def visible(text: str) -> str:
    """The text with every invisible or steering character as a sign; newlines and tabs stay.

    A carriage return becomes a line break, so nothing can be written over.
    """
    return _HIDDEN.sub(_sign, _LINE_BREAK.sub("\n", text))


def one_line(text: str, limit: int) -> str:
    """The visible text on one line, `limit` characters at most."""
    # Cut before as well as after: a megabyte of blanks must not be looked through for one line.
    return _head(_BLANK.sub(" ", visible(text[: 4 * limit + 64])).strip(), limit)


def in_words(reason: str) -> str:
    """A reason's code as a person reads it; a code that no table has loses its underscores."""
    return _REASONS.get(reason, one_line(reason, 60).replace("_", " "))


def labelled(metric: str, *, is_self_reported: bool) -> str:
    """A metric's name for a reader: whose word it is, where nobody checked the number."""
    return f"{metric} (self-reported)" if is_self_reported else metric


def for_terminal(text: str, limit: int) -> str:
    """The visible text for a terminal, its middle cut beyond `limit` characters.

    Console mark-up such as `[red]` is not touched: print the result as plain text.
    """
    return bounded(visible(text), limit)


def for_markdown(text: str, limit: int) -> str:
    """The text as one line of Markdown that renders as nothing but itself."""
    return _MARKDOWN.sub(r"\\\1", one_line(text, limit))


def fenced(text: str, limit: int) -> str:
    """The visible text in a Markdown fence that it cannot close."""
    body = bounded(visible(text), limit)
    longest = max((len(run) for run in _BACKTICKS.findall(body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{body}\n{fence}"


def bounded(text: str, limit: int) -> str:
    """At most `limit` characters of text, head and tail, with the cut named between them."""
    if len(text) <= limit:
        return text
    mark = f"\n[… {len(text) - limit} characters left out …]\n"
    head = max(0, (limit - len(mark)) // 2)
    tail = max(0, limit - len(mark) - head)
    return (text[:head] + mark + text[len(text) - tail :])[:limit]


def _head(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"


def _sign(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match.group()):04X}⟩"
