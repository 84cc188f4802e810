"""The image: built once for each content, from a base that is checked first."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker
import pytest

from sandbox.contract.errors import ImageMissing
from sandbox.engine.find import Engine, connect
from sandbox.image.base import _pull, _target
from sandbox.image.check import (
    Contents,
    ImageUnfit,
    check_image,
    contents_problems,
    settings_problems,
)
from sandbox.image.debian import BaseUnavailable, archive_of, archive_sources
from sandbox.image.image import ImageRecord, Recipe, ensure_image, find_image, known_images
from sandbox.image.profiles import find_profile
from sandbox.image.wheels import Target
from sandbox.image.workshop import BuildFailed, Workshop
from tests.support.boxes import shipped_recipe

RECIPE = shipped_recipe()
CPU = RECIPE.profile
CHECK = (
    "import os, pwd, numpy, torch; "
    "print(torch.__version__, torch.version.cuda, os.getuid(), pwd.getpwuid(os.getuid()).pw_uid)"
)


@pytest.fixture
def client(engine: Engine) -> Iterator[docker.DockerClient]:
    with closing(connect(engine)) as client:
        yield client


def ensure(
    engine: Engine, state_dir: Path, said: list[str], recipe: Recipe = RECIPE
) -> ImageRecord:
    return ensure_image(
        engine, recipe, state_dir=state_dir, torch_index="", environ=os.environ, say=said.append
    )


@pytest.mark.docker
def test_a_second_set_up_does_nothing_and_is_quick(
    engine: Engine, image: ImageRecord, state_dir: Path
) -> None:
    said: list[str] = []
    started = time.monotonic()
    again = ensure(engine, state_dir, said)
    assert (image.image_id, False, []) == (again.image_id, again.built, said)
    assert time.monotonic() - started < 20  # under three on a quiet machine


@pytest.mark.docker
def test_the_image_runs_the_recorded_cpu_torch_as_a_user_without_rights(
    client: docker.DockerClient, image: ImageRecord
) -> None:
    container = client.containers.create(
        image.image_id, ["python", "-c", CHECK], network_mode="none", read_only=True
    )
    try:
        container.start()
        container.wait()
        expected = f"{image.torch} None 65534 65534"
        assert expected == container.logs(stderr=False).decode().strip()
    finally:
        container.remove(force=True)


@pytest.mark.docker
def test_the_image_starts_nothing_of_its_own(
    client: docker.DockerClient, image: ImageRecord
) -> None:
    settings = client.images.get(image.image_id).attrs["Config"]
    assert not settings["Entrypoint"]
    assert ("65534:65534", ["NONE"]) == (settings["User"], settings["Healthcheck"]["Test"])
    assert image.content_key == settings["Labels"]["nightlab.content-key"]


@pytest.mark.docker
def test_a_failed_build_shows_the_end_of_its_output_and_leaves_the_image_in_use(
    engine: Engine, image: ImageRecord, state_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "Dockerfile.train"
    broken.write_text("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN echo the-reason && exit 3\n")
    with pytest.raises(BuildFailed) as failure:
        ensure(engine, state_dir, [], shipped_recipe("cpu", image.base.image_id, broken))
    assert "the-reason" in failure.value.hint
    assert image.image_id == find_image(engine, RECIPE, state_dir=state_dir).image_id


@pytest.mark.docker
def test_without_set_up_the_image_is_missing_and_the_hint_says_what_to_do(
    engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(ImageMissing) as missing:
        find_image(engine, RECIPE, state_dir=tmp_path)
    assert "run `nightlab setup`" == missing.value.hint


@pytest.mark.docker
def test_an_image_removed_from_the_engine_is_missing(
    engine: Engine, image: ImageRecord, state_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for note in (state_dir / "images").glob("image-*.json"):
        gone = note.read_text().replace(image.reference, "nightlab-train:gone")
        (tmp_path / "images" / note.name).write_text(gone)
    with pytest.raises(ImageMissing, match="no longer on this engine"):
        find_image(engine, RECIPE, state_dir=tmp_path)


@pytest.mark.docker
def test_a_given_base_that_nobody_has_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match="neither on this engine nor"):
        ensure(engine, tmp_path, [], shipped_recipe("cpu", "127.0.0.1:1/nowhere:1"))


@pytest.mark.docker
def test_a_base_without_python_is_refused(
    engine: Engine, client: docker.DockerClient, tmp_path: Path
) -> None:
    client.api.import_image_from_data(tar_with("hello"), repository="nightlab-test", tag="bare")
    try:
        with pytest.raises(BaseUnavailable, match="no usable python3"):
            ensure(engine, tmp_path, [], shipped_recipe("cpu", "nightlab-test:bare"))
    finally:
        client.images.remove("nightlab-test:bare")


@pytest.mark.parametrize(
    "said",
    [
        '{"python": "3.10", "machine": "x86_64", "libc": "glibc"}',
        '{"python": "3.12", "machine": "x86_64", "libc": ""}',
        '{"python": "3.12", "machine": "riscv64", "libc": "glibc"}',
        "Traceback (most recent call last):",
        "",
    ],
)
def test_a_base_that_cannot_carry_torch_is_refused_with_the_reason(said: str) -> None:
    with pytest.raises(BaseUnavailable) as refusal:
        _target("some:base", said)
    assert "--base-image" in refusal.value.hint


def test_the_wheels_follow_the_python_of_the_base() -> None:
    said = '{"python": "3.12", "machine": "aarch64", "libc": "glibc"}'
    target = _target("some:base", said)
    assert (Target(python="3.12", machine="aarch64"), "cp312-aarch64") == (target, target.tag)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian", "VERSION_CODENAME": "bookworm"}, ("bookworm", "debian")),
        (
            {"ID": "ubuntu", "VERSION_CODENAME": "noble", "UBUNTU_CODENAME": "noble"},
            ("noble", "ubuntu"),
        ),
        (
            {
                "ID": "mint",
                "ID_LIKE": "ubuntu",
                "VERSION_CODENAME": "x",
                "UBUNTU_CODENAME": "noble",
            },
            ("noble", "ubuntu"),
        ),
    ],
)
def test_a_base_of_packages_is_of_the_suite_the_host_installs_from(
    release: dict[str, str], expected: tuple[str, str]
) -> None:
    assert expected == archive_of(release)


def test_a_host_without_debian_packages_is_told_how_else_to_get_a_base() -> None:
    with pytest.raises(BaseUnavailable) as refusal:
        archive_of({"ID": "fedora", "NAME": "Fedora Linux"})
    assert "--base-image" in refusal.value.hint


def test_the_base_comes_from_the_distributions_own_archives_only(tmp_path: Path) -> None:
    apt_get = tmp_path / "apt-get"
    lines = [
        "http://mirror/debian/|bookworm|main|Debian",
        "http://mirror/debian/|bookworm|main|Debian",
        "http://mirror/debian/|bookworm-updates|main|",
        "http://mirror/debian/|bookworm|contrib|Debian",
        "http://mirror/debian/|bookworm-backports|main|Debian",
        "http://elsewhere/tools/|bookworm|main|Somebody",
        "http://elsewhere/cloud/|cloud-bookworm|main|Debian",
    ]
    apt_get.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    apt_get.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sources = archive_sources("bookworm", "debian", environ)
    assert ["bookworm main", "bookworm-updates main"] == [
        source.partition("http://mirror/debian/ ")[2] for source in sources
    ]


def tar_with(name: str) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as writer:
        writer.addfile(tarfile.TarInfo(name))
    return archive.getvalue()


def digest_of(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


@contextmanager
def registry_of_one_image(name: str, tag: str) -> Iterator[tuple[str, str]]:
    """A registry on this machine; its address and its one image's digest."""
    layer = tar_with("hello")
    packed = gzip.compress(layer)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
        }
    ).encode()
    docker_type = "application/vnd.docker"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{docker_type}.distribution.manifest.v2+json",
            "config": {
                "mediaType": f"{docker_type}.container.image.v1+json",
                "size": len(config),
                "digest": digest_of(config),
            },
            "layers": [
                {
                    "mediaType": f"{docker_type}.image.rootfs.diff.tar.gzip",
                    "size": len(packed),
                    "digest": digest_of(packed),
                }
            ],
        }
    ).encode()
    manifests = f"/v2/{name}/manifests"
    pages = {
        "/v2/": b"{}",
        f"{manifests}/{tag}": manifest,
        f"{manifests}/{digest_of(manifest)}": manifest,
        f"/v2/{name}/blobs/{digest_of(config)}": config,
        f"/v2/{name}/blobs/{digest_of(packed)}": packed,
    }
    with served(pages, f"{docker_type}.distribution.manifest.v2+json") as address:
        yield address, digest_of(manifest)


