"""What a score takes at least: logits, seconds, memory."""

import json
from pathlib import Path
from typing import NamedTuple

from agent.settings import Settings
from sandbox.contract.errors import UsageError

BATCH_BYTES, BATCH_ROWS = 16 << 20, 64
"""Of logits in one answer at most, unless one row has more: as `evaluate.py` asks for them."""
CHECK_ROWS, CHECKED_SHARE = 580, 0.75
"""How many rows a check box is asked for, at most and of all."""
LOGITS_BYTES_A_SECOND = 300e6
"""What one core of a scorer takes in; 340 to 940 MB a second on two busy cores."""
BATCHES_AT_ONCE = 4
"""One that arrives and one that is computed, with what that takes beside it."""
ROW_POSITION_BYTES = 64
"""Of plans and costs, for each position that is asked for."""
BASE_BYTES = 96 << 20
"""Python and numpy."""


class ScoreCost(NamedTuple):
    """What one score of prepared text takes, whatever the model is."""

    logits_bytes: int
    seconds: float
    """Of the scorer alone; what the model takes to compute them comes on top."""
    memory_bytes: int
    """Of the scorer box."""

    @property
    def words(self) -> str:
        """For a person."""
        return (
            f"a score moves {self.logits_bytes / 1e9:.2f} GB of logits: about {self.seconds:.0f} s "
            f"for the scorer beside the model's own time, and {self.memory_bytes / 1e6:.0f} MB"
        )


def score_cost(rows: int, context: int, vocab_size: int, checks: int) -> ScoreCost:
    """The cost of a score with so many check boxes.

    Args:
        rows: of the split.
        context: tokens of a row.
        vocab_size: logits of a position.
        checks: boxes that are asked again, one after another.
    """
    row_bytes = context * vocab_size * 4
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
    asked = rows + checks * min(CHECK_ROWS, int(rows * CHECKED_SHARE))
    logits = asked * row_bytes
    memory = BASE_BYTES + BATCHES_AT_ONCE * batch_rows * row_bytes
    memory += asked * context * ROW_POSITION_BYTES
    return ScoreCost(logits, logits / LOGITS_BYTES_A_SECOND, memory)


def cost_of_data(settings: Settings, data_dir: Path) -> ScoreCost | None:
    """What a score of the larger held-out split takes; None for data that is no text.

    Raises:
        UsageError: it does not fit into [scoring].
    """
    data, bounds = settings.data, settings.scoring
    if data is None or bounds is None:
        return None
    splits = json.loads((data_dir / "manifest.json").read_text()).get("splits") or {}
    if "tokens" not in splits.get("val", {}):
        return None
    tokens = max(splits[split]["tokens"] for split in ("val", "holdout"))
    rows, vocab_size = -(-tokens // data.context), data.vocab_size
    cost = score_cost(rows, data.context, vocab_size, checks=bounds.model_boxes - 1)
    smaller = "lower rows, vocab_size or context under [data]"
    if cost.memory_bytes > bounds.memory_bytes:
        raise UsageError(
            f"{cost.words}, and memory under [scoring] is {bounds.memory_bytes / 1e6:.0f} MB",
            f"raise memory under [scoring], or {smaller}",
        )
    # The wall is one box's, and the first is asked for every row.
    if score_cost(rows, data.context, vocab_size, checks=0).seconds > bounds.wall_seconds:
        raise UsageError(
            f"{cost.words}, and wall_seconds under [scoring] is {bounds.wall_seconds:.0f}",
            f"raise wall_seconds under [scoring], or {smaller}",
        )
    return cost
