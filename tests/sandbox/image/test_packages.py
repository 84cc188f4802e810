"""A person's packages: resolved for the image's Python, locked, and nothing of them run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.contract.errors import UsageError
from sandbox.engine.find import Engine
from sandbox.image import wheels
from sandbox.image.image import ImageRecord
from sandbox.image.packages import Distribution, Held, PackagesUnfit, fetch_packages, is_locked
from sandbox.image.requirements import LOCK, Asked, read_asked
from sandbox.image.wheels import Pip, Target
from tests.support.command_line import CommandLine
from tests.support.wheels import pip_that_knows, write_source, write_wheel

HELD = Held(
    packages={
        "torch": Distribution(version="2.13.0+cpu", needs=("array_lib>=1",)),
        "array-lib": Distribution(version="2.0", needs=('helper>=1; extra == "web"',)),
        "pip": Distribution(version="26.0", needs=()),
    }
)
"""An image's packages; none of them is in the folder of wheels below."""


class Site:
    """A person's directory, and a pip that knows one folder of wheels and nothing else."""

    def __init__(self, root: Path) -> None:
        self.place, self.links, self.into = root / "own", root / "links", root / "context"
        self.marker = root / "was-run"
        self.said: list[str] = []
        self.python = "3.11"
        for folder in (self.place, self.links):
            folder.mkdir()

    def asks(self, text: str, name: str = "requirements.txt") -> Asked:
        (self.place / name).write_text(text)
        return read_asked(self.place, name)

    def fetch(self, asked: Asked) -> list[str]:
        """What is locked, and kept in packages.lock as set-up does."""
        environ = pip_that_knows(self.links, PIP_NO_INDEX="1")
        self.into.mkdir(exist_ok=True)
        for left in self.into.iterdir():
            left.unlink()
        pip = Pip(Target(python=self.python, machine="x86_64"), environ, "", self.said.append)
        lock = fetch_packages(asked, HELD, pip, self.into)
        (self.place / LOCK).write_text(lock)
        names = [line.split(" --hash=sha256:")[0] for line in lock.splitlines() if line[0] != "#"]
        found = sorted("==".join(path.name.split("-")[:2]) for path in self.into.glob("*.whl"))
        assert found == sorted(name.replace("-", "_") for name in names)
        return names


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_package_comes_with_what_it_needs_and_the_image_keeps_what_it_has(site: Site) -> None:
    write_wheel(site.links, "model", "1.0", "helper>=1")
    write_wheel(site.links, "helper", "1.5", "torch>=2")
    write_wheel(site.links, "array_lib", "3.0")
    assert ["helper==1.5", "model==1.0"] == site.fetch(site.asks("model\narray-lib>=1\n"))
    assert "2 packages" in site.said[-1]


def test_an_extra_of_what_the_image_has_brings_what_it_needs(site: Site) -> None:
    write_wheel(site.links, "model", "1.0", "array-lib[web]")
    write_wheel(site.links, "helper", "1.5")
    assert ["helper==1.5", "model==1.0"] == site.fetch(site.asks("model\n"))


def test_another_version_of_what_the_image_has_is_taken_where_the_file_asks_for_it(
    site: Site,
) -> None:
    write_wheel(site.links, "array_lib", "1.9")
    assert ["array-lib==1.9"] == site.fetch(site.asks("array_lib<2\n"))


def test_a_version_that_the_images_torch_cannot_be_with_is_a_conflict(site: Site) -> None:
    write_wheel(site.links, "array_lib", "0.9")
    with pytest.raises(PackagesUnfit, match="array_lib>=1"):
        site.fetch(site.asks("array_lib<1\n"))


def test_the_images_torch_stays_whatever_the_file_says_and_the_person_is_told(site: Site) -> None:
    write_wheel(site.links, "model", "1.0")
    asked = site.asks("torch==2.1.0\nnvidia-cudnn-cu12==9.1\ntriton==2.1\nmodel\n")
    assert ["model==1.0"] == site.fetch(asked)
    (told,) = [line for line in site.said if "torch==2.1.0" in line]
    assert "the image's torch 2.13.0+cpu takes its place" in told
    assert "base_image" in told


def test_a_package_for_another_torch_is_refused_with_what_to_do(site: Site) -> None:
    write_wheel(site.links, "vision", "0.24", "torch==2.9.0")
    with pytest.raises(PackagesUnfit) as refused:
        site.fetch(site.asks("vision==0.24\n"))
    assert "vision 0.24 depends on torch==2.9.0, and the image has torch 2.13.0+cpu" in (
        refused.value.message
    )
    assert "base_image" in refused.value.hint


