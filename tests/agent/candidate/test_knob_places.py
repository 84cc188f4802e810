"""Numbers where people keep them: found, turned in place, or left out with a reason."""

from __future__ import annotations

import json
import tomllib

import pytest

from agent.candidate.knob_places import number_places, why_no_knob
from agent.candidate.knobs import (
    Span,
    find_knobs,
    given_elsewhere,
    left_out,
    turn,
    without_knobs,
)

CODE = """\
import argparse
from dataclasses import dataclass

import click

learning_rate = 3e-4  # [0.0001..0.01 log]
betas = (0.9, 0.95)
config = {"width": 64, "optimizer": {"decay": 0.1}}
best_loss = 1e9
eval_iters = 200
max_iters = 5000


@dataclass
class Config:
    dropout: float = 0.2
    n_layer: int = 6


def train(clip=1.0, seed=7):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Conv(3, stride=2, dim=1, hidden_dim=32)


parser = argparse.ArgumentParser()
parser.add_argument("-b", "--batch-size", type=int, default=16)
parser.add_argument("--port", type=int, default=8080)


@click.command()
@click.option("--gamma", default=0.7)
def main(gamma): ...
"""
YAML = "model:\n  width: 64  # {32, 64}\n  deep:\n    dropout: 0.1\nseed: 3\nlr: 0.001\n"
JSON = '{\n  "model": {\n    "width": 64,\n    "dropout": 0.1\n  },\n  "lr": 0.001\n}\n'
TOML = "lr = 0.001\n[model]\nwidth = 64\ndropout = 0.1\n"


def test_each_kind_of_place_in_code_is_found() -> None:
    found = {knob.name: knob.value for knob in find_knobs("train.py", CODE.encode())}

    assert found == {
        "learning_rate": 3e-4,
        "config.width": 64,
        "config.optimizer.decay": 0.1,
        "Config.dropout": 0.2,
        "Config.n_layer": 6,
        "train.clip": 1.0,
        "SGD.lr": 0.1,
        "SGD.momentum": 0.9,
        "Conv.hidden_dim": 32,
        "batch_size": 16,
        "gamma": 0.7,
    }


COMPILED = """\
#include <cstdio>
#define TILE 32  // [8..128]
#define N_ID 5
  # define KC 500
constexpr int unroll = 4; /* {2, 4, 8} */
static const float rate = 0.5f;
#define MC (16 * TILE)
int depth = 3;
"""


def test_what_a_script_sets_where_it_begins_is_found() -> None:
    code = (
        "def main():\n    width = 64\n    for x in y:\n        inner = 3\n\n"
        "def other():\n    local = 5\n\nif __name__ == '__main__':\n"
        "    alpha = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5\n    ratio = 0.3\n"
    )

    found = {knob.name: knob.value for knob in find_knobs("train.py", code.encode())}

    assert found == {"main.width": 64, "alpha": 0.5, "ratio": 0.3}


def test_constants_of_c_are_turned_and_stay_what_they_are() -> None:
    found = {knob.name: knob for knob in find_knobs("bench.cpp", COMPILED.encode())}

    assert {name: knob.value for name, knob in found.items()} == {
        "TILE": 32,
        "KC": 500,
        "unroll": 4,
        "rate": 0.5,
    }
    assert isinstance(found["TILE"].domain, Span)
    assert (found["TILE"].domain.low, found["TILE"].domain.high) == (8, 128)
    assert found["unroll"].from_comment
    text = turn(turn(COMPILED.encode(), found["rate"], 0.25), found["TILE"], 64).decode()
    assert "rate = 0.25f;" in text
    assert "#define TILE 64  // [8..128]" in text


def test_what_is_no_knob_is_left_out_with_its_reason() -> None:
    why = left_out("train.py", CODE.encode())

    assert {"best_loss", "eval_iters", "max_iters", "train.seed", "port"} == set(why)
    assert "another draw" in why["train.seed"]
    assert "more time" in why["max_iters"]


def test_a_file_with_knobs_in_capitals_has_said_which_they_are() -> None:
    source = b"RATE = 0.1\nlr = 0.5\nPEAK_FLOPS = 9.9e14\nDEVICE_BATCH_SIZE = 8\n"

    assert ["RATE", "DEVICE_BATCH_SIZE"] == [knob.name for knob in find_knobs("t.py", source)]


def test_of_two_on_one_line_each_is_turned_where_it_stands_then() -> None:
    source = CODE.encode()
    knobs = {knob.name: knob for knob in find_knobs("train.py", source)}

    after = turn(turn(source, knobs["SGD.lr"], 0.0123), knobs["SGD.momentum"], 0.5)

    assert b"SGD(model.parameters(), lr=0.0123, momentum=0.5)" in after
    assert without_knobs("train.py", source) == without_knobs("train.py", after)


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.json", JSON), ("c.toml", TOML)])
def test_entries_of_a_configuration_are_turned_and_stay_numbers(name: str, text: str) -> None:
    source = text.encode()
    found = {knob.name: knob for knob in find_knobs(name, source)}

    assert {"width", "dropout", "lr"} == {one.rsplit(".", 1)[-1] for one in found}
    after = turn(source, found["lr"], 0.00001)
    assert after == source.replace(b"0.001", b"1.0e-05")  # to YAML 1e-05 would be a text
    assert without_knobs(name, source) == without_knobs(name, after)
    read = {"c.json": json.loads, "c.toml": tomllib.loads}.get(name)
    assert read is None or read(after.decode())["lr"] == 1e-5


