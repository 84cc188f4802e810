"""Where people keep numbers to turn: code, options, configuration files.

What is found has a name, a literal on one line, and what stands behind it there. Numbers that are
no knobs by their names (ids, seeds, evaluation, bookkeeping) are left out with the reason.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

CONFIGURATION = (".yaml", ".yml", ".json", ".toml")
COMPILED = (".c", ".cc", ".cpp", ".cxx", ".h", ".hpp", ".cu")
WITH_KNOBS = (".py", *CONFIGURATION, *COMPILED)
NO_KNOBS = {
    "a seed is another draw and no idea": r"seed|random_state",
    "it measures, or says when": r"eval\w*|valid\w*|val|test\w*|best|metric\w*|interval|every",
    "it is an address or a name": r"ports?|ids?|path|dir|host|url|version|year|world|\w+al_rank",
    "it is about the machine": r"workers?|devices?|gpus?|cpus?|threads?|nodes?",
    "it is about what is shown or saved": r"log(s|g\w+|dir)?|(print|save|plot|fig)\w*|dpi|verbose",
    "data or task set it": r"classes|num_labels|vocab\w*|image|channels_in|features",
    "it keeps something from zero": r"eps|epsilon|tol|tolerance|min",
    "it is the budget": r"budget|timeout|time|seconds|minutes|flops",
    "it is where counting begins": r"start|iter_num|offset|count",
}
_PATTERNS = {
    reason: re.compile(rf"(?:^|[._-])(?:{words})(?:$|[._-])", re.IGNORECASE)
    for reason, words in NO_KNOBS.items()
}
_RATE = re.compile(r"(?:^|[._-])(?:lr|learning_rate)$", re.IGNORECASE)
"""A knob whatever stands before it: peak_lr, min_lr, start_lr."""
_LENGTH = re.compile(
    r"(?:^|\.)(?:max_|num_|n_)?(?:epochs?|steps|iters|iterations|updates)$", re.IGNORECASE
)
WHOLE_ARGUMENTS = re.compile(
    r"hidden|width|depth|layer|head|embd|embed|batch|epoch|steps|iters|estimators|leaves|units|rank"
)
"""Whole numbers of a call are turned only by such a name: most are axes, strides and kinds."""
OPTIONS = ("add_argument", "option", "Option", "add_option")
# A model writes what is searched, and `re` cannot be interrupted: no two repeats that could share
# what they match stand side by side, here and in `knobs`, and no long line is looked at.
_DIGITS = r"[0-9](?:_?[0-9]){0,30}"
NUMBER = rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]{{1,4}})?"
MAX_LINE_BYTES = 1000
HUGE = 1e15
"""No number that could be turned: beyond it a step of one is lost."""
_ENTRY = re.compile(rf"(\s*)(?:- )?[\"']?([\w./-]+)[\"']?\s*[:=]\s*({NUMBER})\s*(?:,\s*)?(#.*)?$")
_OPENS = re.compile(r"(\s*)[\"']?([\w./-]+)[\"']?\s*[:=]\s*(?:[{&]\w*\s*|\w+\s*)?(?:#.*)?$")
_CONSTANT = re.compile(
    rf"\s{{0,99}}(?:#[ \t]{{0,9}}define\s{{1,9}}(\w{{1,99}})\s{{1,99}}"
    rf"|(?:static\s{{1,9}})?const(?:expr)?\s{{1,9}}\w{{1,40}}\s{{1,9}}(\w{{1,99}})\s{{0,9}}=\s{{0,9}})"
    rf"({NUMBER})[fuUlL]{{0,3}}\s{{0,9}};?\s{{0,99}}(?:/[/*]\s{{0,9}}(.{{0,300}}?)\s{{0,9}}(?:\*/)?\s{{0,9}})?$"
)
"""A constant of C or C++ on a line of its own, and what its comment says."""
_TABLE = re.compile(r"\s*\[([\w.-]+)\]")


@dataclass(frozen=True)
class NumberPlace:
    """A number that somebody gave a name to."""

    name: str
    value: int | float
    line: int
    start: int
    end: int
    """Bytes of the line between which it stands."""
    remark: str


def why_no_knob(name: str) -> str:
    """Why a number of that name is not turned; empty where it is."""
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("DEVICE_BATCH", "BATCH")
    if _LENGTH.search(spelled):
        return "more of it is more time: a range in a comment, such as [10..30], turns it"
    if _RATE.search(spelled):
        return ""
    return next((why for why, words in _PATTERNS.items() if words.search(spelled)), "")


def number_places(file: str, source: bytes) -> list[NumberPlace]:
    """The numbers of a file that have a name of their own, in its order; of a name twice, none."""
    suffix = PurePath(file).suffix
    if suffix in CONFIGURATION:
        found = list(_in_configuration(source))
    elif suffix in COMPILED:
        found = list(_in_compiled(source))
    else:
        found = list(_in_code(source))
    times = Counter(place.name for place in found)
    unique = [place for place in found if times[place.name] == 1 and abs(place.value) < HUGE]
    return sorted(unique, key=lambda place: (place.line, place.start))


def _in_code(source: bytes) -> Iterator[NumberPlace]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = source.splitlines()
    for name, node in _named(tree):
        literal = node.operand if isinstance(node, ast.UnaryOp) else node
        is_number = isinstance(literal, ast.Constant) and type(literal.value) in (int, float)
        if not is_number or node.lineno != node.end_lineno or node.lineno > len(lines):
            continue
        line, end = lines[node.lineno - 1], node.end_col_offset or 0
        if len(line) > MAX_LINE_BYTES:
            continue
        try:
            value = ast.literal_eval(line[node.col_offset : end].decode())
        except (SyntaxError, ValueError):  # offsets count UTF-8, and a file may be otherwise
            continue
        remark = re.fullmatch(r"[\s,)\]}]*(#.*)?", line[end:].decode("utf-8", "replace"))
        said = (remark[1] or "") if remark else ""
        yield NumberPlace(name, value, node.lineno, node.col_offset, end, said)


def _named(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Expressions that have a name: variables, fields, options, entries, arguments."""
    for statement in tree.body:
        yield from _assigned("", statement)
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef():
                for statement in node.body:
                    yield from _assigned(f"{node.name}.", statement)
            case ast.FunctionDef(args=arguments) if arguments.defaults:
                given = [*arguments.posonlyargs, *arguments.args]
                given = given[len(given) - len(arguments.defaults) :]
                for one, default in zip(given, arguments.defaults, strict=True):
                    yield f"{node.name}.{one.arg}", default
            case ast.Call():
                yield from _arguments(node)
        # What a script sets where it begins.
        test = getattr(node, "test", None)
        if (
            isinstance(node, ast.If)
            and getattr(getattr(test, "left", None), "id", "") == "__name__"
        ):
            for statement in node.body:
                yield from _assigned("", statement)
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            for statement in node.body:
                yield from _assigned("main.", statement)


