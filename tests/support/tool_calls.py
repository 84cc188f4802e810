"""Calls of tools as a researcher makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.night.toolbox import Toolbox, ToolResult


@dataclass
class Tools:
    """Calls as a researcher makes them."""

    root: Path
    tools: Toolbox

    def call(self, tool: str, **arguments: Any) -> ToolResult:
        return self.tools.call(tool, arguments, "claude")

    def told(self, tool: str, **arguments: Any) -> Any:
        result = self.call(tool, **arguments)
        assert not result.is_error, result.text
        return json.loads(result.text)

    def refused(self, tool: str, **arguments: Any) -> dict[str, str]:
        result = self.call(tool, **arguments)
        assert result.is_error, result.text
        answer: dict[str, str] = json.loads(result.text)
        assert ["error", "message", "hint"] == list(answer)
        assert str(self.root) not in result.text
        return answer

    @property
    def train(self) -> str:
        return (self.root / "train.py").read_text()
