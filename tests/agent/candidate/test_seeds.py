from __future__ import annotations

import pytest

from agent.candidate.seeds import pins_its_seed


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