def test_what_has_no_wheel_is_refused_and_nothing_of_its_source_is_run(site: Site) -> None:
    write_source(site.links, "sourced", "2.0", site.marker)
    write_wheel(site.links, "sourced", "1.0")
    with pytest.raises(PackagesUnfit) as refused:
        site.fetch(site.asks("sourced==2.0\n"))
    assert "no wheel of sourced==2.0 for Python 3.11" in refused.value.message
    assert "with a wheel there is: 1.0" in refused.value.message
    assert "--find-links FOLDER" in refused.value.hint
    assert not site.marker.exists()


def test_without_that_wall_a_source_would_be_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(site.links, "sourced", "2.0", site.marker)
    monkeypatch.setattr(wheels, "_options_for", lambda _: [])
    with pytest.raises(PackagesUnfit):
        site.fetch(site.asks("sourced==2.0\n"))
    assert site.marker.exists()


def test_conditions_are_those_of_the_images_python(site: Site) -> None:
    write_wheel(site.links, "old", "1.0")
    write_wheel(site.links, "new", "1.0")
    text = "old; python_version < '3.13'\nnew; python_full_version >= '3.13'\n"
    assert ["old==1.0"] == site.fetch(site.asks(text))
    site.python = "3.13"
    assert ["new==1.0"] == site.fetch(site.asks(text))


def test_a_lock_that_fits_is_taken_and_one_that_does_not_is_made_anew(site: Site) -> None:
    write_wheel(site.links, "model", "1.0")
    site.fetch(site.asks("model\n"))
    write_wheel(site.links, "model", "2.0")
    assert ["model==1.0"] == site.fetch(site.asks("model\n"))
    changed = site.asks("model>1\n")
    assert not is_locked(changed)
    assert ["model==2.0"] == site.fetch(changed)
    assert any("made anew" in line for line in site.said)
    assert is_locked(site.asks("model>1\n"))


def test_a_wheel_that_is_not_the_locked_one_is_refused(site: Site) -> None:
    write_wheel(site.links, "model", "1.0")
    site.fetch(site.asks("model\n"))
    write_wheel(site.links, "model", "1.0", source="another = True")
    with pytest.raises(PackagesUnfit, match=r"cannot fetch what packages\.lock names") as refused:
        site.fetch(site.asks("model\n"))
    assert "delete packages.lock" in refused.value.hint
    assert [] == list(site.into.iterdir())


def test_the_persons_own_hashes_hold(site: Site) -> None:
    wheel = write_wheel(site.links, "model", "1.0")
    good = wheels.file_sha256(wheel)
    assert ["model==1.0"] == site.fetch(site.asks(f"model==1.0 \\\n    --hash=sha256:{good}\n"))
    with pytest.raises(PackagesUnfit, match="knows other files of model"):
        site.fetch(site.asks(f"model==1.0 --hash=sha256:{'0' * 64}\n"))


def test_files_may_name_one_another_and_the_project_itself_is_passed_over(site: Site) -> None:
    (site.place / "more").mkdir()
    (site.place / "more" / "base.txt").write_text("-c bounds.txt\nhelper  # a word\n-e .\n")
    (site.place / "more" / "bounds.txt").write_text("helper<2\nmodel==1.0\n")
    asked = site.asks("\ufeff-r more/base.txt\n--find-links more\nmodel\n-e .[dev]\n")
    assert (("helper", "model"), ("helper<2", "model==1.0")) == (
        asked.requirements,
        asked.constraints,
    )
    assert (f"--find-links {site.place / 'more'}",) == asked.options


@pytest.mark.parametrize(
    "line",
    [
        "git+https://example.org/x.git",
        "x @ git+https://example.org/x.git",
        "-e ./x",
        "./x",
        "https://example.org/x-1.tar.gz",
        "x @ file:///x.tar.gz#y.whl",
        "--no-binary :all:",
        "x --config-settings=a=b",
    ],
)
def test_what_would_have_to_be_built_here_is_refused_with_its_line(site: Site, line: str) -> None:
    with pytest.raises(UsageError) as refused:
        site.asks(f"fine\n{line}\n")
    assert f"requirements.txt: `{line}`" in refused.value.message


UV_LOCK = """
version = 1
[[package]]
name = "mine"
source = {{ virtual = "." }}
dependencies = [
    {{ name = "model", extra = ["more"], marker = "python_version < '4'" }},
    {{ name = "torch" }},
    {{ name = "array-lib" }},
]
[[package]]
name = "model"
version = "1.0"
source = {{ registry = "https://example.org/simple" }}
wheels = [{{ url = "https://example.org/model.whl", hash = "sha256:{model}" }}]
[[package]]
name = "array-lib"
version = "1.5"
source = {{ registry = "https://example.org/simple" }}
[[package]]
name = "forked"
version = "1.0"
source = {{ registry = "https://example.org/simple" }}
resolution-markers = ["python_version < '3.0'"]
[[package]]
name = "forked"
version = "2.0"
source = {{ registry = "https://example.org/simple" }}
resolution-markers = ["python_version >= '3.0'"]
[[package]]
name = "torch"
version = "2.9.1"
source = {{ {torch} }}
"""


