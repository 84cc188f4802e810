"""Makes three splits that hold nothing but their name."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--source")
parser.add_argument("--output", type=Path)
parser.add_argument("--vocab-size")
parser.add_argument("--context")
parser.add_argument("--rows")
parser.add_argument("--cache")
output = parser.parse_args().output
for split in ("train", "val", "holdout"):
    (output / split).mkdir(parents=True, exist_ok=True)
    (output / split / "name.txt").write_text(split)
(output / "manifest.json").write_text(json.dumps({"source": "toy", "splits": {}}))
