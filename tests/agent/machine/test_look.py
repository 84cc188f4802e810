"""What init finds in a checkout, by small programs, one of each kind; and what git refuses."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from agent.candidate.own_files import copy_workspace, files_of
from agent.machine.look import begin_program
from agent.program import Program, load_program
from agent.record.reported import read_reported
from sandbox.contract.errors import UsageError
from sandbox.contract.run import Log
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.command_line import CommandLine
from tests.support.facilities import missing

LOOP = "import torch\noptimizer = torch.optim.SGD([], 0.1)\n"
LOOP += "for step in range(9):\n    loss.backward()\n"
PLAIN = LOOP + "print('---')\nprint(f'val_bpb:     {value:.6f}')\n"
NANO = LOOP + (
    "print(f\"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}\")\n"
    "torch.manual_seed(1337)\n"
)
MNIST = LOOP + (
    "import argparse\nparser = argparse.ArgumentParser()\n"
    "parser.add_argument('--seed', type=int, default=1)\n"
    "data = datasets.MNIST('../data', train=True, download=True)\n"
    "print('\\nTest set: Average loss: {:.4f}, Accuracy: {}/{}\\n'.format(loss, right, count))\n"
)
OLD = LOOP + "print('%s final score: %d/%d = %.2f%% correct' % (split, right, count, share))\n"


def checkout(root: Path, **files: str) -> Path:
    """A repository with these files, dots of their names written as "__"."""
    root.mkdir(exist_ok=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name, text in files.items():
        path = root / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def begun(root: Path, home: Path | None = None) -> Program:
    """The program that is begun for a directory, as every command would load it."""
    assert begin_program(root, home or root / "nobody", "cpu") is not None
    return load_program(root / "program.md")


@pytest.mark.parametrize(
    ("code", "metric", "pattern", "direction"),
    [
        (PLAIN, "val_bpb", None, "minimize"),
        (NANO, "val_loss", r"val\s*loss\s*([-+\d.,eE]*\d)", "minimize"),
        (MNIST, "Average_loss", r"Average\s*loss:\s*([-+\d.,eE]*\d)", "minimize"),
        (OLD, "final_score", r"final\s*score:\s*([-+\d.,eE]*\d)", "maximize"),
    ],
)
def test_the_score_is_found_as_it_is_printed(
    tmp_path: Path, code: str, metric: str, pattern: str | None, direction: str
) -> None:
    goal = begun(checkout(tmp_path, train__py=code)).settings.goal

    assert (goal.metric, goal.pattern, goal.direction) == (metric, pattern, direction)
    assert goal.is_reported


def test_the_script_that_trains_is_called_as_the_readme_calls_it(tmp_path: Path) -> None:
    readme = "$ python prepare.py\n$ python train.py config/big.py\n"
    readme += "On a CPU: `python train.py config/small.py --device=cpu \\\n  --steps=9`\n"
    place = checkout(
        tmp_path,
        README__md=readme,
        train__py=NANO,
        prepare__py=LOOP,
        config_in_small__py="steps = 9\n",
        tests_in_test_train__py=LOOP,
    )

    found = begun(place).settings.workspace

    words = ("python3", "train.py", "config/small.py", "--device=cpu", "--steps=9")
    assert words == found.command
    assert ("train.py", "config/small.py") == found.editable


def test_a_seed_is_given_where_the_script_takes_one_and_missed_where_it_does_not(
    tmp_path: Path,
) -> None:
    takes = checkout(tmp_path / "takes", main__py=MNIST)
    pins = checkout(tmp_path / "pins", train__py=NANO)

    assert begun(takes).settings.workspace.command[-1] == "--seed={seed}"
    begun(pins)
    text = (pins / "program.md").read_text()
    assert "MISSING: seed: train.py:6 pins one" in text


def test_a_script_below_the_top_that_imports_from_the_top_finds_its_package(tmp_path: Path) -> None:
    place = checkout(
        tmp_path,
        lib_in_model__py="class Model: pass\n",
        lib_in_trainer__py="class Trainer:\n    optimizer = None\n",
        projects_in_chars__py="from lib.model import Model\n" + OLD,
    )

    found = begun(place).settings.workspace

    assert ("env", "PYTHONPATH=.", "python3", "projects/chars.py") == found.command
    assert ("projects/chars.py",) == found.editable


def test_data_that_git_ignores_and_caches_below_home_are_shown_where_they_are(
    tmp_path: Path,
) -> None:
    code = PLAIN + 'import os\nCACHE = os.path.join(os.path.expanduser("~"), ".cache", "mine")\n'
    place = checkout(tmp_path / "repo", train__py=code, __gitignore="data/\nruns/\n*.log\n")
    (place / "data" / "set").mkdir(parents=True)
    (place / "data" / "set" / "train.bin").write_bytes(bytes(100))
    (place / "a.log").write_text("noise")
    (tmp_path / "home" / ".cache" / "mine").mkdir(parents=True)

    folders = begun(place, tmp_path / "home").settings.folders

    assert {("data", "data"), ("~/.cache/mine", "~/.cache/mine")} == {
        (folder.source, folder.at) for folder in folders
    }


def test_what_is_not_there_is_marked_and_left_out_of_the_settings(tmp_path: Path) -> None:
    place = checkout(tmp_path, train__py="import lightning\n" + MNIST, requirements__txt="x\n")

    settings = begun(place).settings

    text = (place / "program.md").read_text()
    assert settings.folders == ()
    assert '# at = "~/data"' in text
    assert "lacks what is imported: lightning; set-up installs it" in text
    assert '\nrequirements = "requirements.txt"\n' in text
    assert "it downloads, and a box has no network" in text


@pytest.mark.parametrize(
    ("files", "line", "said"),
    [
        ({"requirements__txt": "lightning\n"}, "requirements.txt", "set-up installs it"),
        ({"pyproject__toml": "[project]\ndependencies = ['lightning']\n"}, "pyproject.toml", ""),
        (
            {"pyproject__toml": "[tool.ruff]\nline-length = 100\n"},
            None,
            "requirements.txt, and here",
        ),
        ({"requirements__txt": "git+https://x.org/y\n"}, None, "no package by name and no wheel"),
        ({"environment__yml": "name: x\n"}, None, "see environment.yml"),
    ],
)
def test_a_file_that_names_packages_is_proposed_where_it_can_be_taken(
    tmp_path: Path, files: dict[str, str], line: str | None, said: str
) -> None:
    place = checkout(tmp_path, train__py="import lightning\n" + PLAIN, **files)

    settings = begun(place).settings

    assert (line or "") == settings.hardware.requirements
    assert said in (place / "program.md").read_text()


def test_prose_that_is_somebodys_stays_and_goes_into_nightlab_md(tmp_path: Path) -> None:
    prose = "# autoresearch\n\nLOOP FOREVER.\n\n```\nuv run train.py\n```\n"
    place = checkout(tmp_path, train__py=PLAIN, program__md=prose)

    program = begun(place)

    assert (place / "program.md").read_text() == prose
    assert "LOOP FOREVER" in program.prose
    assert begin_program(place, tmp_path, "cpu") is None


def test_its_own_budget_gets_room_for_start_up_and_evaluation(tmp_path: Path) -> None:
    place = checkout(tmp_path, train__py="TIME_BUDGET = 300  # s\n" + PLAIN)

    budget = begun(place).settings.budget

    assert (budget.kind, budget.seconds) == ("fence", 600)


@pytest.mark.parametrize("files", [{}, {"notes__py": "VALUE = 1\n"}])
def test_where_nothing_trains_no_program_is_begun(tmp_path: Path, files: dict[str, str]) -> None:
    assert begin_program(checkout(tmp_path, **files), tmp_path, "cpu") is None


# --- all of the repository, and what git refuses --------------------------------------------------


def test_git_that_refuses_is_an_error_with_the_way_on_and_no_silent_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = checkout(tmp_path / "repo", train__py=PLAIN, __gitignore="secret.txt\n")
    (place / "secret.txt").write_text("key")
    assert files_of(place) == ["train.py"]
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert files_of(place) == ["train.py"]  # what a shell or a hook set is not meant for it
    (place / ".git" / "config").write_text("[core\n")

    with pytest.raises(UsageError, match="git refuses") as caught:
        copy_workspace(place, tmp_path / "copy", tmp_path / "runs")

    assert "git status" in caught.value.hint
    assert not (tmp_path / "copy" / "secret.txt").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises((UsageError, OSError)):
        files_of(place)


def test_somebody_elses_repository_is_refused_with_gits_own_remedy(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    place = checkout(tmp_path / "repo", train__py=PLAIN)
    try:
        for path in (place, place / ".git"):
            os.chown(path, 12345, 12345)
    except PermissionError:
        missing(pytestconfig, "engines", "only root gives files away")

    with pytest.raises(UsageError, match="git refuses") as caught:
        files_of(place)

    assert f"safe.directory {place}" in caught.value.hint


def test_what_is_left_out_stays_out_and_a_pointer_is_named(tmp_path: Path) -> None:
    place = checkout(
        tmp_path / "repo",
        train__py=PLAIN,
        docs_in_page__md="x",
        weights__bin="version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    )

    with pytest.raises(UsageError, match=r"pointers of Git LFS.*: weights\.bin"):
        copy_workspace(place, tmp_path / "one", tmp_path / "runs")
    copy_workspace(place, tmp_path / "two", tmp_path / "runs", ("docs", "*.bin"))

    assert [path.name for path in (tmp_path / "two").iterdir()] == ["train.py"]


def test_what_git_ignores_stays_where_it_is_though_it_be_all_there_is(tmp_path: Path) -> None:
    place = checkout(tmp_path / "repo", __gitignore="exp/\n", exp_in_train__py=PLAIN)
    (place / "exp" / "secrets.json").write_text("key")

    assert files_of(place / "exp") == []
    with pytest.raises(UsageError, match="git ignores all of") as caught:
        copy_workspace(place / "exp", tmp_path / "copy", tmp_path / "runs")

    assert "git add -f" in caught.value.hint
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("is_repository", [True, False])
@pytest.mark.parametrize("where", ["outside", "ignored", "hidden", "folder"])
def test_a_link_brings_no_file_that_is_not_copied_itself(
    tmp_path: Path, where: str, is_repository: bool
) -> None:
    place, outside = checkout(tmp_path / "repo", train__py=PLAIN), tmp_path / "outside"
    outside.mkdir()
    (outside / "key.txt").write_text("secret")
    (place / ".env").write_text("secret")
    (place / "again.py").symlink_to("train.py")
    (place / "gone.txt").symlink_to("nowhere")
    if where == "folder":  # git knows its files, and it has become a link since
        (place / "sub").mkdir()
        (place / "sub" / "key.txt").write_text("mine")
        subprocess.run(["git", "-C", str(place), "add", "sub"], check=True)
        (place / "sub" / "key.txt").unlink()
        (place / "sub").rmdir()
        (place / "sub").symlink_to(outside)
    else:
        targets = {"outside": outside / "key.txt", "hidden": place / ".env"}
        (place / "notes.txt").symlink_to(targets.get(where, place / "secret.txt"))
    if where == "ignored":
        (place / "secret.txt").write_text("secret")
        (place / ".gitignore").write_text("secret.txt\n")
    if not is_repository:
        (place / ".git").rename(tmp_path / "git")

    leave_out = ("secret.txt",) if where == "ignored" else ()
    if where == "folder" and not is_repository:  # a link to a folder is no file there
        copy_workspace(place, tmp_path / "one", tmp_path / "runs", leave_out)
    else:
        with pytest.raises(UsageError, match=r"is a link to .*, which no session copies") as caught:
            copy_workspace(place, tmp_path / "one", tmp_path / "runs", leave_out)
        assert "leave_out" in caught.value.hint
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "one").rglob("*.txt"))
    copy_workspace(place, tmp_path / "two", tmp_path / "runs", (*leave_out, "notes.txt", "sub"))

    assert {path.name for path in (tmp_path / "two").iterdir()} == {"train.py", "again.py"}


@pytest.mark.parametrize(
    ("printed", "metric", "line"),
    [
        ("f'{split}_loss: {x}'", "loss", "val_loss: 2.25"),
        ("f'{epoch} {step} acc {x}'", "acc", "3 9 acc 2.25"),
        (f"'{'a' * 20} {'b' * 20} {'c' * 28}_loss: %f' % x", "a" * 20 + "_" + "b" * 20, None),
    ],
)
def test_a_name_that_begins_with_a_value_or_is_long_becomes_a_metric(
    tmp_path: Path, printed: str, metric: str, line: str | None
) -> None:
    goal = begun(checkout(tmp_path, train__py=f"{LOOP}print({printed})\n")).settings.goal

    assert goal.metric.startswith(metric)
    if line is not None:
        assert read_reported(Log(head=line, tail="", omitted_bytes=0), goal).value == 2.25


def test_quotes_in_what_a_readme_calls_and_in_names_stay_whole(tmp_path: Path) -> None:
    readme = """Run `python train.py --config='{"lr": 0.1, "dir": "a\\b"}'` and wait.\n"""
    place = checkout(tmp_path, README__md=readme, train__py=PLAIN, __gitignore="da*\n")
    (place / 'data"set').mkdir()
    (place / 'data"set' / "a").write_text("x")

    found = begun(place).settings

    assert ("python3", "train.py", '--config={"lr": 0.1, "dir": "a\\b"}') == found.workspace.command
    assert ['data"set'] == [folder.at for folder in found.folders]


def test_what_trainings_left_is_no_data_and_no_folder_is_shown_in_another(tmp_path: Path) -> None:
    code = PLAIN + "a = datasets.MNIST('data/mnist')\nb = datasets.X('/data/x')\n"
    code += "c = datasets.Y('../../y')\nd = datasets.Z('./more')\n"
    ignored = "*.pt\nout*/\ncheckpoints/\nwandb/\ndata/*.bin\ndata/sub/\nmore/\nbig/\n"
    place = checkout(tmp_path, train__py=code, __gitignore=ignored)
    for name in ("out-char/a", "checkpoints/a", "wandb/a", "model/a.pt", "model/a.py", "b.pt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(bytes(2**21))
    for name in ("data/a.bin", "data/mine.py", "data/sub/a", "data/mnist/a", "more/a", "big/a"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(bytes(2**20))

    found = begun(place).settings

    assert ["big", "data", "more"] == [folder.at for folder in found.folders]
    assert "/data/x, which no box can show there" in (place / "program.md").read_text()


def test_a_file_that_git_knows_and_that_is_gone_hinders_nothing(tmp_path: Path) -> None:
    place = checkout(tmp_path / "repo", train__py=PLAIN, old__py="X = 1\n")
    subprocess.run(["git", "-C", str(place), "add", "."], check=True)
    (place / "old.py").unlink()

    assert begun(place).settings.workspace.command == ("python3", "train.py")
    assert files_of(place) == ["program.md", "train.py"]


def test_files_of_a_submodule_belong_to_it(tmp_path: Path) -> None:
    me = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always"]
    inner = checkout(tmp_path / "inner", lib__py="X = 1\n")
    outer = checkout(tmp_path / "outer", train__py=PLAIN)
    for place, command in (
        (inner, ["add", "."]),
        (inner, ["commit", "-qm", "a"]),
        (outer, ["submodule", "--quiet", "add", str(inner), "lib"]),
    ):
        subprocess.run(["git", *me, "-C", str(place), *command], check=True, capture_output=True)

    assert files_of(outer) == [".gitmodules", "lib/lib.py", "train.py"]


# --- init, then a night ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        (LOOP + "print0(f'step:{s} val_loss:{v:.4f}')\n", r"val_loss:\s*([-+\d.,eE]*\d)"),
        (LOOP + "logger.info('eval loss = %f' % v)\n", r"eval\s*loss\s*=\s*([-+\d.,eE]*\d)"),
        (
            "from transformers import Trainer\ntrainer = Trainer(model)\ntrainer.train()\n"
            "trainer.evaluate()\n",
            r"eval_loss':\s*([-+\d.,eE]*\d)",
        ),
        (
            LOOP + "class M:\n    def test_step(self, batch):\n"
            "        self.log('test/acc', self.acc, on_step=False)\n",
            r"test/acc\s*│\s*([-+\d.,eE]*\d)",
        ),
    ],
)
def test_prints_by_other_names_and_those_of_frameworks_are_known(
    tmp_path: Path, code: str, pattern: str
) -> None:
    assert begun(checkout(tmp_path, train__py=code)).settings.goal.pattern == pattern


def test_without_a_budget_of_its_own_time_cuts_a_training(tmp_path: Path) -> None:
    ends = begun(checkout(tmp_path / "ends", train__py=PLAIN)).settings
    endless = begun(checkout(tmp_path / "endless", train__py=PLAIN + "while True:\n    f()\n"))

    assert (ends.budget.kind, endless.settings.budget.kind) == ("cut", "cut")
    assert ends.disturbance.max_other_cores == 1000
    assert endless.settings.disturbance.max_other_cores < 1000  # how far it gets is speed


def test_what_a_readme_leaves_to_its_reader_is_marked(tmp_path: Path) -> None:
    readme = "torchrun --nproc_per_node=4 train.py --model <your_path> --epochs 3\n"
    place = checkout(tmp_path, README__md=readme, train__py=PLAIN)

    begun(place)

    assert "MISSING: README leaves <your_path> to you" in (place / "program.md").read_text()


def test_a_folder_of_a_repository_has_data_that_the_repository_ignores(tmp_path: Path) -> None:
    root = checkout(tmp_path, sub_in_train__py=PLAIN, __gitignore="data\n")
    (root / "sub" / "data").mkdir()
    (root / "sub" / "data" / "train.txt").write_text("words")

    assert [folder.at for folder in begun(root / "sub").settings.folders] == ["data"]


def test_modules_and_numbers_that_hydra_brings_are_found(tmp_path: Path) -> None:
    place = checkout(
        tmp_path,
        src_in_train__py="import hydra\n" + LOOP + "if cfg.get('seed'):\n    seed(cfg.seed)\n",
        src_in_net__py="class Net:\n    def step(self):\n        self.log('val/acc', self.acc)\n",
        configs_in_net__yaml="_target_: src.net.Net\noptimizer:\n  _target_: torch.optim.Adam\n"
        "  lr: 0.001\n",
        configs_in_other__yaml="_target_: torch.nn.Linear\n",
    )

    settings = begun(place).settings

    assert settings.goal.metric == "val/acc"
    assert settings.workspace.command[-2:] == ("src/train.py", "seed={seed}")
    assert settings.workspace.editable == ("src/train.py", "configs/net.yaml")


BENCH = """\
#include <cstdio>
#define TILE 32
int main(int argc, char** argv) {
    printf("n=%d | GFLOPS = %.2f\\n", n, rate);
}
"""


@pytest.mark.parametrize(
    ("build", "call"),
    [
        ({}, "c++ -O3 -march=native bench.cpp -lm -o program && stdbuf -oL ./program"),
        ({"Makefile": "bench: bench.cpp\n"}, "make && stdbuf -oL ./bench"),
        (
            {"CMakeLists__txt": "add_executable(speed bench.cpp)\n"},
            "cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build "
            "--target speed && stdbuf -oL ./build/speed",
        ),
    ],
)
def test_a_benchmark_that_is_built_first_has_its_command_and_metric(
    tmp_path: Path, build: dict[str, str], call: str
) -> None:
    place = checkout(tmp_path, bench__cpp=BENCH, plot__py="import sys\nshow(sys.argv)\n", **build)

    settings = begun(place).settings

    assert settings.workspace.command == ("sh", "-c", call)
    assert (settings.goal.metric, settings.goal.direction) == ("GFLOPS", "maximize")
    assert "no compiler" in (place / "program.md").read_text()
    assert settings.workspace.editable == ("bench.cpp",)


def test_of_a_library_with_a_benchmark_the_library_changes(tmp_path: Path) -> None:
    place = checkout(tmp_path, bench__cpp=BENCH, src_in_gemm__h="#define TILE 4\n")

    assert begun(place).settings.workspace.editable == ("src/gemm.h",)
    assert "1 knobs" in (place / "program.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 256_000,
        "python " * 36_000,
        "python .py" * 25_000,
        "TIME_BUDGET" * 23_000,
        "add_argument('--" * 16_000,
        "'~/a" * 64_000,
        "expanduser('~'" + ", 'a' " * 40_000,
        "_target_: " * 25_000,
        "<" * 256_000,
        "print(" + "+".join(["x"] * 60_000) + ")",
        "transformers " * 20_000,
        'printf("' + "%" * 250_000,
    ],
)
def test_no_text_of_a_person_makes_a_look_take_long(tmp_path: Path, text: str) -> None:
    begun_at = time.process_time()

    place = checkout(
        tmp_path,
        README__md=text,
        train__py=f"import hydra\nloss.backward()\nprint(f'loss: {{x}}')\n# {text}\n",
        model__py=text,
        bench__c=f"int main() {{\n{text}\n}}\n",
        c__yaml=text,
    )
    assert begin_program(place, tmp_path, "cpu") is not None

    assert time.process_time() - begun_at < 8


TRAINS = """\
import argparse
import pathlib
import random

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()
random.seed(args.seed)
RATE = 0.3  # [0.1..0.9]
for epoch in range(3):
    pathlib.Path("log.txt").write_text(f"epoch {epoch}")
    loss = 1 + abs(RATE - 0.5) + random.gauss(0, 0.01)
    print(f"epoch {epoch} | train loss {loss:.3f} | val loss {loss:.5f}", end="\\r")
"""


@pytest.mark.docker
def test_a_repository_gets_its_first_judged_attempt_by_init_and_run(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    place = CommandLine(checkout(tmp_path / "repo", train__py=TRAINS), engine)

    made = place.nightlab("init")
    assert "new: program.md" in made.stdout, made.stderr
    done = place.nightlab("run", "--researcher", "tpe", "--attempts", "1", "--session", "n")

    assert done.returncode == 0, done.stdout + done.stderr
    history = place.history("n")
    assert history.repeats.noise() is not None
    assert [attempt.finished.value is not None for attempt in history.completed if attempt.finished]
    assert not (place.root / "workspace").exists()
