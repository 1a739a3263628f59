"""GGUF files for llama.cpp and Ollama: a merged model with its Modelfile, or an adapter as a LoRA.

llama.cpp's published converters and its quantiser write them; they are not part of this package.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dual_lora.lab.data.encode import fixed_date
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import Exported, export_lora, merge
from dual_lora.lab.files.write import free_file, write_atomically
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.model.own_code import own_code
from dual_lora.lab.permission import SAFE_PATH
from dual_lora.lab.read import expanded

SCRIPT, LORA_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
ON_PATH = (SCRIPT, "convert-hf-to-gguf", "llama-convert-hf-to-gguf")
QUANTISER = "llama-quantize"
VARIABLE = "DUAL_LORA_GGUF_CONVERTER"


@dataclass
class GgufResult:
    """A GGUF file, its size in bytes, its number of tensors, what wrote it, and Ollama's Modelfile.

    modelfile: its path, or None where one is there or the tokenizer's chat template cannot be written as Ollama's;
    `remark` says why.
    """

    file: str
    bytes: int
    tensors: int
    converter: str
    modelfile: str | None = None
    remark: str = ""


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    outtype: str = "auto",
    quantize: str | None = None,
    converter: str | None = None,
) -> GgufResult:
    """Merge a run or adapter and convert the result to the GGUF file ``out``, with a Modelfile for Ollama next to it.

    outtype: the converter's --outtype (f32, f16, bf16, q8_0, auto). quantize: a type of llama-quantize (Q4_K_M, …).
    converter: its script, or llama.cpp's folder; left out: $DUAL_LORA_GGUF_CONVERTER, then the PATH. Raises UserError
    where there is none or it fails.
    """
    _check_name(out)
    command = find_converter(converter)
    quantiser = find_quantiser(command) if quantize else None
    with free_file(out) as (target, space):
        merged = merge(source, space / target.stem, base=base, dtype=dtype)
        written = space / target.name
        tensors = _run([*command, merged.folder, "--outfile", str(written), "--outtype", outtype], written)
        if quantiser:
            whole = written.replace(written.with_suffix(".whole"))  # no name that the result could have
            tensors = _run([quantiser, str(whole), str(written), str(quantize)], written)
        modelfile, remark = _write_modelfile(Path(merged.folder), target)
    return GgufResult(str(target), target.stat().st_size, tensors, command[-1], modelfile, remark)


def export_gguf_lora(
    source: str | Path,
    out: str | Path,
    rank: int | float,
    *,
    base: str | None = None,
    dtype: str | None = None,
    outtype: str = "f32",
    converter: str | None = None,
    **measured: Any,
) -> Exported:
    """Write the nearest LoRA of a Dual LoRA as a GGUF adapter (llama.cpp's --lora); and say what it loses.

    rank, and `data` and `limit` by name: as for `export_lora`. outtype, converter: as for `export_gguf`. A Modelfile
    needs the base's GGUF file as well, which is not known here: none is written.
    """
    _check_name(out)
    command = _sibling(find_converter(converter), LORA_SCRIPT)
    with free_file(out) as (target, space):
        lora, written = space / target.stem, space / target.name
        tuned = open_tuned(source, base, dtype)
        model = tuned.model.get_base_model()
        model.config.architectures = [type(model).__name__]  # as a saved model has it
        model.config.save_pretrained(space)
        exported = export_lora(source, lora, rank, base=base, dtype=dtype, opened=tuned, **measured)
        arguments = [str(lora), "--base", str(space), "--outfile", str(written), "--outtype", outtype]
        _run([*command, *arguments], written)
    return replace(exported, folder=str(target))


def _check_name(out: str | Path) -> None:
    if Path(out).suffix != ".gguf":
        raise UserError(f"The output is {out}, expected a file name that ends in .gguf.")


def _run(command: list[str], written: Path) -> int:
    """Run a tool of llama.cpp and return the number of tensors of what it wrote. Raises UserError where it fails."""
    env = {name: value for name, value in os.environ.items() if name != SAFE_PATH}  # a script imports what lies by it
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", errors="replace", check=False)
    tool = next(part for part in command if part != sys.executable)
    if done.returncode or not written.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{tool} failed (exit code {done.returncode}): {last}")
    return _tensor_count(written, tool)


def _write_modelfile(model: Path, target: Path) -> tuple[str | None, str]:
    from transformers import AutoTokenizer

    file = target.with_suffix(".Modelfile")
    if os.path.lexists(file):
        return None, f"{file} is there already, and is left as it is"
    try:
        text = modelfile(AutoTokenizer.from_pretrained(model, **own_code()), f"./{target.name}")
    except UserError as error:
        return None, str(error)
    try:
        write_atomically(file, text)
    except OSError as error:  # the GGUF file is whole, and the same command would refuse to write it again
        return None, f"{file} could not be written: {error.strerror or error}"
    return str(file), ""


def find_converter(given: str | None = None) -> list[str]:
    """The command that starts llama.cpp's converter. Raises UserError that says where it was sought and how to get it.

    A script that was named runs in this Python, which has what it needs; one on the PATH runs as it was installed.
    """
    for where, path in (("--converter", given), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if path:
            script = expanded(path, "converter")
            script = script / SCRIPT if script.is_dir() else script
            if not script.is_file():
                raise UserError(f"{where} is {path}, but there is no {script}.")
            return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]
    if found := next(filter(None, map(shutil.which, ON_PATH)), None):
        return [found]
    raise UserError(
        f"llama.cpp's converter was not found: no --converter, no ${VARIABLE}, no {SCRIPT} on the PATH. Get it with "
        "`git clone --depth 1 https://github.com/ggml-org/llama.cpp` and give --converter llama.cpp, or write the "
        "merged folder (--to merged) and convert it where llama.cpp is."
    )


def find_quantiser(converter: list[str]) -> str:
    """llama-quantize: on the PATH, or where llama.cpp was built. Raises UserError where it is not."""
    folder = Path(converter[-1]).resolve().parent
    built = folder / "build" / "bin"
    found = shutil.which(QUANTISER, path=f"{folder}{os.pathsep}{built}") or shutil.which(QUANTISER)
    if found is None:
        raise UserError(
            f"{QUANTISER} was not found on the PATH, in {folder} or in {built}: build llama.cpp, or "
            "leave out --quantize and give --outtype q8_0, which its converter writes by itself."
        )
    return found


def _sibling(converter: list[str], script: str) -> list[str]:
    """The command of another script in the converter's folder."""
    path = Path(converter[-1]).resolve().parent / script
    if not path.is_file():
        raise UserError(f"There is no {path}, which llama.cpp has next to {SCRIPT}: give its folder by --converter.")
    return [sys.executable, str(path)]


def _tensor_count(file: Path, converter: str) -> int:
    """Number of tensors of a GGUF file, from its header: magic, version, tensors (64 bits, little-endian)."""
    header = file.open("rb").read(16)
    if len(header) < 16 or header[:4] != b"GGUF":
        raise UserError(f"{converter} wrote no GGUF file (its first bytes are {header[:4]!r}).")
    return int.from_bytes(header[8:16], "little")


# Ollama's templates are Go's, tokenizers' are Jinja. Taken over is what a template writes around a message of each
# role, read off conversations that it renders; the result is compared with the tokenizer's own on other conversations.
# A template that does more than that (dates, trimming) is an error.
_ROLES = ("system", "user", "assistant")
_MARK = {role: f"⟦{role} says⟧" for role in _ROLES}


def modelfile(tokenizer: Any, weights: str, adapter: str | None = None) -> str:
    """An Ollama Modelfile: where the weights are, how conversations are written, where an answer ends.

    weights: the base's or merged GGUF file. adapter: a LoRA's GGUF file. Raises UserError where the tokenizer's
    template is not a fixed text around each message.
    """
    lines = [f"FROM {weights}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    ends = [tokenizer.eos_token]
    if getattr(tokenizer, "chat_template", None):
        around, default, start = _pieces(tokenizer)
        ends.append(around["assistant"][1].strip())
        _check(tokenizer, around, default, start)
        texts = [*(text for pair in around.values() for text in pair), default, start]
        ends_early = any(text.endswith('"') for text in (default, start))  # of three quotes, with the Modelfile's own
        if ends_early or any(sign in text for text in texts for sign in ('"""', "{{", "}}")):
            raise UserError(
                "The chat template holds signs that a Modelfile gives a meaning: write its TEMPLATE by hand."
            )
        branches = "".join(
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(around.items())
        )
        lines.append(f'TEMPLATE """{{{{- range .Messages }}}}{branches}{{{{ end }}}}{{{{- end }}}}{start}"""')
        if default:
            lines.append(f'SYSTEM """{default}"""')
    for end in dict.fromkeys(ends):
        if end and not (end.isprintable() and '"' not in end and "\\" not in end):
            raise UserError(
                f"An answer ends with {end!r:.100}, which no line of a Modelfile can hold: write it by hand."
            )
        lines += [f'PARAMETER stop "{end}"'] if end else []
    return "\n".join(lines) + "\n"


def _render(tokenizer: Any, messages: list[tuple[str, str]], start: bool = False) -> str:
    from dual_lora.verify.template import rendered  # which imports PEFT

    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        more = fixed_date(tokenizer)
        text = rendered(tokenizer, chat, add_generation_prompt=start, **more)
    except Exception as error:  # a template's own refusals, of a role or an order
        raise UserError(f"The chat template cannot be written for Ollama: {error}") from error
    # Where the tokenizer puts a first token, llama.cpp does as well.
    puts_first = tokenizer.bos_token and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if puts_first else text


def _pieces(tokenizer: Any) -> tuple[dict[str, tuple[str, str]], str, str]:
    """({role: (text before, text after)}, the system message that it writes unasked, the start of an answer)."""
    whole = _render(tokenizer, [(role, _MARK[role]) for role in _ROLES])
    if any(whole.count(mark) != 1 for mark in _MARK.values()):
        raise UserError("The chat template does not write each message once; it cannot be written for Ollama.")
    two = _render(tokenizer, [("system", _MARK["system"]), ("user", _MARK["user"])])
    one = _render(tokenizer, [("system", _MARK["system"])])
    before, after = one.split(_MARK["system"])
    around = {"system": (before, after)}
    for role, shorter, longer in (("user", one, two), ("assistant", two, whole)):
        if not longer.startswith(shorter) or _MARK[role] not in longer[len(shorter) :]:
            raise UserError("The chat template writes a message differently when more follow; Ollama's cannot.")
        left, right = longer[len(shorter) :].split(_MARK[role])
        around[role] = (left, right)
    start = _render(tokenizer, [("system", _MARK["system"])], start=True)[len(one) :]
    alone = _render(tokenizer, [("user", _MARK["user"])])
    unasked = alone.removesuffix(_MARK["user"].join(around["user"]))
    default = unasked.removeprefix(before).removesuffix(after) if unasked.startswith(before) else ""
    return around, default, start


def _check(tokenizer: Any, around: dict[str, tuple[str, str]], default: str, start: str) -> None:
    """Raise UserError unless the pieces give what the tokenizer gives, for conversations that were not used above."""
    for chat in (
        [("user", "One line.")],
        [("user", " spaces around \n"), ("assistant", " Yes.\n"), ("user", 'A "quoted" question?')],
        [("system", " Be brief.\n"), ("user", "Why?"), ("assistant", "So."), ("user", "And then?")],
    ):
        whole = chat if chat[0][0] == "system" or not default else [("system", default), *chat]
        own = "".join(content.join(around[role]) for role, content in whole) + start
        if own != _render(tokenizer, chat, start=True):
            raise UserError(
                "The chat template cannot be written into the Modelfile: it does more than put a fixed text around "
                "each message. Write the Modelfile's TEMPLATE by hand."
            )
