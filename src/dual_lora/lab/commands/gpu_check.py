"""dual-lora gpu-check"""

import sys
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group

from dual_lora.lab.commands.card import facts_card, figures_table, finish, size
from dual_lora.lab.commands.parameters import Json


def gpu_check(
    *,
    targets: Annotated[
        list[str] | None,
        Parameter(help="Without a GPU: architectures to compile for. [default: sm_80 sm_90]", consume_multiple=True),
    ] = None,
    json: Json = False,
) -> None:
    """Test the GPU kernels on this machine: are they used, are their results right, and how fast are they?

    Without a GPU the command prints whether named cards would use them, compiles them, and runs them in Triton's
    interpreter (a minute or two). Exit status 1 if a kernel is wrong, 2 if none could be tested. docs/how-to/gpu.md
    says what each line of the output means.

    Example: `dual-lora gpu-check --json > gpu-check.json`
    """
    from dual_lora.lab.gpu_check import COMPILED, check
    from dual_lora.lab.progress import console

    result = check(tuple(targets or COMPILED), lambda text: None if json else console.print(text, style="dim"))
    finish(result, page(result), json)
    if not result["right"]:
        sys.exit(2 if result["right"] is None else 1)


def page(result: dict[str, Any]) -> Group:
    """Everything on one page."""
    verdict = {
        True: "✓ every kernel tried is right",
        False: "✗ a kernel is wrong or broke: see the lines with ✗",
        None: "✗ no kernel was tried: see above why",
    }[result["right"]]
    parts: list[Any] = [
        facts_card("versions", {name: version or "–" for name, version in result["versions"].items()}),
        facts_card("who computes on", result["chosen"]),
    ]
    for card in result.get("cards", ()):
        facts = {"card": f"{card['name']}, {size(card['memory'])}", "path": card["path"]}
        facts |= {
            name: _words(card[name]) for name in card if name not in ("device", "name", "memory", "path", "launches")
        }
        parts += [facts_card(card["device"], facts), _launches(card["launches"], "against fp64")]
    if "interpreter" in result:
        parts.append(_launches(result["interpreter"], "in Triton's interpreter, against fp64"))
    for target, found in result.get("compiled", {}).items():
        parts.append(_launches(found, f"compiled for {target}"))
    if len(result.get("cards", ())) < 2:
        parts.append("A second card: none here, so kernels on another device than the first were not tried.")
    return Group(*parts, verdict)


def _launches(found: list[dict[str, Any]] | str, title: str) -> Any:
    if isinstance(found, str):
        return facts_card(title, {"not run": found})
    rows = [
        [
            f"{'✓' if line['right'] else '✗'} {line['kernel']}",
            line["dtype"],
            line["tile"],
            "yes" if line["aligned"] else "no",
            "fixed" if line["deterministic"] else "any",
            _words(line["error"]) if line.get("shared") is None else f"{line['shared'] // 1024} KiB shared",
        ]
        for line in found
    ]
    return figures_table(title, ["kernel", "dtype", "tile", "aligned", "order of sums", "result"], rows)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2g}" if isinstance(value, float) else str(value)
