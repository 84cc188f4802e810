from __future__ import annotations

import pytest

from agent.candidate.seeds import is_only_a_seed, pins_its_seed


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(1337)",
        "random.seed( 7 )",
        "key = jax.random.PRNGKey(0)",
        "rng = np.random.default_rng(3)",
        "model = Forest(random_state=42)",
        "SEED = 1",
        "seed: 5",
    ],
)
def test_a_number_for_a_seed_pins_it_unless_the_given_one_is_asked_for(line: str) -> None:
    text = line.encode()

    assert pins_its_seed({"train.py": text})
    assert not pins_its_seed({"train.py": text, "more.py": b'os.environ["NIGHTLAB_SEED"]'})


@pytest.mark.parametrize("line", ["seed = args.seed", "rate = 0.1", "torch.manual_seed(seed)", ""])
def test_a_program_without_a_number_of_its_own_is_as_random_as_it_is(line: str) -> None:
    assert not pins_its_seed({"train.py": line.encode()})


BEFORE = b"""import torch
SEED = 1337  # for all
seed: int = 5
torch.manual_seed(SEED)
rng = np.random.default_rng(7)
parser.add_argument("--seed", type=int, default=42)
config = {"seed": 3, "lr": 0.1}
model = train(random_state=0, epochs=3)
"""


@pytest.mark.parametrize(
    ("old", "new", "is_only"),
    [
        (b"1337", b"1338", True),
        (b"1337", b"0xBEEF", True),
        (b"int = 5", b"int = 1_000", True),
        (b"default_rng(7)", b"default_rng(8)", True),
        (b"default=42", b"default=43", True),
        (b'"seed": 3', b'"seed": 4', True),
        (b"random_state=0", b"random_state=11", True),
        (b"import torch\n", b"import torch\ntorch.cuda.manual_seed_all(9)\n", True),
        (b"torch.manual_seed(SEED)\n", b"", True),
        (b"# for all", b"# for nobody", False),
        (b"SEED = 1337  # for all", b"# a remark\n\nSEED = 7  # for all", True),
        (b'"lr": 0.1', b'"lr": 0.2', False),
        (b'"seed": 3, "lr": 0.1', b'"seed": 4, "lr": 0.2', False),
        (b"epochs=3", b"epochs=4", False),
        (b"import torch", b"# more\nimport torch", False),
        (b"SEED = 1337", b"SEEDS = [1337]", False),
    ],
)
def test_a_change_of_nothing_but_a_seed_is_found(old: bytes, new: bytes, is_only: bool) -> None:
    assert old in BEFORE
    after = BEFORE.replace(old, new)
    other = {"helper.py": b"x = 1\n"}
    assert is_only == is_only_a_seed({"train.py": BEFORE, **other}, {"train.py": after, **other})


@pytest.mark.parametrize(
    "line",
    [
        "num_seed_points = %s",
        "seed_fraction = %s.5",
        "seed = %s.5",
        "n_seed = %s",
        "seeds = %s",
        "seed_everything_once_more_with(%s)",
        "seed_points(%s)",
        '{"seed_nodes": %s}',
    ],
)
def test_a_number_that_only_has_seed_in_its_name_is_an_idea(line: str) -> None:
    old, new = ({"train.py": (line % number).encode()} for number in (100, 200))

    assert not is_only_a_seed(old, new)
    assert not pins_its_seed(old)


@pytest.mark.parametrize(
    "line",
    [
        "manualSeed = %s",
        "torch.cuda.manual_seed_all(%s)",
        "seed_torch(%s)",
        "global_seed: int = %s",
    ],
)
def test_other_spellings_of_a_seed_are_one(line: str) -> None:
    old, new = ({"train.py": (line % number).encode()} for number in (100, 200))

    assert is_only_a_seed(old, new)
    assert pins_its_seed(old)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", [b"seed", b"-", b"seed_", b"--seed' default", b"seed" + b" " * 9000]
)
def test_no_text_that_a_model_writes_takes_long(text: bytes) -> None:
    content = {"train.py": text * (2**18 // len(text))}

    assert not pins_its_seed(content)
    assert not is_only_a_seed(content, {"train.py": b"x"})


def test_equal_files_and_other_names_are_no_change_of_a_seed() -> None:
    assert not is_only_a_seed({"train.py": BEFORE}, {"train.py": BEFORE})
    assert not is_only_a_seed({"train.py": BEFORE}, {"train.py": BEFORE, "more.py": b""})
