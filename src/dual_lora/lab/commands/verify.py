"""dual-lora verify"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.panel import Panel

from dual_lora.lab.commands.card import duration, facts_card, finish
from dual_lora.lab.commands.parameters import Base, Device, Dtype, Json
from dual_lora.lab.model.location import check_source
from dual_lora.lab.progress import stage

if TYPE_CHECKING:
    from dual_lora.lab.verify.verify import Report


def verify(
    source: Annotated[str, Parameter(help="Run folder or adapter folder, of any PEFT method.")],
    *,
    against: Annotated[str | None, Parameter(help="Compare it with a merged folder or a .gguf file.")] = None,
    adapter: Annotated[str | None, Parameter(help="Compare it with another adapter's folder.")] = None,
    endpoint: Annotated[
        str | None,
        Parameter(help="Compare it with an OpenAI-compatible server, by its URL."),
    ] = None,
    model: Annotated[
        str | None, Parameter(help="The adapter's name on that server, as in the field `model` of a request.")
    ] = None,
    prompts: Annotated[
        str | None,
        Parameter(help="Records, or a .txt file with one prompt a line. [default: the fingerprint's, or the run's]"),
    ] = None,
    timeout: Annotated[float, Parameter(help="Seconds that the server may take for each answer.")] = 60.0,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Is an adapter on? Is it the one that was trained? Does the served model agree with it?

    Compares log-probabilities: of single tokens, or of a classifier's classes. Exit status 0 if all is well, 1 if not.

    Example: `dual-lora verify runs/boolq-smollm2 --against merged/`

    A server:

    `dual-lora verify runs/mine --endpoint http://localhost:8000/v1 --model mine`

    The answer is one of: on, rounded (and how much), off, another adapter, merged twice, λ below 1, other scale, layers
    dropped, wrong chat template, other tokenizer, undecided. docs/how-to/verify.md explains each. A server's token is
    read from DUAL_LORA_API_KEY or OPENAI_API_KEY.
    """
    check_source(source)
    for candidate in filter(None, (against, adapter)):
        check_source(candidate)
    with stage(f"comparing log-probabilities with those of {source}"):
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.verify.verify import verify as run_verification

        use_device(device)
        report = run_verification(
            source, against=against, adapter=adapter, endpoint=endpoint, model=model, prompts=prompts, base=base,
            dtype=dtype, timeout=timeout,
        )  # fmt: skip
    finish(report.summary(), _card(report), json)
    if not report.good:
        raise SystemExit(1)


def _card(report: Report) -> Panel:
    found = report.finding
    many = "classes" if report.unit == "class" else f"{report.unit}s"
    facts = {"verdict": f"{found.word}: {found.cause}", "candidate": report.candidate}
    if found.strength is not None and found.strength_error is not None:
        facts["strength"] = f"{found.strength:.3f} ± {found.strength_error:.3f} (0: the base, 1: the adapter)"
    if found.residual is not None:
        facts["difference"] = (
            f"{found.residual:.4f} nats a {report.unit}; the adapter's effect is {found.effect:.4f}, bf16 rounds by "
            f"{found.rounding:.4f}"
        )
    facts["asked"] = (
        f"{found.tokens} {many} of {found.prompts} {report.asks} ({report.prompts}), {duration(report.seconds)}"
    )
    if report.notes:
        facts["note"] = "\n".join(report.notes)
    panel = facts_card(f"verify · {report.source}", facts)
    panel.border_style = "green" if report.good else "red"
    return panel
