"""Tests of workspace/train.py that need no torch: what its text promises."""

import ast
import re
import sys
from pathlib import Path

import pytest

from agent.candidate.knobs import Choices, find_knobs
from agent.machine.setup import copy_template
from agent.program import load_program
from sandbox.contract.errors import SandboxError
from sandbox.image.profiles import find_profile, known_profiles

PROGRAM = Path(__file__).parents[2] / "workspace" / "train.py"
TEXT = PROGRAM.read_text()
TREE = ast.parse(TEXT)
NUMBER = r"-?[0-9_.]+"
INTERVAL = re.compile(rf"\[({NUMBER})\.\.({NUMBER})( log)?\]$")
CHOICES = re.compile(r"\{([^{}]+)\}$")
FIXED = re.compile(r"  # fixed\b|; fixed$")


def literals() -> dict[str, tuple[object, str]]:
    """Every module-level NAME = literal, with its line."""
    lines = TEXT.splitlines()
    return {
        target.id: (ast.literal_eval(node.value), lines[node.lineno - 1])
        for node in TREE.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


KNOBS = {name: found for name, found in literals().items() if not FIXED.search(found[1])}


def test_the_file_is_at_most_430_lines() -> None:
    assert len(TEXT.splitlines()) <= 430


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_has_a_meaning_and_lies_in_its_range(name: str) -> None:
    value, line = KNOBS[name]
    comment = line.split("  # ", maxsplit=1)[1]
    assert len(comment.split()) > 3
    assert isinstance(value, int | float)
    if interval := INTERVAL.search(comment):
        low, high = float(interval[1]), float(interval[2])
        assert low <= value <= high
        assert low < high
        assert low > 0 or not interval[3]
    else:
        choices = CHOICES.search(comment)
        assert choices is not None
        assert str(value) in [choice.strip() for choice in choices[1].split(",")]


def test_there_are_knobs_for_shape_rates_and_schedule() -> None:
    assert {"DEPTH", "WIDTH", "BATCH", "BIGRAM_ROWS", "MATRIX_RATE", "WARMDOWN"} <= set(KNOBS)


def test_importing_it_does_nothing_but_define() -> None:
    harmless = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
    docstring, *statements, last = TREE.body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(statement, harmless) for statement in statements)
    assert isinstance(last, ast.If)
    assert "__name__ == '__main__'" == ast.unparse(last.test)


def test_it_offers_what_the_evaluator_calls() -> None:
    functions = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
    arguments = [argument.arg for argument in functions["load_model"].args.args]
    assert ["checkpoint_dir", "device"] == arguments


def test_it_imports_nothing_but_the_standard_library_and_torch() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name]
    }
    assert {"torch"} == imported - set(sys.stdlib_module_names)


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= 40


def test_checkpoints_are_loaded_without_running_code() -> None:
    loads = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [True] == [
        any(
            word.arg == "weights_only" and ast.unparse(word.value) == "True"
            for word in call.keywords
        )
        for call in loads
    ]


def test_the_tpe_researcher_finds_exactly_these_knobs_and_ranges() -> None:
    found = find_knobs("train.py", TEXT.encode())
    assert list(KNOBS) == [knob.name for knob in found]
    assert all(knob.from_comment for knob in found)


@pytest.mark.parametrize("name", known_profiles(None))
def test_init_starts_with_knobs_that_suit_the_hardware(name: str, tmp_path: Path) -> None:
    copy_template(tmp_path, name)

    source = (tmp_path / "workspace" / "train.py").read_bytes()
    knobs = {knob.name: knob for knob in find_knobs("train.py", source)}
    assert name == load_program(tmp_path / "program.md").settings.hardware.profile
    assert set(KNOBS) == set(knobs)
    for started in find_profile(name).knobs.keys() & knobs.keys():
        domain = knobs[started].domain
        assert isinstance(domain, Choices)
        assert knobs[started].value in domain.values
    assert name != "cpu" or source == PROGRAM.read_bytes()


def test_init_for_hardware_that_nobody_knows_copies_nothing(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="no hardware profile 'tpu'"):
        copy_template(tmp_path / "new", "tpu")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["cuda", "jetson"])
def test_a_gpus_width_is_one_that_its_heads_can_share(name: str) -> None:
    knobs = find_profile(name).knobs
    widths = CHOICES.search(knobs["WIDTH"])
    assert widths is not None
    heads = int(knobs["HEADS"].split()[0])
    assert [] == [w for w in widths[1].split(",") if int(w) % (4 * heads)]
    assert [] == [w for w in widths[1].split(",") if int(w) // heads % 8]  # fused attention's
