"""Hardware profiles: what ships, what a person may add, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.contract.errors import SandboxError
from sandbox.image.profiles import (
    Profile,
    TorchBuild,
    UnknownProfile,
    find_profile,
    known_profiles,
    lock_text,
    read_profiles,
)
from sandbox.image.wheels import read_lock


def own(place: Path, text: str) -> Path:
    (place / "profiles.toml").write_text(text)
    return place


def test_the_cpu_profile_asks_for_the_cpu_build_and_tells_programs_their_device() -> None:
    profile = find_profile("cpu")

    assert isinstance(profile.torch, TorchBuild)
    assert ("2.13.0", "cpu") == (profile.torch.version, profile.torch.build)
    assert {"NIGHTLAB_DEVICE": "cpu", "GOMP_SPINCOUNT": "3000"} == profile.variables


def test_every_shipped_profile_says_what_it_is_for() -> None:
    profiles = known_profiles(None)

    on_gpus = {"cuda", "cuda-blackwell", "cuda-ngc", "jetson"}
    assert {"cpu", "offline", "own-torch"} | on_gpus == set(profiles)
    assert [] == [name for name, profile in profiles.items() if len(profile.description) < 20]


@pytest.mark.parametrize("profile", known_profiles(None).values(), ids=lambda p: p.name)
def test_a_shipped_profile_has_a_base_or_says_which_to_name(profile: Profile) -> None:
    can_be_made = profile.base_image or profile.torch or profile.base_advice
    assert can_be_made or profile.name == "own-torch"
    assert "://" not in profile.model_dump_json()


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("cpu", "cpu", None),
        ("cuda", "cuda", "bfloat16"),
        ("cuda-blackwell", "cuda", "bfloat16"),
        ("jetson", "cuda", "bfloat16"),
    ],
)
def test_programs_are_told_their_device_as_torch_calls_it_and_their_dtype(
    name: str, device: str, dtype: str | None
) -> None:
    told = find_profile(name).variables
    assert (device, dtype) == (told["NIGHTLAB_DEVICE"], told.get("NIGHTLAB_DTYPE"))


def test_a_peak_is_known_for_a_whole_name_only() -> None:
    peaks = find_profile("cuda").peak_flops

    assert 989.4e12 == peaks["NVIDIA H100 80GB HBM3"]
    assert "NVIDIA GeForce RTX 4090 Laptop GPU" not in peaks
    assert "NVIDIA H100 80GB HBM3 MIG 3g.40gb" not in peaks
    assert {} == find_profile("cpu").peak_flops


@pytest.mark.parametrize(
    "name", ["NIGHTLAB_DEVICE", "NVIDIA_VISIBLE_DEVICES", "LD_PRELOAD", "LD_AUDIT"]
)
def test_a_profile_cannot_say_what_a_box_gets(name: str, tmp_path: Path) -> None:
    place = own(tmp_path, f"[mine]\nlike = 'cpu'\n[mine.environment]\n{name} = 'all'")

    with pytest.raises(SandboxError, match=f"{name} is not for a profile to set"):
        find_profile("mine", place)


def test_a_profile_adds_to_the_tables_of_the_one_it_is_like(tmp_path: Path) -> None:
    place = own(
        tmp_path,
        "[mine]\nlike = 'cuda'\n[mine.knobs]\nBATCH = '64'\n[mine.peak_flops]\n'Our GPU' = 1e12",
    )

    mine, cuda = find_profile("mine", place), find_profile("cuda")

    assert cuda.knobs | {"BATCH": "64"} == mine.knobs
    assert cuda.peak_flops | {"Our GPU": 1e12} == mine.peak_flops


def test_an_unknown_profile_is_refused_with_the_names_of_the_known_ones(tmp_path: Path) -> None:
    place = own(tmp_path, "[mine]\nlike = 'cpu'")

    with pytest.raises(UnknownProfile) as refusal:
        find_profile("tpu", place)

    assert "known profiles: cpu, cuda, " in refusal.value.hint
    assert ", jetson, mine, offline, own-torch;" in refusal.value.hint


def test_a_profile_of_ones_own_takes_what_it_leaves_out_from_another(tmp_path: Path) -> None:
    place = own(
        tmp_path,
        "[mine]\nlike = 'cpu'\nbase_image = 'team/base:7'\n[mine.environment]\nMINE = '1'",
    )

    mine, cpu = find_profile("mine", place), find_profile("cpu")

    assert ("mine", "team/base:7") == (mine.name, mine.base_image)
    assert cpu.torch == mine.torch
    assert cpu.variables | {"MINE": "1"} == mine.variables


def test_a_shipped_profile_is_not_changed_behind_a_persons_back(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="'cpu' is the name of a shipped profile"):
        find_profile("cpu", own(tmp_path, "[cpu]\nbase_image = 'x'"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mine", "profiles.toml: Expected ']'"),
        ("mine = 1", "'mine' is not a table"),
        ("[mine]\nlike = 'nobody'", "'nobody' is not a table"),
        ("[mine]\nlike = 'mine'", "is like itself"),
        ("[a]\nlike = 'b'\n[b]\nlike = 'a'", "is like itself"),
        ("[mine]\nbase_image = 'python:3.11'", "'mine': description: Field required"),
        ("[mine]\nlike = 'cpu'\nsurprise = 1", "'mine': surprise: Extra inputs"),
        ("[mine]\nlike = 'cpu'\ntorch = true", "'mine': torch"),
    ],
)
def test_profiles_that_cannot_be_used_are_refused_by_name(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(SandboxError, match=said):
        find_profile("cpu", own(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(SandboxError, match=r"profiles\.toml cannot be read"):
        known_profiles(tmp_path)


def test_an_environment_is_text_only() -> None:
    table: dict[str, Any] = {
        "description": "",
        "base_image": "",
        "packages": [],
        "torch": False,
        "devices": "none",
        "environment": {"N": 1},
    }

    with pytest.raises(SandboxError, match=r"environment\.N"):
        read_profiles({"mine": table})


def test_the_lock_pins_every_wheel_but_torch_by_hash_and_names_no_index() -> None:
    build = find_profile("cpu").torch
    assert isinstance(build, TorchBuild)

    text = lock_text(build)

    lock = read_lock(text)
    pinned = {requirement.partition("==")[0] for requirement in lock}
    torch_needs = {"filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"}
    assert set() == torch_needs - pinned
    assert "torch" not in pinned
    assert {64} == {len(sha) for hashes in lock.values() for sha in hashes}
    assert "://" not in text
