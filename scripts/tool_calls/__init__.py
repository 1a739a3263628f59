"""The demo's data, requests and their JSON tool calls, generated from a seed; `python -m tool_calls` writes them.

The package carries what seed 0 gives (`src/dual_lora/lab/data/tool-calls`), so that it needs none of this.
"""

from tool_calls.generator import TEST_SETS, Example, Splits, generate
from tool_calls.schema import TOOLS, Argument, Tool

__all__ = ["generate", "Example", "Splits", "Argument", "Tool", "TOOLS", "TEST_SETS"]
