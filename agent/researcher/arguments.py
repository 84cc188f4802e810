"""What each tool takes, as models are told of it."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.text import one_line

MAX_HYPOTHESIS_CHARACTERS = 500
INVALID_JSON = "INVALID_JSON"
"""The one argument of a call whose input was no JSON object; holds what it was instead."""

Selection = Literal["best", "recent", "failed", "attempt"]

FilePath = Annotated[
    str, Field(max_length=1024, description="relative to the workspace, such as train.py")
]
KnobName = Annotated[str, Field(max_length=100)]
Text = Annotated[str, Field(max_length=256 * 1024)]


class Arguments(BaseModel):
    """What a tool takes; nothing is converted, nothing unknown is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Read(Arguments):
    """Read a file with numbered lines. Long files come in parts: give view_range."""

    file_path: FilePath
    view_range: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last line, from 1; -1 as the last is the end of the file"
    )


class Write(Arguments):
    """Replace an editable file as a whole. Use edit for anything but a rewrite."""

    file_path: FilePath
    content: Text


class Edit(Arguments):
    """Replace a piece of an editable file. old_string must be there exactly once, blanks included;
    take it from read without the line numbers."""

    file_path: FilePath
    old_string: Annotated[Text, Field(min_length=1)]
    new_string: Text
    replace_all: bool = Field(False, description="replace every place instead of the only one")


class Delete(Arguments):
    """Remove an editable file. An attempt that is not kept brings it back."""

    file_path: FilePath


class Rename(Arguments):
    """Move an editable file to a path that is editable too and where nothing lies."""

    file_path: FilePath
    new_path: FilePath


class ListFiles(Arguments):
    """List the workspace's files, their sizes, and which of them you may write."""

    path: FilePath = Field("", description="a directory; empty for the whole workspace")


class Search(Arguments):
    """Find lines that hold a text, in one file or in all."""

    pattern: Annotated[str, Field(min_length=1, max_length=500)]
    path: FilePath = Field("", description="a file or a directory; empty for the whole workspace")


class Run(Arguments):
    """Train the workspace's files as they are now, score and judge them. Takes the whole training
    budget, or less if the training can no longer win. Afterwards the workspace holds the best
    files: yours if they were kept, else those from before your changes, so make every further
    change against them. Files that were tried before are not run again: you get the old result."""

    hypothesis: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_HYPOTHESIS_CHARACTERS,
            pattern=r"\S",
            description="what changed and why the score should improve, in a sentence or two",
        ),
    ]
    smoke: bool = Field(
        False,
        description="only train for a few seconds and load the checkpoint, to see whether the "
        "files run at all; judges nothing, counts as no attempt, leaves the workspace as it is",
    )


class ShowHistory(Arguments):
    """Look at this session's attempts: the best, the most recent, those that failed, or one of
    them with its diff and the end of its log."""

    select: Selection = "recent"
    limit: Annotated[int, Field(ge=1, le=30)] = 10
    attempt: Annotated[int, Field(ge=0)] | None = Field(
        None, description='number of the attempt to show, with select = "attempt"'
    )


class Suggest(Arguments):
    """Ask a sampler (TPE) that knows every attempt for the next values of the module-level knobs.
    Take its point, parts of it, or none of it."""


class Sweep(Arguments):
    """Hand a few attempts to the sampler: it turns module-level knobs of the best files, runs, and
    learns from each. Costs a whole training budget per attempt. Run or undo your own changes
    first."""

    attempts: Annotated[int, Field(ge=1, le=8, description="how many trainings")]
    knobs: Annotated[list[KnobName], Field(max_length=32)] = Field(
        [], description="names of the knobs to turn, such as LEARNING_RATE; empty for all"
    )


class Finish(Arguments):
    """End the session before its limits do. Only when nothing is left that is worth a run."""

    reason: Annotated[str, Field(min_length=1, max_length=500, pattern=r"\S")]


TOOLS: dict[str, type[Arguments]] = {
    "read": Read,
    "write": Write,
    "edit": Edit,
    "delete": Delete,
    "rename": Rename,
    "list": ListFiles,
    "search": Search,
    "run": Run,
    "history": ShowHistory,
    "suggest": Suggest,
    "sweep": Sweep,
    "finish": Finish,
}
"""In the order in which a model is told of them; a cached prompt depends on it."""

CALL_IN_WORDS = re.compile(
    r"<\|?/?tool_?call|<function|\[TOOL_CALLS\]|to=functions\.|"
    r"[\"'](name|function|tool)[\"']\s*:\s*[\"'](" + "|".join(TOOLS) + r")[\"']",
    re.IGNORECASE,
)
"""How models write a call that a server would have had to parse."""


class ToolRefused(Exception):
    """The call cannot be done as it was asked; becomes an error result."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def schemas() -> list[dict[str, Any]]:
    """The tools in the Messages API's form, always in the same order and the same bytes."""
    return [
        {
            "name": name,
            "description": " ".join((arguments.__doc__ or "").split()),
            "input_schema": _schema(arguments),
        }
        for name, arguments in TOOLS.items()
    ]


def parsed(name: str, arguments: dict[str, Any]) -> Arguments:
    """The call that a model asks for.

    Raises:
        ToolRefused: there is no such tool, or it takes something else.
    """
    tool = TOOLS.get(name)
    if tool is None:
        message = f"there is no tool {one_line(name, 60)}"
        raise ToolRefused("unknown_tool", message, f"tools: {', '.join(TOOLS)}")
    if INVALID_JSON in arguments:
        hint = f"send one JSON object with {', '.join(tool.model_fields) or 'nothing in it'}"
        raise ToolRefused("bad_json", f"what {name} was given is not one JSON object", hint)
    fields = tool.model_fields
    # Null is how many servers' models leave an argument out.
    optional = {key for key, field in fields.items() if not field.is_required()}
    given = {k: v for k, v in arguments.items() if v is not None or k not in optional}
    try:
        return tool.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [
            f"{one_line('.'.join(map(str, d['loc'])) or name, 60)}: {one_line(d['msg'], 160)}"
            for d in details[:5]
        ]
        hint = f"{name} takes {', '.join(tool.model_fields) or 'no arguments'}"
        raise ToolRefused("bad_arguments", "; ".join(problems), hint) from None


def calls_in_words(content: list[dict[str, Any]]) -> str:
    """What to add where a reply's text holds what should have been a call; nothing for others."""
    texts = [block["text"] for block in content if block["type"] == "text"]
    if not any(CALL_IN_WORDS.search(text) for text in texts):
        return ""
    return (
        ": the server does not parse tool calls, which come as text. Switch it on there (vLLM: "
        "--enable-auto-tool-choice --tool-call-parser NAME; llama.cpp: --jinja)"
    )


def _schema(arguments: type[Arguments]) -> dict[str, Any]:
    schema = arguments.model_json_schema()
    properties = {key: _plain(value) for key, value in schema["properties"].items()}
    return {
        "type": "object",
        "properties": properties,
        "required": schema.get("required", []),
        "additionalProperties": False,
    }


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without titles, and without null for what may be left out instead."""
    # Every byte here is paid for in every call of the night.
    if "anyOf" in field:
        field = {**field.pop("anyOf")[0], **field}
    return {
        key: value
        for key, value in field.items()
        if key != "title" and not (key == "default" and value is None)
    }
