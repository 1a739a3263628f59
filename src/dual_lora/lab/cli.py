"""The command line ``dual-lora``. A command is a file of its own, imported when it is called."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from typing import Any

from cyclopts import App, Argument, CycloptsError, Group, MissingArgumentError, UnknownOptionError, UnusedCliTokensError
from rich.text import Text

import dual_lora
from dual_lora._warning import DualLoraWarning
from dual_lora.lab.commands.plain import HELP_ALL, PLAIN_FLAGS, show_all
from dual_lora.lab.errors import UserError, described, is_disk_full, memory_full, suggest
from dual_lora.lab.interrupt import exit_status, on_signals, stop_at_once
from dual_lora.lab.noise import silence_libraries
from dual_lora.lab.permission import FLAG, allow
from dual_lora.lab.terminal import Console, guarded

# name, "module:function", one line of help. A new command is a new line.
COMMANDS: list[tuple[str, str, str]] = [
    ("train", "dual_lora.lab.commands.train:train", "Fine-tune a model, by a recipe or by options."),
    ("evaluate", "dual_lora.lab.commands.evaluate:evaluate", "Measure a run, an adapter or a model."),
    ("predict", "dual_lora.lab.commands.predict:predict", "Label or answer every record of a file."),
    ("generate", "dual_lora.lab.commands.generate:generate", "Answer one prompt."),
    ("chat", "dual_lora.lab.commands.chat:chat", "Chat with a run, an adapter or a model."),
    ("demo", "dual_lora.lab.commands.demo:demo", "Watch a small model learn to write tool calls, in minutes on a CPU."),
    (
        "recipes",
        "dual_lora.lab.commands.recipes:app",
        "Write a recipe for your data; list, show and copy shipped ones.",
    ),
    ("check-data", "dual_lora.lab.commands.check_data:check_data", "Check labels, lengths and duplicates of records."),
    ("estimate", "dual_lora.lab.commands.estimate:estimate", "Estimate memory, arithmetic and time of a run."),
    ("merge", "dual_lora.lab.commands.export:merge", "Merge an adapter, and write a plain model folder."),
    ("export", "dual_lora.lab.commands.export:export", "Write an adapter for other programs: merged, GGUF, LoRA."),
    ("verify", "dual_lora.lab.commands.verify:verify", "Check that an adapter is on, here or on a server."),
    ("card", "dual_lora.lab.commands.hub:card", "Write a run's card for a model hub."),
    ("push", "dual_lora.lab.commands.hub:push", "Upload a run's adapter and card to a model hub."),
    ("advise", "dual_lora.lab.commands.advise:advise", "Find out whether LoRA or Dual LoRA is better on your data."),
    ("compare", "dual_lora.lab.commands.compare:compare", "Compare methods over tasks and seeds, with verdicts."),
    ("judge", "dual_lora.lab.commands.judge:judge", "Give verdicts on scores from elsewhere: CSV, lm-eval, PEFT."),
    ("analyze", "dual_lora.lab.commands.analyze:analyze", "Measure what runs did to the weights."),
    ("report", "dual_lora.lab.commands.report:report", "Write one HTML page of runs, studies and analyses."),
    ("info", "dual_lora.lab.commands.info:info", "Print versions, devices, kernels and what each method can do."),
    ("gpu-check", "dual_lora.lab.commands.gpu_check:gpu_check", "Test the GPU kernels, with or without a card."),
    ("schema", "dual_lora.lab.commands.recipes:schema", "Print the JSON Schema of a recipe or a study, for editors."),
    ("completion", "dual_lora.lab.commands.completion:completion", "Install completion by the tab key in your shell."),
]
# The panels of `--help`, each by the command that it begins with.
PANELS = {
    "train": "Train and use",
    "recipes": "Prepare",
    "merge": "Merge, serve and publish",
    "advise": "Compare and understand",
    "info": "This machine",
}

# Commands that people look for, and what does it.
INSTEAD = {
    "serve": "Merge the run (`dual-lora merge RUN OUT`) and give the folder to a server, as in `vllm serve OUT`: "
    "docs/how-to/merge-and-serve.md shows which server takes what.",
}

# What people of other trainers type, and where a recipe has it.
ELSEWHERE = {
    "--lr": "--train.learning-rate",
    "--r": "--method.r",
    "--rank": "--method.r",
    "--alpha": "--method.alpha",
    "--dropout": "--method.dropout",
    "--target-modules": "--method.target_modules",
    "--seed": "--train.seed",
    "--bf16": "--model.dtype",
    "--train.lr": "--train.learning-rate",
    "--train.bs": "--train.batch-size",
    "--data.file": "--data.train",
    "--data.path": "--data.train",
    "--data.text": "--data.fields.text",
    "--data.label": "--data.fields.label",
    "--dataset-name": "--data.train",
    "--output-dir": "--out",
    "--train.output-dir": "--out",
}
# Earlier spellings, which still work: one thing has one name in all commands.
RENAMED = {
    "estimate": {
        "--batch": "--batch-size",
        "--length": "--max-length",
        "--checkpointing": "--gradient-checkpointing",
        "--no-checkpointing": "--no-gradient-checkpointing",
        "--quantisation": "--quantize",
    },
}
EVERYWHERE = (
    f"Every command: `{FLAG} NAME` lets a recipe, a study or a run import the module NAME, and so run its code; "
    "`--debug` shows where an error comes from."
)


def build_app(wanted: str | None = None, everything: bool = False) -> App:
    """The application. Only the module of the command ``wanted`` is imported, the others show their line of help.

    everything: all of them, for what lists every option.
    """
    app = App(
        name="dual-lora",
        help="Fine-tune by LoRA, Dual LoRA or another PEFT method; use, merge and verify adapters; compare methods.\n\n"
        "Example: `dual-lora train boolq-smollm2`",
        version=dual_lora.__version__,
        help_format="markdown",
        help_epilogue=EVERYWHERE,
        default_parameter=PLAIN_FLAGS,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,  # what a signal ended has its own exit status, see below
        print_error=False,
    )
    panel = Group(sort_key=-1)
    for place, (name, target, text) in enumerate(COMMANDS):
        if name in PANELS:
            panel = Group(PANELS[name], sort_key=place)
        if everything or name == wanted:
            module, _, function = target.partition(":")
            app.command(getattr(import_module(module), function), name=name)
        else:
            app.command(App(help=text, group=panel, sort_key=place), name=name)
    app["--help"].group = app["--version"].group = Group("Options", sort_key=len(COMMANDS))
    return app


@guarded()
def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every foreseeable failure is one sentence on standard error and exit code 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    show_all(HELP_ALL in given)
    given = ["--help" if a == HELP_ALL else a for a in given]
    debug = "--debug" in given
    given, modules = _split_allowed_modules(a for a in given if a != "--debug")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would tear ours
    # transformers 5.25 fetches code for a model's layers and runs it, on a GPU, unless it is told not to.
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    if not debug:
        silence_libraries()
        # Our own may point at a caller in one of those: factors that do not move must not do so in silence.
        warnings.filterwarnings("default", category=DualLoraWarning)
        warnings.showwarning = _warn
    wanted = next((a for a in given if not a.startswith("-")), None)
    names = [name for name, _, _ in COMMANDS]
    try:
        if wanted is not None and wanted not in names:
            instead = f" {INSTEAD[wanted]}" if wanted in INSTEAD else suggest(wanted, names)
            raise UserError(f"There is no command {wanted!r}.{instead}")
        _check_text(given)
        for module in modules:
            allow(module)
        with on_signals(stop_at_once), _help_without_sources():
            build_app(wanted)(_with_new_option_names(given, RENAMED.get(wanted or "", {})))
    except KeyboardInterrupt as error:
        _fail(str(error) or "Interrupted.", given, exit_status(error))
    except BrokenPipeError:  # the reader of our output has gone, as in `dual-lora recipes list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except CycloptsError as error:
        _fail(_field_problems(error.__cause__ or error.__context__) or _usage_error(error, wanted), given)
    except Exception as error:
        if debug:
            _trace()
        if memory_full(error):  # what filled it is held by the calls that the error came through
            traceback.clear_frames(error.__traceback__)
        _fail(str(error) if isinstance(error, UserError) else _field_problems(error) or _in_a_sentence(error), given)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers and other libraries in Rust, and no Exception
            raise
        if debug:
            _trace()
        _fail(f"A library crashed, perhaps because of the model's files: {described(error)}.", given)


@contextmanager
def _help_without_sources() -> Iterator[None]:
    """Spare a third of `train --help`: cyclopts has the source of each class of options parsed, for docstrings in it.

    Ours say their help in `Field`, and pydantic's own class, 1,500 lines of it, is parsed with each of them.
    """
    try:
        from docstring_parser import parser
        from docstring_parser.parser import add_attribute_docstrings as former
    except ImportError:  # a later cyclopts may do without
        yield
        return
    parser.add_attribute_docstrings = lambda *_: None
    try:
        yield
    finally:
        parser.add_attribute_docstrings = former


def _field_problems(error: BaseException | None) -> str:
    """Return the problems that pydantic found, "" for another error. Its import is left to the commands that have
    fields."""
    if error is None or "pydantic" not in sys.modules:
        return ""
    from pydantic import ValidationError

    from dual_lora.lab.recipe.read import problems

    return problems(error) if isinstance(error, ValidationError) else ""


def _in_a_sentence(error: Exception) -> str:
    if full := memory_full(error):
        return (
            f"{full} What was finished is unharmed. Lower the batch size (--train.batch-size, --evaluate.batch-size), "
            "or take a smaller model. A file from somebody else may ask for more memory than it should."
        )
    if is_disk_full(error):
        file = getattr(error, "filename", None)
        where = f" ({file} could not be written)" if file else ""
        return f"The disk is full{where}: make room and give the same command again. What was there before is unharmed."
    if isinstance(error, RecursionError):
        return "Something in the input is nested too deeply (--debug shows where)."
    if isinstance(error, IndexError) and str(error) == "index out of range in self":  # torch's, of an embedding
        return (
            "The model was given a token or a position that it has no embedding for (--debug shows where). Either its "
            "tokenizer has tokens that are not the model's, or a text is longer than the model knows positions "
            "(--data.max-length)."
        )
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"{described(error, lines=1)} (--debug shows where)"


def _check_text(given: list[str]) -> None:
    """File names may hold bytes that are no text, which no record, page or tokenizer file can name."""
    for argument in given:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise UserError(f"{shown} is not UTF-8: rename the file or folder, or make a link to it.") from None


def _split_allowed_modules(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--allow-module NAME`, which every command takes, and those names."""
    kept, modules, rest = [], [], iter(given)
    for argument in rest:
        flag, _, name = argument.partition("=")
        if flag == FLAG:
            modules.append(name or next(rest, ""))
        else:
            kept.append(argument)
    return kept, modules