def test_a_lock_of_uvs_bounds_versions_and_hashes_and_the_images_torch_stays(site: Site) -> None:
    for version in ("1.0", "2.0"):
        model = write_wheel(site.links, "model", version, "forked")
        write_wheel(site.links, "forked", version)
    write_wheel(site.links, "array_lib", "1.5")
    good = wheels.file_sha256(site.links / "model-1.0-py3-none-any.whl")
    torch = 'registry = "https://example.org/whl/cu128"'
    text = UV_LOCK.format(model=good, torch=torch)
    assert ["array-lib==1.5", "forked==2.0", "model==1.0"] == site.fetch(site.asks(text, "uv.lock"))
    assert any("torch==2.9.1; the image's torch 2.13.0+cpu takes" in line for line in site.said)

    text = UV_LOCK.format(model=wheels.file_sha256(model), torch=torch)
    with pytest.raises(PackagesUnfit, match="knows other files of model"):
        site.fetch(site.asks(text, "uv.lock"))


def test_a_project_says_what_it_depends_on(site: Site) -> None:
    text = "[project]\ndependencies = ['model>=1', \"old; python_version < '3'\", 'torch==2.9']\n"
    write_wheel(site.links, "model", "1.0")
    assert ["model==1.0"] == site.fetch(site.asks(text, "pyproject.toml"))
    assert any("torch==2.9" in line for line in site.said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("uv.lock", "version = 1\n", "no lock of a project"),
        ("uv.lock", UV_LOCK.format(model="0", torch='git = "x"').replace("torch", "x"), "a source"),
        ("pyproject.toml", "[tool.poetry]\n", "no dependencies under"),
        ("pyproject.toml", "[project\n", "pyproject.toml: "),
        (
            "pyproject.toml",
            "[project]\ndependencies = ['a']\n[tool.uv.sources]\na = { git = 'x' }\n",
            "a comes from a source",
        ),
        ("pyproject.toml", "[project]\ndependencies = ['a @ git+https://x.org/a']\n", "no wheel"),
    ],
)
def test_what_a_project_cannot_have_from_an_index_is_said(
    site: Site, name: str, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        site.asks(text, name)


def test_a_file_that_is_not_there_is_named(site: Site) -> None:
    with pytest.raises(UsageError, match=r"requirements\.txt is not there"):
        read_asked(site.place, "requirements.txt")


# --- a real image ---------------------------------------------------------------------------------

TRAIN = """
import sys
import lightgbm
import numpy as np
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
seed = int(sys.argv[1])
x, y = make_classification(2000, n_features=12, n_informative=6, random_state=1)
a, b, c, d = train_test_split(x, y, random_state=seed)
model = lightgbm.LGBMClassifier(n_estimators=20, verbose=-1, random_state=seed, n_jobs=1).fit(a, c)
print("accuracy:", np.mean(model.predict(b) == d))
"""


@pytest.mark.docker
def test_a_program_with_requirements_is_set_up_tried_and_locked(
    engine: Engine, image: ImageRecord, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "requirements.txt").write_text("scikit-learn\nlightgbm\n")
    person = CommandLine(tmp_path, engine)

    begun = person.nightlab("init", COLUMNS="300")
    assert 'requirements = "requirements.txt"' in begun.stdout, begun.stdout
    person.rewrite("program.md", '["python3", "train.py"]', '["python3", "train.py", "{seed}"]')
    untold = person.nightlab("try")
    assert "no image was set up for profile cpu with requirements.txt" in untold.stderr
    made = person.nightlab("setup")
    assert 0 == made.returncode, made.stderr
    lock = (tmp_path / LOCK).read_text()
    assert {"scikit-learn", "lightgbm", "scipy"} <= {
        line.split("==")[0] for line in lock.split("\n")
    }
    assert "\nnumpy==" not in lock
    tried = person.nightlab("try", COLUMNS="300")
    assert (0, True) == (tried.returncode, "reaches the score" in tried.stdout), tried.stdout

    shown = person.nightlab("image", "show", "--json")
    assert "lightgbm" in shown.stdout

    (tmp_path / "requirements.txt").write_text("scikit-learn\nlightgbm\npandas\n")
    stale = person.nightlab("try")
    assert "packages.lock does not fit requirements.txt" in stale.stderr
