"""The demo's task: English requests to JSON tool calls, generated from a seed."""

from dual_lora.lab.toolcalls.generator import TEST_SETS, Example, Splits, generate, messages_for
from dual_lora.lab.toolcalls.schema import TOOLS, Argument, Tool

__all__ = ["generate", "messages_for", "Example", "Splits", "Argument", "Tool", "TOOLS", "TEST_SETS"]
