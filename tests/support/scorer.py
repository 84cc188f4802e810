"""The shipped scorer in this process, and a made-up language for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

PROGRAM = Path(__file__).parents[2] / "workspace" / "evaluate.py"
Array = np.ndarray[Any, Any]
VOCABULARY = 41
BOS = 40
CONTEXT = 32


def load_evaluate(wall: str = "", hole: str = "") -> Any:
    """The shipped scorer, or the same with one wall replaced by a hole."""
    source = PROGRAM.read_text()
    assert wall in source
    module = ModuleType(f"nightlab_evaluate_{abs(hash(wall))}")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(wall, hole, 1), PROGRAM, "exec"), module.__dict__)
    return module


def write_data(folder: Path, stream: list[int], token_bytes: list[int], context: int) -> Path:
    folder.mkdir(exist_ok=True)
    np.array(stream, dtype="<u2").tofile(folder / "tokens.bin")
    meta = {
        "vocab_size": len(token_bytes),
        "bos_token": len(token_bytes) - 1,
        "context": context,
        "documents": [place for place, token in enumerate(stream) if token == len(token_bytes) - 1],
        "token_bytes": token_bytes,
        "bytes": sum(token_bytes[token] for token in stream),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def habits(seed: int) -> Array:
    """Bigram probabilities of a made-up language; BOS predicts like any other token."""
    return np.random.default_rng(seed).dirichlet(np.full(BOS, 0.15), size=VOCABULARY)