def _assigned(prefix: str, statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield from _entries(prefix + name, value)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield from _entries(prefix + name, value)


def _entries(name: str, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """A value, or what a dictionary has of them; of a condition, what holds if nothing is given."""
    if isinstance(value, ast.IfExp):
        value = value.orelse
    if not isinstance(value, ast.Dict):
        yield name, value
        return
    for key, item in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield from _entries(f"{name}.{key.value}", item)


def _arguments(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if called in OPTIONS:
        flags = [a.value for a in call.args if isinstance(a, ast.Constant)]
        long = max((flag for flag in flags if isinstance(flag, str)), key=len, default="")
        default = next((k.value for k in call.keywords if k.arg == "default"), None)
        if long and default is not None:
            yield long.lstrip("-").replace("-", "_"), default
        return
    for keyword in call.keywords:
        is_whole = isinstance(keyword.value, ast.Constant) and type(keyword.value.value) is int
        if keyword.arg and (not is_whole or WHOLE_ARGUMENTS.search(keyword.arg)):
            yield f"{called}.{keyword.arg}", keyword.value


def _in_configuration(source: bytes) -> Iterator[NumberPlace]:
    """Entries of YAML, JSON or TOML that have a line of their own, named by those around them."""
    above: list[tuple[int, str]] = []
    table = ""
    for number, raw in enumerate(source.splitlines(), start=1):
        line = raw.decode("latin-1")  # so that characters count as bytes do
        if len(line) > MAX_LINE_BYTES:
            continue
        if found := _TABLE.match(line):
            table = f"{found[1]}."
        elif found := _ENTRY.match(line):
            above = [(depth, name) for depth, name in above if depth < len(found[1])]
            name = table + ".".join([*(name for _, name in above), found[2]])
            text = found[3].replace("_", "")
            value = int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else float(text)
            yield NumberPlace(name, value, number, found.start(3), found.end(3), found[4] or "")
        elif found := _OPENS.match(line):
            above = [(depth, name) for depth, name in above if depth < len(found[1])]
            above.append((len(found[1]), found[2]))


def _in_compiled(source: bytes) -> Iterator[NumberPlace]:
    for number, raw in enumerate(source.splitlines(), start=1):
        line = raw.decode("latin-1")  # so that characters count as bytes do
        if len(line) <= MAX_LINE_BYTES and (found := _CONSTANT.match(line)):
            is_whole = re.fullmatch(r"[-+]?[0-9]+", found[3])
            value = int(found[3]) if is_whole else float(found[3].replace("_", ""))
            remark = f"# {found[4] or ''}"
            name = found[1] or found[2]
            yield NumberPlace(name, value, number, found.start(3), found.end(3), remark)
