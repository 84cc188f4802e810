"""Hardware profiles: what ships, and what is refused."""

from __future__ import annotations

import pytest

from sandbox.contract import SandboxError
from sandbox.hardware import UnknownProfile, find_profile, lock_text, read_profiles
from sandbox.wheels import read_lock


def test_the_cpu_profile_asks_for_the_cpu_build_and_tells_programs_their_device() -> None:
    profile = find_profile("cpu")
    assert ("2.13.0", "cpu") == (profile.torch_version, profile.torch_build)
    assert {"NIGHTLAB_DEVICE": "cpu", "GOMP_SPINCOUNT": "3000"} == profile.environment


def test_an_unknown_profile_is_refused_with_the_names_of_the_known_ones() -> None:
    with pytest.raises(UnknownProfile) as refusal:
        find_profile("tpu")
    assert "known profiles: cpu" == refusal.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "[cpu",
        "cpu = 1",
        "[cpu]\nbase_image = 'python:3.11'",
        "[cpu]\nsurprise = 1",
    ],
)
def test_profiles_that_lack_a_field_or_have_a_strange_one_are_refused(text: str) -> None:
    with pytest.raises(SandboxError, match="profiles cannot be read"):
        read_profiles(text)


def test_the_lock_pins_every_wheel_but_torch_by_hash_and_names_no_index() -> None:
    text = lock_text(find_profile("cpu"))
    lock = read_lock(text)
    pinned = {requirement.partition("==")[0] for requirement in lock}
    torch_needs = {"filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"}
    assert set() == torch_needs - pinned
    assert "torch" not in pinned
    assert {64} == {len(sha) for hashes in lock.values() for sha in hashes}
    assert "://" not in text
