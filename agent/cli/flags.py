"""Arguments and flags that several commands take alike."""

from pathlib import Path
from typing import Annotated, Any

import typer

from agent.trackers.export import Tracker

PROGRAM, RUNS = Path("program.md"), Path("runs")

Session = Annotated[str, typer.Argument(help="name of the session")]
Program = Annotated[Path, typer.Option("--program", help="the person's file")]
Runs = Annotated[Path, typer.Option("--runs", help="where sessions are kept")]
IN_ALL = "in all: what was before a resume counts"
Attempts = Annotated[int | None, typer.Option("--attempts", help=f"stop after so many, {IN_ALL}")]
Hours = Annotated[float | None, typer.Option("--hours", help=f"stop after so many hours, {IN_ALL}")]
Usd = Annotated[float | None, typer.Option("--usd", help=f"stop before spending more, {IN_ALL}")]
Model = Annotated[
    str | None, typer.Option("--model", help="claude goes on as this one, at its list price")
]
Price = Annotated[
    Any,
    typer.Option(
        "--price",
        parser=lambda told: tuple(map(float, told.split(","))),
        metavar="USD",
        help="its own price per million tokens: INPUT,OUTPUT[,CACHE READ,CACHE WRITE]",
    ),
]
MostOutput = Annotated[
    int | None, typer.Option("--max-output-tokens", help="longest reply from here on")
]
MostConversation = Annotated[
    int | None, typer.Option("--max-conversation-tokens", help="longest conversation from here on")
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines for scripts")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="show nightlab's own log as well, on stderr")
]
Track = Annotated[
    Tracker | None, typer.Option("--track", help="also write metrics into this tracker's files")
]
TrackDir = Annotated[
    Path | None, typer.Option("--track-dir", help="where; runs/TRACKER if left out")
]
BaseImage = Annotated[str | None, typer.Option("--base-image", help="build on this image instead")]
Gpus = Annotated[
    str | None, typer.Option("--gpus", help="those to use, such as 0,2: indices or ids")
]