def _with_new_option_names(given: Iterable[str], names: dict[str, str]) -> list[str]:
    """The arguments with today's names of options."""
    parts = (argument.partition("=") for argument in given)
    return [f"{names.get(name, name)}{sign}{value}" for name, sign, value in parts]


def _usage_error(error: CycloptsError, command: str | None) -> str:
    """Cyclopts' sentence; ours for a flag that other trainers have, and for arguments that are left over."""
    text = str(error)
    option = next((a.partition("=")[0] for a in text.split() if a.startswith("--")), "").rstrip(".")
    if command == "train" and text.startswith("Unknown option") and (ours := ELSEWHERE.get(option.replace("_", "-"))):
        return f"Unknown option: {option}. Did you mean {ours}?"
    if option.startswith("--method.") and isinstance(error, MissingArgumentError):
        return f"{option} needs a value, such as {option} true: it is a field of the method's configuration."
    called = " ".join(["dual-lora", *(error.command_chain or [])])
    if isinstance(error, UnusedCliTokensError):
        return _left_over(error, called)
    if isinstance(error, MissingArgumentError) and error.argument:
        return _missing(error, error.argument, called)
    if isinstance(error, UnknownOptionError) and "Did you mean" not in text:
        return f"{text} `{called} --help-all` lists all options."
    return text