@contextmanager
def served(pages: dict[str, bytes], manifest_type: str) -> Iterator[str]:
    class Registry(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            is_manifest = "/manifests/" in self.path
            self.send_header("Content-Type", manifest_type if is_manifest else "application/json")
            self.send_header("Content-Length", str(len(page or b"")))
            self.send_header("Docker-Content-Digest", digest_of(page or b""))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.docker
def test_a_base_is_pulled_by_the_digest_its_tag_stands_for(
    engine: Engine, client: docker.DockerClient, tmp_path: Path
) -> None:
    if engine.rootless:
        pytest.skip("a rootless engine does not see this machine's loopback registry")
    with registry_of_one_image("base", "3.11") as (address, digest):
        shop = Workshop(engine, client, tmp_path, {}, lambda _: None)
        pinned = _pull(shop, f"{address}/base:3.11")
    assert f"{address}/base@{digest}" == pinned
    assert [pinned] == client.images.get(pinned).attrs["RepoDigests"]
    client.images.remove(pinned)


@pytest.mark.docker
def test_a_silent_registry_is_said_aloud_and_no_error(
    engine: Engine, client: docker.DockerClient, tmp_path: Path
) -> None:
    said: list[str] = []
    shop = Workshop(engine, client, tmp_path, {}, said.append)
    assert _pull(shop, "127.0.0.1:1/base:3.11") is None
    assert "No registry gives it" in said[-1]


FIT = {"User": "65534:65534", "Env": ["LD_PRELOAD=", "NVIDIA_VISIBLE_DEVICES=void"]}
TOUCHES = [
    ({"User": ""}, "USER 0", "its user is"),
    ({"User": "1000:1000"}, "USER 1000:1000", "its user is '1000:1000'"),
    ({"Entrypoint": ["/start.sh"]}, 'ENTRYPOINT ["/start.sh"]', "an entrypoint"),
    ({"Volumes": {"/data": {}}}, "VOLUME /data", "volumes"),
    ({"OnBuild": ["RUN true"]}, "ONBUILD RUN true", "triggers"),
    ({"Healthcheck": {"Test": ["CMD", "true"]}}, "HEALTHCHECK CMD true", "a health check"),
    *[
        ({"Env": [setting]}, f"ENV {setting}", f"it sets {setting.partition('=')[0]} to ")
        for setting in (
            "NVIDIA_VISIBLE_DEVICES=all",
            "NVIDIA_REQUIRE_CUDA=cuda>=99.0",
            "NVIDIA_REQUIRE_ANYTHING=brand=tesla",
            "NVIDIA_MIG_CONFIG_DEVICES=all",
            "LD_PRELOAD=/lib/own.so",
            "LD_AUDIT=/lib/own.so",
            "LD_LIBRARY_PATH=/opt/own",
            "GLIBC_TUNABLES=glibc.malloc.check=1",
            "GCONV_PATH=/opt/own",
        )
    ],
    ({"Labels": {"nightlab.session": "x"}}, "LABEL nightlab.session=x", "'nightlab.session'"),
]


@pytest.mark.parametrize(("change", "problem"), [(change, said) for change, _, said in TOUCHES])
def test_an_image_that_could_widen_its_box_is_named_unfit(
    change: dict[str, object], problem: str
) -> None:
    assert [] == settings_problems(FIT)
    (said,) = settings_problems(FIT | change)
    assert problem in said


@contextmanager
def built(client: docker.DockerClient, base: str, *lines: str) -> Iterator[str]:
    """An image on the real engine with a few lines on top of another; gone afterwards."""
    tag = f"nightlab-test:{hashlib.sha256(repr(lines).encode()).hexdigest()[:16]}"
    recipe = "\n".join([f"FROM {base}", *lines]).encode()
    build = client.api.build(
        fileobj=io.BytesIO(recipe), tag=tag, network_mode="none", rm=True, decode=True
    )
    assert [] == [event for event in build if "error" in event]
    try:
        yield tag
    finally:
        client.images.remove(tag, force=True)


@pytest.mark.docker
@pytest.mark.parametrize(("line", "problem"), [(line, said) for _, line, said in TOUCHES])
def test_an_image_of_the_engine_that_could_widen_its_box_is_refused(
    client: docker.DockerClient, image: ImageRecord, line: str, problem: str
) -> None:
    with built(client, image.reference, line) as tag, pytest.raises(ImageUnfit) as refusal:
        check_image(client, tag, CPU)
    assert problem in refusal.value.message


@pytest.mark.docker
def test_what_a_base_asks_of_a_gpu_runtime_is_gone_from_what_is_built_on_it(
    client: docker.DockerClient, image: ImageRecord
) -> None:
    asking = "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_REQUIRE_CUDA=cuda>=12.8"
    neutral = next(line for line in RECIPE.dockerfile.splitlines() if line.startswith("ENV "))
    with built(
        client, image.reference, asking, "ENV LD_LIBRARY_PATH=/a LD_PRELOAD=/b", neutral
    ) as t:
        assert image.torch == check_image(client, t, CPU).torch


@pytest.mark.docker
@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["USER 0", "RUN rm -rf $(python3 -c 'import torch; print(torch.__path__[0])')"], "torch"),
        (["USER 0", "RUN rm $(command -v python3)"], "cannot import torch"),
    ],
)
def test_an_image_that_lost_its_python_or_its_torch_is_refused(
    client: docker.DockerClient, image: ImageRecord, lines: list[str], problem: str
) -> None:
    with (
        built(client, image.reference, *lines, "USER 65534:65534") as tag,
        pytest.raises(ImageUnfit, match=problem),
    ):
        check_image(client, tag, CPU)