def test_a_name_that_stands_twice_is_no_place() -> None:
    assert number_places("t.py", b"A(lr=0.1)\nA(lr=0.2)\nB(lr=0.3)\n")[0].name == "B.lr"
    assert number_places("t.py", b"def f(:\n") == []


def test_what_the_command_gives_is_not_turned_in_a_file() -> None:
    knobs = find_knobs("train.py", b"lr = 0.1\nwidth = 64\ndecay = 0.2\n")
    knobs += find_knobs("config/small.py", b"decay = 0.3\n")
    command = ("python3", "train.py", "config/small.py", "--lr=0.5")

    given = given_elsewhere(knobs, command)

    assert {"train.py:lr", "train.py:decay"} == given  # the file that is read later decides
    assert given_elsewhere(knobs, ("python3", "train.py")) == set()


@pytest.mark.parametrize(
    "name",
    [
        "seed",
        "data.random_state",
        "evalSize",
        "num_workers",
        "PORT",
        "log_every",
        "local_rank",
        "LOGGING",
    ],
)
def test_names_that_are_no_knobs(name: str) -> None:
    assert why_no_knob(name)


@pytest.mark.parametrize(
    "name",
    [
        "lr",
        "weight_decay",
        "warmup_steps",
        "beta2",
        "LOGIT_SOFTCAP",
        "PEAK_LR",
        "START_LR",
        "LORA_RANK",
        "minLr",
    ],
)
def test_names_that_are(name: str) -> None:
    assert not why_no_knob(name)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("t.py", "def f(a=0.1, /, b=0.2): pass"),
        ("t.py", "LR = 0.1  # [1_..5]"),
        ("t.py", f"lr = 0.1  # [{'1' * 400}..5]"),
        ("t.py", f"steep = 0x{'f' * 6000}  # {{1, 2}}"),
        ("t.py", f"x = 5  # {{0x{'f' * 900}, 3}}"),
        ("t.py", "# coding: utf-7\nA = 1 +AAo-B = 2 +AAo-C = 3"),
        ("t.c", f"#define X {'1' * 900}\n#define {'Y' * 900} 1\nconst int z = 1_0;"),
        ("t.yaml", f"lr: {'1' * 5000}\nhuge: 1e999  # [1..5]\nodd: 1__2\nlast: 1_"),
    ],
)
def test_no_text_of_a_file_ends_the_search_for_its_knobs(file: str, text: str) -> None:
    found = find_knobs(file, text.encode())

    assert all(0 < float(knob.value) < 1e15 for knob in found)
    assert left_out(file, text.encode()) is not None


def test_defaults_of_arguments_that_are_given_by_place_are_found() -> None:
    found = find_knobs("t.py", b"def f(x, a=0.1, /, b=0.2, *, c=0.3): pass")

    assert {"f.a": 0.1, "f.b": 0.2} == {knob.name: knob.value for knob in found}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "line",
    [
        "lr: 1" + " " * 32000 + "x",
        "lr: " + " " * 32000 + "x y",
        "lr = 0.1  # fixed" + " " * 32000 + "x",
        "lr = 0.1  # [" + "1" * 32000,
        "lr = 0.1  # [1..2" + " " * 32000 + "x",
        "lr: " + "1" * 32000 + "x",
        "lr: 1" + " " * 900 + "x",
        "lr = 0.1  # fixed" + " " * 900 + "x",
        "lr = 1",
    ],
)
def test_no_file_that_a_model_writes_takes_long(line: str) -> None:
    text = "\n".join(f"A{number}{line}" for number in range(2**18 // (len(line) + 6)))

    for file in ("t.py", "t.yaml"):
        find_knobs(file, text.encode())
        left_out(file, text.encode())


@pytest.mark.parametrize("value", ["524288", "999999", "700000", "600000.0", "999900.0", "3"])
def test_no_step_of_the_sampler_makes_a_knob_vanish(value: str) -> None:
    source = f"TOTAL_BATCH = {value}".encode()
    knob = find_knobs("t.py", source)[0]
    top = knob.domain.high if isinstance(knob.domain, Span) else knob.domain.values[-1]

    after = find_knobs("t.py", turn(source, knob, top))

    assert [knob.key] == [one.key for one in after]


def test_what_its_comment_says_to_try_is_tried_however_large() -> None:
    source = b"tokens = 5_000_000  # [1000000..9000000]\nother = 5_000_000\n"

    assert ["tokens"] == [knob.name for knob in find_knobs("t.py", source)]
    assert ["other"] == list(left_out("t.py", source))