def _missing(error: MissingArgumentError, argument: Argument, called: str) -> str:
    """Say what a place or an option is for that was left out, or an option that was given without its value."""
    text = str(argument.parameter.help or "").split("[default")[0].strip().rstrip(".")
    meant = f" ({text})" if text else ""
    if error.keyword:
        return f"{error.keyword} needs a value{meant}. `{called} --help` shows all options."
    places = _places(error)
    name = argument.field_info.name
    usage = " ".join([called, *places.values()]) + ("" if name in places else f" {argument.name} …")
    return f"{places.get(name, argument.name)} is missing{meant}. Expected `{usage}` and options."


def _places(error: CycloptsError) -> dict[str, str]:
    """The parameters of the command that need no option, by their names, as its help writes them."""
    parameters = signature(error.target).parameters.values() if error.target else []
    return {
        p.name: p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]"
        for p in parameters
        if p.kind != p.KEYWORD_ONLY
    }


def _left_over(error: UnusedCliTokensError, called: str) -> str:
    """Say which arguments no option and no place takes, and which option comes just before them."""
    unused, given = list(error.unused_tokens or []), list(error.root_input_tokens or [])
    rest = given[: -len(unused)] if given[-len(unused) :] == unused else []
    option = next((token for token in reversed(rest) if token.startswith("-")), None)
    usage = " ".join([called, *_places(error).values()])
    after = f" The option before, {option}, takes no more." if option else ""
    return (
        f"Too many arguments: {', '.join(map(repr, unused))}, expected `{usage}` and options.{after} "
        f"`{called} --help` lists the options."
    )


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one sentence, above a progress bar where there is one; without Python's path and line of source."""
    from dual_lora.lab.progress import console

    if os.environ.get("RANK", "0") == "0":
        console.print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)


def _trace() -> None:
    """Python's own traceback, whose texts may come from files, while the terminal is still guarded."""
    traceback.print_exc()
    sys.exit(1)


def _fail(message: str, given: list[str], code: int = 1) -> None:
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if "--json" in given:
        print(json.dumps({"error": message}, ensure_ascii=False))
    sys.exit(code)


if __name__ == "__main__":
    main()