@pytest.mark.docker
def test_an_image_whose_torch_cannot_use_the_profiles_gpus_is_refused(
    client: docker.DockerClient, image: ImageRecord
) -> None:
    with pytest.raises(ImageUnfit, match="built for no accelerator, not CUDA"):
        check_image(client, image.image_id, find_profile("cuda"))


CUDA_TORCH = Contents(
    python="3.12.3",
    torch="2.11.0+cu128",
    numpy="2.3.0",
    cuda="12.8",
    architectures=("sm_80", "sm_90", "sm_120"),
    user=65534,
)


@pytest.mark.parametrize(
    ("profile", "change", "problem"),
    [
        ("cuda", {"python": "3.10.12"}, "its Python is 3.10.12"),
        ("cuda", {"user": 0}, "run as user 0"),
        ("cuda", {"cuda": None}, "built for no accelerator, not CUDA"),
        ("cuda", {"cuda": "11.8"}, "built for CUDA 11.8, not CUDA 12.0"),
        ("cuda-blackwell", {"cuda": "12.6"}, "built for CUDA 12.6, not CUDA 12.8"),
        ("cuda-blackwell", {"architectures": ("sm_90",)}, "built for sm_90, not for sm_100"),
        ("jetson", {"architectures": ()}, "built for no GPU, not for sm_87"),
    ],
)
def test_an_image_that_is_not_for_its_profile_is_refused_with_the_reason(
    profile: str, change: dict[str, object], problem: str
) -> None:
    assert [] == contents_problems(CUDA_TORCH, find_profile("cuda-blackwell"))
    contents = CUDA_TORCH.model_copy(update=change)
    (said,) = contents_problems(contents, find_profile(profile))
    assert problem in said


