"""Looks at a checkout: what trains, prints, is needed.

Nothing of it is run. Each finding carries its reason, and what could not be found says how to give
it; `begin_program` writes both down as a program to start from.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from agent.candidate.knob_places import COMPILED
from agent.candidate.knobs import find_knobs
from agent.candidate.own_files import files_of, git_lists, is_in_repository
from agent.candidate.seeds import GIVEN, PINNED
from agent.program import has_settings
from agent.record.reported import LikelyScore, likely_scores, read_reported
from agent.settings import DataFolder, Goal
from agent.text import one_line
from sandbox.contract.errors import UsageError
from sandbox.contract.reading import MAX_SCRIPT_BYTES, read_named
from sandbox.contract.run import Log
from sandbox.image.requirements import read_asked

MAX_FILES = 2000
NEWLINE = b"\n"
LARGE_BYTES = 2**20
"""Of what git ignores, so much is taken for data and not for leavings."""
IN_THE_IMAGE = {"torch", "numpy"}
REQUIREMENTS = ("uv.lock", "requirements.txt", "pyproject.toml")
OTHER_REQUIREMENTS = ("environment.yml", "setup.py")
A_VALUE = "1.5"
"""Stands for whatever a program would print there."""
LEAVINGS = re.compile(
    r"(^|/)([._]|(out(put)?s?([-_.][^/]*)?|results?|checkpoints?|ckpts?|wandb|mlruns|\w*logs?)(/|$))"
    r"|venv|runs/?$|cache|\.(pt|pth|ckpt|log)$"
)
"""What earlier trainings and tools left, which is no data."""
MORE_IS_BETTER = re.compile(
    r"acc|f1|auc|bleu|r2|reward|score|speedup|throughput|flops|bandwidth", re.IGNORECASE
)
NO_ENTRY = re.compile(r"^(setup|conftest|prepare|download|sample|generate|bench|plot|test|eval)")
TRAINS = re.compile(r"\.backward\(|\.fit\(|optimizer|trainer|\.train\(|epoch", re.IGNORECASE)
# What is searched is of any length, and `re` cannot be interrupted: each repeat that
# could begin at many places has a bound.
COMMAND = re.compile(
    r"(?:python3?|uv run|torchrun|accelerate launch)\s[^\n`#|&;]{0,300}?\.py[^\n`#|&;]{0,1000}"
)
TIME_BUDGET = re.compile(
    rb"^\w{0,40}?(?:TIME_BUDGET|MAX_SECONDS|TIME_LIMIT)\w{0,40}[ \t]{0,40}=[ \t]{0,40}(\d{1,9})\b",
    re.MULTILINE,
)
ENDLESS = re.compile(rb"\bwhile[ \t]{1,9}(?:True|1)[ \t]{0,9}:|\bitertools\.count\(")
SEED_OPTION = re.compile(rb"""add_argument\([^)]{0,300}?["'](--[\w-]{0,40}seed)["']""")
TO_FILL_IN = re.compile(r"<[^<>]{1,100}>|\bpath/to\b|\byour[_-]", re.IGNORECASE)
"""What a README leaves to its reader."""
CACHE = re.compile(
    r"""expanduser\(\s{0,40}["']~/?["']\s{0,40}\)((?:\s{0,40},\s{0,40}["'][\w./-]{1,200}["']){1,9})"""
    r"""|Path\.home\(\)((?:\s{0,40}/\s{0,40}["'][\w./-]{1,200}["']){1,9})"""
    r"""|["']~/([\w./-]{1,200})["']"""
)
DATASET = re.compile(
    r"""datasets\.\w{1,40}\(\s{0,40}(?:root\s{0,40}=\s{0,40})?["']([\w./-]{1,200})["']"""
)
PRINTS = re.compile(
    r"print|^(?:info|write|log|echo|set_description)$|log_?(?:info|main|rank)|_info$"
)
NO_COMPILER = (
    "the image has no compiler: name one with base_image; or ziglang in a requirements.txt, and "
    "python3 -m ziglang cc (or c++) in command"
)
FRAMEWORKS = {
    ("transformers", "Trainer("): "{'train_runtime': 1.5, 'train_loss': 1.5}",
    ("transformers", "trainer.evaluate("): "{'eval_loss': 1.5}",
    ("transformers", "eval_strategy"): "{'eval_loss': 1.5}",
    ("transformers", "evaluation_strategy"): "{'eval_loss': 1.5}",
    ("keras", ".fit("): "loss: 1.5 - val_loss: 1.5",
}
"""What frameworks print of themselves, where a file has these words."""

PROSE = """# Tonight's program

This file is yours: what stands here in words is handed to the researcher as it is. Say what the
number means, what may be changed, and what must stay as it is: the code that measures and prints
it, above all."""
FENCE = 'kind = "fence"'
LIMITS = """memory = "{half}g"  # half of this machine's
cpus = {cores}
pids = 512
tmp = "{half}g"  # the program's own directory, a throw-away copy, and caches; counts as memory
shm = "1g"
output = "1g"
output_files = 256
open_files = 4096
log = "1m\""""


@dataclass(frozen=True)
class Line:
    """One finding: a setting with its reason, or a comment where there is no setting to give."""

    table: str
    setting: str
    """`name = value`; empty for a reason alone."""
    reason: str
    is_missing: bool = False
    """Whether the person has to give it."""


def look_at(place: Path, home: Path) -> list[Line] | None:
    """What a directory of somebody's holds for a night; None where nothing in it could train.

    Args:
        place: the directory.
        home: of the person, where programs keep caches.
    """
    sources = sources_of(place, files_of(place))
    readme = "".join(
        path.read_text(errors="replace")[:200_000] for path in sorted(place.glob("README*"))[:2]
    ).replace("\\\n", " ")
    entry = _entry(sources, readme)
    if not (entry and (entry in readme or TRAINS.search(sources[entry].decode(errors="replace")))):
        compiled = list(_compiled(place))
        if compiled or entry is None:
            return compiled or None
    own = [entry, *_imported(entry, sources)]
    configured = list(_configured(place, sources)) if b"hydra" in sources[entry] else []
    own += dict.fromkeys(module for _, module in configured if module not in own)
    named = list(dict.fromkeys(name for name, _ in configured))
    code = {name: sources[name] for name in own}
    return [
        *_goal(code),
        *_workspace(place, entry, code, readme, named),
        *_budget(code),
        *_data(place, code, home),
        *_hardware(place, code),
    ]


def sources_of(place: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Python files of a checkout, by name, but those of the size of data."""
    return {
        name: read_named(place / name, MAX_SCRIPT_BYTES)
        for name in names[:MAX_FILES]
        if name.endswith(".py") and (place / name).stat().st_size < MAX_SCRIPT_BYTES
    }


def _entry(sources: Mapping[str, bytes], readme: str) -> str | None:
    """The script that most likely trains."""
    said = [word for found in COMMAND.findall(readme) for word in found.split() if ".py" in word]

    def points(name: str) -> tuple[float, int]:
        path, code = PurePosixPath(name), sources[name].decode(errors="replace")
        worth = 4.0 * (path.name == "train.py") + 2 * ("train" in path.stem)
        worth += 2 * ("__main__" in code) + 2 * bool(TRAINS.search(code))
        worth += 3 * (name in said) + (path.stem in ("main", "run"))
        worth -= 6 * (not _does_something(sources[name]))
        worth -= 6 * bool(NO_ENTRY.match(path.stem)) + 6 * ("tests" in path.parts)
        # Of several alike the one that a README names first, then the one nearest to the top.
        return worth - len(path.parts) / 2, -said.index(name) if name in said else -len(said)

    ranked = sorted(sources, key=points, reverse=True)
    return ranked[0] if ranked and points(ranked[0])[0] >= 1 else None


def _compiled(place: Path) -> Iterator[Line]:
    """What a checkout in C or C++ holds: a program that is built and measures."""
    sources = {
        name: read_named(place / name, MAX_SCRIPT_BYTES).decode(errors="replace")
        for name in files_of(place)[:MAX_FILES]
        if name.endswith(COMPILED) and (place / name).stat().st_size < MAX_SCRIPT_BYTES
    }
    mains = [name for name, code in sources.items() if re.search(r"\bmain\s{0,9}\(", code)]
    if not mains:
        return
    # Of several that which measures, by its name, then the one nearest to the top.
    entry = min(
        mains, key=lambda name: (not re.search("bench|train|perf", name), name.count("/"), name)
    )
    stem, build = PurePosixPath(entry).stem, place / "CMakeLists.txt"
    if build.is_file():
        text = read_named(build).decode(errors="replace")
        target = re.search(rf"add_executable\(\s{{0,9}}([\w.-]{{1,99}})[^)]{{0,999}}{stem}\.", text)
        made = target[1] if target else stem
        make = "cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build "
        make, program = f"{make}--target {made}", f"./build/{made}"
    elif (place / "Makefile").is_file():
        make, program = "make", f"./{stem}"
    else:
        compiler = "cc" if entry.endswith(".c") else "c++"
        make = f"{compiler} -O3 -march=native {shlex.quote(entry)} -lm -o program"
        program = "./program"
    # Into a pipe C keeps what it prints until a buffer is full: of a program that is cut, for ever.
    command = f"{make} && stdbuf -oL {program}"
    yield from _scored([line for code in sources.values() for line in _formats(code)])
    yield Line("workspace", 'path = "."', "this directory; what .gitignore names stays out")
    words = _quoted(["sh", "-c", command])
    yield Line("workspace", f"command = {words}", "builds what seems to measure, and runs it")
    parts = [name for name in sources if name not in mains][:16]
    knobs = sum(len(find_knobs(name, sources[name].encode())) for name in parts or [entry])
    text = (
        "the programs measure and stay as they are" if parts else "it measures too: say what stays"
    )
    line = f"editable = {_quoted(parts or [entry])}"
    yield Line("workspace", line, f"{text}; {knobs} knobs for the sampler", not parts)
    yield Line("hardware", "", NO_COMPILER, True)
    yield from _budget({})


def _formats(code: str) -> Iterator[str]:
    """The lines that C or C++ would print, with a number for each value."""
    for row in code.split("\n"):
        if "printf" in row or "cout" in row:
            texts = re.findall(r'"((?:[^"\\]|\\.){0,300})"', row[:2000])
            shown = A_VALUE.join(texts) if "cout" in row else "".join(texts)
            shown = re.sub(r"%[-+ #0-9.*]{0,9}[hlzL]{0,2}[diufFeEgG]", A_VALUE, shown)
            yield from f"{shown}{A_VALUE if 'cout' in row else ''}".split("\\n")


def _imported(entry: str, sources: Mapping[str, bytes]) -> list[str]:
    """The checkout's own modules that a script imports, and those that they do."""
    found: list[str] = []
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for module in _imports(sources[name]):
            path = module.replace(".", "/")
            beside = str(PurePosixPath(entry).parent)
            for base in {"", f"{beside}/" if beside != "." else ""}:
                for file in (f"{base}{path}.py", f"{base}{path}/__init__.py"):
                    if file in sources and file not in (*found, entry):
                        found.append(file)
                        waiting.append(file)
    return found


def _imports(code: bytes) -> Iterator[str]:
    """Modules that a file imports whatever it goes on to do."""
    for node in _tree(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _does_something(code: bytes) -> bool:
    """Whether a file is a script, and not only definitions."""
    acts = (ast.Expr, ast.For, ast.While, ast.If, ast.With)
    return any(
        isinstance(node, acts) and not isinstance(getattr(node, "value", None), ast.Constant)
        for node in _tree(code)
    )


def _tree(code: bytes) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def nodes_of(code: bytes) -> list[ast.AST]:
    """All of a file's syntax; nothing of one that is no Python."""
    return [node for statement in _tree(code) for node in ast.walk(statement)]


def _printed(code: bytes) -> Iterator[str]:
    """The lines that a script's calls would print, with a number for each value."""
    for node in nodes_of(code):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            own = getattr(getattr(node.func, "value", None), "id", "")
            with contextlib.suppress(RecursionError):  # a sum of thousands is no print
                shown = " ".join(map(_shown, node.args))
                if own == "self" and name == "log":  # Lightning's, which it shows in a table
                    yield f"{shown.split(' ')[0]} \u2502 {A_VALUE}"
                elif PRINTS.search(name):
                    yield from shown.split("\n")


def _shown(node: ast.expr) -> str:
    """How an argument of a print would look."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_shown, parts))
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="format")):
            return re.sub(r"\{[^{}]*\}", A_VALUE, text)
        case ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Mod()):
            return re.sub(r"%[-+0-9.]*[dfgeis]", A_VALUE, text).replace("%%", "%")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _shown(left) + _shown(right)
    return A_VALUE


def _goal(code: dict[str, bytes]) -> Iterator[Line]:
    """How the score is printed; the entry's own lines come last, and so first."""
    lines = [line for name in reversed(code) for line in _printed(code[name])]
    texts = [content.decode(errors="replace") for content in code.values()]
    for words, line in FRAMEWORKS.items():
        lines += [line for text in texts if all(word in text for word in words)]
    yield from _scored(lines)


def _scored(lines: Sequence[str]) -> Iterator[Line]:
    found = likely_scores(lines)
    if not found:
        yield Line("goal", 'metric = "loss"', "no print of a score was found: name yours", True)
        text = "say how it is printed: `nightlab try` names lines that look like it"
        yield Line("goal", "# pattern = 'loss ([\\d.]+)'", text, True)
    else:
        yield from _metric(found[0], lines)
        for other in found[1:]:
            yield Line("goal", f"# {other.setting}", f"also printed: `{other.line}`")
    yield Line("goal", 'source = "reported"', "the program's own word counts")


def _metric(best: LikelyScore, lines: Sequence[str]) -> Iterator[Line]:
    name = re.sub(r"^[^A-Za-z]+", "", re.sub(r"[^A-Za-z0-9_./@-]+", "_", best.name))
    name = name.strip("_")[:64]
    yield Line("goal", f'metric = "{name}"', f"printed as `{best.line}`")
    is_plain = read_reported(
        Log(head="\n".join(lines), tail="", omitted_bytes=0), Goal(metric=name, source="reported")
    )
    if is_plain.value is None:
        best = replace(best, pattern=best.pattern.replace(re.escape(A_VALUE), r"\S*"))
        yield Line("goal", best.setting, "reads it, anywhere in a line; the last")
    direction = "maximize" if MORE_IS_BETTER.search(best.name) else "minimize"
    yield Line("goal", f'direction = "{direction}"', f"by the name {name}: check it")


def _configured(place: Path, sources: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Configurations of Hydra that name a module of the checkout's own, each with that module."""
    for name in files_of(place)[:MAX_FILES]:
        if not name.endswith((".yaml", ".yml")) or "tests" in PurePosixPath(name).parts:
            continue
        text = read_named(place / name, MAX_SCRIPT_BYTES).decode(errors="replace")
        for target in re.findall(r"\b_target_: ?([\w.]{1,200})\.\w", text):
            if (module := f"{target.replace('.', '/')}.py") in sources:
                yield name, module


def _workspace(
    place: Path, entry: str, code: Mapping[str, bytes], readme: str, configured: Sequence[str]
) -> Iterator[Line]:
    words, reason = _command(entry, readme)
    folder = entry.rpartition("/")[0]
    if folder and any(not name.startswith(f"{folder}/") for name in code):
        words = ["env", "PYTHONPATH=.", *words]  # it imports from the top, where Python looks not
    settable = SEED_OPTION.search(code[entry])
    pins = [
        f"{name}:{1 + text[: found.start()].count(NEWLINE)}"
        for name, text in code.items()
        if (found := PINNED.search(text))
    ]
    seed = ""
    if any(GIVEN in text for text in code.values()):
        seed = "it reads NIGHTLAB_SEED"
    elif settable:
        words, seed = [*words, f"{settable[1].decode()}={{seed}}"], "each run gets one of its own"
    elif configured and "seed" in code[entry].decode(errors="replace"):
        words, seed = [*words, "seed={seed}"], "Hydra's way to give a seed"
    yield Line("workspace", 'path = "."', "this directory; what .gitignore names stays out")
    yield Line("workspace", f"command = {_quoted(words)}", "; ".join(filter(None, (reason, seed))))
    if left := [word for word in words if TO_FILL_IN.search(word)]:
        text = f"README leaves {', '.join(left[:3])} to you: write it into command"
        yield Line("workspace", "", text, True)
    if not seed:
        where = f"{pins[0]} pins one" if pins else "no seed was found"
        text = (
            f'seed: {where}. Draw it from int(os.environ["NIGHTLAB_SEED"]), or say under [noise] '
            "smallest_gain what counts: else nothing is kept"
        )
        yield Line("workspace", "", text, True)
    named = [word for word in words if (place / word).is_file() and word != entry]
    editable = [
        entry,
        *(word for word in named if word.endswith((".py", ".yaml", ".yml", ".json", ".toml"))),
        *configured[:12],
    ]
    others = [name for name in code if name not in editable]
    knobs = sum(len(find_knobs(name, (place / name).read_bytes())) for name in editable)
    text = (
        f"{knobs} knobs for the sampler: see `nightlab knobs`" if knobs else "no knobs were found"
    )
    yield Line("workspace", f"editable = {_quoted(editable)}", text)
    if others:
        text = f"imported, and read-only unless you name them: {', '.join(others[:8])}"
        yield Line("workspace", "", text)


def _command(entry: str, readme: str) -> tuple[list[str], str]:
    """The README's own call of a script, for a CPU where it has one; else the script alone."""
    calls = []
    for found in COMMAND.findall(readme):
        try:
            words = shlex.split(found)
        except ValueError:
            continue
        if entry in words:
            calls.append(["python3", entry, *words[words.index(entry) + 1 :]])
    best = next((call for call in calls if "cpu" in " ".join(call)), calls[0] if calls else None)
    return (best, "as README calls it") if best else (["python3", entry], "what seems to train")


def _budget(code: Mapping[str, bytes]) -> Iterator[Line]:
    for name, text in code.items():
        if found := TIME_BUDGET.search(text):
            seconds = int(found[1])
            yield Line("budget", FENCE, f"{name} has a budget of its own")
            room = max(60, seconds)
            reason = (
                f"{name} trains for {seconds} s by itself; {room} s for start-up and evaluation"
            )
            yield Line("budget", f"seconds = {seconds + room}", reason)
            return
    yield Line("budget", 'kind = "cut"', "the last score that it printed by then counts")
    endless = next((name for name, text in code.items() if ENDLESS.search(text)), None)
    if endless is None:
        why = "what ends by itself is as good beside other work; take both out if time ends it"
        yield Line("disturbance", "max_other_cores = 1000\nmin_speed = 0", why)
    why = f"{endless} has a loop without an end" if endless else "how long it takes was not found"
    yield Line("budget", "seconds = 300", f"{why}: so much each training gets")


def _data(place: Path, code: Mapping[str, bytes], home: Path) -> Iterator[Line]:
    """Folders that git ignores, caches below home, data sets that would be downloaded."""
    seen = set[PurePosixPath]()
    for name in sorted(_ignored(place)):
        size = _size(place / name)
        if size >= LARGE_BYTES or PurePosixPath(name).parts[0].startswith("data"):
            reason = f"git ignores it; {size / 2**20:,.1f} MiB"
            yield from _shown_folder(name, place / name, reason, seen, name)
    decoded = {name: content.decode(errors="replace") for name, content in code.items()}
    for name, text in decoded.items():
        for found in CACHE.finditer(text):
            parts = re.findall(r"[\w./-]+", found[1] or found[2] or found[3])
            at = "/".join(parts).rstrip("/")
            yield from _shown_folder(f"~/{at}", home / at, f"{name} looks there", seen)
        for found in DATASET.finditer(text):
            given = os.path.normpath(found[1])
            # The box's own directory lies in its home, as a checkout does in a folder.
            at = f"~/{given[3:]}" if given.startswith("../") else given
            yield from _shown_folder(
                at, place / given, f"{name} loads a data set from there", seen, given
            )
    if any("download=True" in text or "load_dataset(" in text for text in decoded.values()):
        text = "it downloads, and a box has no network: run it here once, then name the folder"
        yield Line("data", "", text, True)


def _shown_folder(
    at: str, path: Path, reason: str, seen: set[PurePosixPath], given: str = ""
) -> Iterator[Line]:
    try:
        folder = DataFolder.model_validate({"from": given or at, "at": at})
    except ValidationError:
        yield Line("data", "", f"{reason}: {at}, which no box can show there", True)
        return
    # Of two folders, one in the other, the box shows one: that which was found first.
    where = folder.place
    if any(where.is_relative_to(one) or one.is_relative_to(where) for one in seen):
        return
    seen.add(where)
    line = f"from = {_quoted(given or at)}\nat = {_quoted(at)}"
    is_here = path.exists()
    reason += "" if is_here else "; it is not here yet: make it, then take the # away"
    yield Line("data", line, reason, not is_here)


def _hardware(place: Path, code: Mapping[str, bytes]) -> Iterator[Line]:
    missing = sorted(_foreign(code, files_of(place)[:MAX_FILES]) - IN_THE_IMAGE)
    if not missing:
        return
    text = f"the image of torch and numpy lacks what is imported: {', '.join(missing)}"
    for name in REQUIREMENTS:
        if not (place / name).is_file():
            continue
        try:
            is_any = bool(read_asked(place, name).requirements)
        except UsageError as error:
            text += f"; {error.message}"
            continue
        if is_any:
            yield Line("hardware", f"requirements = {_quoted(name)}", f"{text}; set-up installs it")
            return
    files = [name for name in OTHER_REQUIREMENTS if (place / name).is_file()]
    text += f" (see {', '.join(files)})" if files else ""
    cure = 'name packages in a requirements.txt, and here: requirements = "requirements.txt"'
    yield Line("hardware", "", f"{text}; {cure}", True)


def modules_asked(
    sources: Mapping[str, bytes], files: Iterable[str], command: Sequence[str]
) -> tuple[list[str], list[str]] | None:
    """A command's script with its own modules, and what they import of others whatever they do.

    None where the command names no script of these sources.
    """
    named = [*command, *(f"{word.replace('.', '/')}.py" for word in command)]  # after -m
    entry = next((word for word in named if word in sources), None)
    if entry is None:
        return None
    code = {name: sources[name] for name in (entry, *_imported(entry, sources))}
    return list(code), sorted(_foreign(code, files))


def _foreign(code: Mapping[str, bytes], files: Iterable[str]) -> set[str]:
    """Packages that code imports and neither it nor the standard library has."""
    beside = (PurePosixPath(name) for name in code)
    own = {part for path in beside for part in path.with_suffix("").parts}
    # Wherever they lie: a script may make any folder one of those that Python looks in.
    own |= {part.removesuffix(".py") for name in files for part in PurePosixPath(name).parts}
    modules = [module for text in code.values() for module in _imports(text)]
    asked = {module.split(".")[0] for module in modules}
    asked |= {"tensorboard"} if any("torch.utils.tensorboard" in one for one in modules) else set()
    return asked - own - set(sys.stdlib_module_names)


def _ignored(place: Path) -> list[str]:
    """Files and folders that git ignores, whole folders by their name."""
    if not is_in_repository(place):
        return []
    listed = git_lists(place, "--others", "--ignored", "--exclude-standard", "--directory")
    # Beside files of git's in one folder: that folder, since what git has stays where it is.
    data = (name for name in listed if not LEAVINGS.search(name))
    return list(dict.fromkeys(name.rpartition("/")[0] or name for name in data))[:50]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    found = (Path(parent, name) for parent, _, names in os.walk(path) for name in names)
    return sum(one.stat().st_size for one in found if one.is_file())


def begin_program(place: Path, home: Path, profile: str) -> tuple[Path, list[Line]] | None:
    """Write a program for what a checkout holds; None where it has one, or nothing that trains.

    A program.md without settings is somebody's prose: it stays, and goes into nightlab.md whole.
    """
    own, beside = place / "program.md", place / "nightlab.md"
    prose = read_named(own).decode(errors="replace") if own.is_file() else ""
    if beside.exists() or has_settings(prose):
        return None
    lines = look_at(place, home)
    if lines is None:
        return None
    target = beside if prose else own
    target.write_text(_program_text(lines, prose or PROSE, profile), encoding="utf-8")
    return target, lines


def _program_text(lines: Sequence[Line], prose: str, profile: str) -> str:
    """Prose, and settings with the reason of each."""
    tables: dict[str, list[str]] = {"goal": [], "workspace": [], "budget": []}
    for line in lines:
        tables.setdefault(line.table, []).extend(_written(line))
    half = max(1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**31)
    tables["budget"].append("grace_seconds = 60")
    tables["limits"] = LIMITS.format(half=half, cores=os.cpu_count() or 1).split("\n")
    tables["session"] = ["attempts = 100", "hours = 8.0", "max_failures_in_a_row = 5"]
    tables.setdefault("hardware", []).append(f'profile = "{profile}"')
    body = "\n\n".join(
        "\n".join(rows if name == "data" else [f"[{name}]", *rows]) for name, rows in tables.items()
    )
    return f"{prose.rstrip()}\n\n```toml\n{body}\n```\n"


def _quoted(words: str | Sequence[str]) -> str:
    """As toml has it, whose texts and lists are written as JSON's."""
    return json.dumps(words, ensure_ascii=False)


def _written(line: Line) -> list[str]:
    """A finding as lines of toml; what the person has to give is marked."""
    mark = "MISSING: " if line.is_missing else ""
    reason = one_line(f"{mark}{line.reason}", 300)
    if line.table == "data" and line.setting:
        rows = [f"# {reason}", "[[data]]", *line.setting.split("\n")]
        return [f"# {row}" if line.is_missing and n else row for n, row in enumerate(rows)]
    return [f"# {reason}", *([line.setting] if line.setting else [])]