def test_a_torch_for_gpus_is_no_obstacle_on_a_machine_without() -> None:
    plain = find_profile("own-torch")
    assert [] == contents_problems(CUDA_TORCH, plain)
    asks = plain.model_copy(update={"oldest_build": "13.0"})
    assert ["its torch is built for CUDA 12.8, not CUDA 13.0"] == contents_problems(
        CUDA_TORCH, asks
    )


@pytest.mark.docker
def test_an_image_is_not_built_anew_for_what_programs_are_only_told(
    engine: Engine, image: ImageRecord, state_dir: Path
) -> None:
    told = CPU.model_copy(update={"environment": {"MORE": "1"}, "peak_flops": {"a CPU": 1e11}})
    same = RECIPE.model_copy(update={"profile": told})
    assert image.image_id == find_image(engine, same, state_dir=state_dir).image_id


@pytest.mark.docker
def test_an_image_without_torch_is_refused_before_its_first_use(
    client: docker.DockerClient, image: ImageRecord
) -> None:
    with (
        built(client, image.base.reference, "USER 65534:65534") as tag,
        pytest.raises(ImageUnfit, match="cannot import torch"),
    ):
        check_image(client, tag, CPU)


@pytest.mark.docker
def test_a_profile_that_brings_its_own_torch_must_be_told_the_image(
    engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(BaseUnavailable, match="own-torch needs a base image"):
        ensure(engine, tmp_path, [], shipped_recipe("own-torch"))


@pytest.mark.docker
def test_the_images_that_were_built_are_known_by_name(
    engine: Engine, image: ImageRecord, state_dir: Path, tmp_path: Path
) -> None:
    assert image.reference in [known.reference for known in known_images(engine, state_dir)]
    assert [] == known_images(engine, tmp_path)
