"""Upload a run to a model hub: its weights, tokenizer, note and card, and no other file of its folder."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dual_lora
from dual_lora.lab.errors import UserError, damaged, described
from dual_lora.lab.files.folder import result_of, run_at
from dual_lora.lab.read import has_second_name, read_object
from dual_lora.lab.recipe.read import read_recipe
from dual_lora.lab.run.hub_card import REMOVED, card_text, known_base, read_card, source_name, without_private_paths

# What PEFT, transformers, their tokenizers and the laboratory write next to weights.
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
SETTINGS = {"adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json", "lab.json"}
VOCABULARY = {
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """A folder as it will be uploaded. files: name and size in bytes of each."""

    folder: Path
    repo: str
    files: dict[str, int]


@contextmanager
def prepared_upload(
    run: Path, repo: str, *, base_model: str | None = None, licence: str | None = None
) -> Iterator[Upload]:
    """A temporary folder with the copies that may leave this machine.

    The base's local path is replaced by its name on the hub in every file, for nobody else could load it by the path.
    Raises UserError where that name is not known, and where a path or a token would still be uploaded.
    """
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"The repository is {repo!r}, expected OWNER/NAME.")
    folder = run_at(run)
    result, recipe = result_of(folder), read_recipe(run)
    for file in result.iterdir():
        if file.is_file() and has_second_name(file):
            raise UserError(
                f"{file} has a second name elsewhere (a hard link), so it may be a file of yours that an archive was "
                "unpacked over. Nothing was uploaded: take a copy of the run (cp -r)."
            )
    base = known_base(read_card(result / "README.md"), recipe, base_model)
    if base is None:
        raise UserError(
            f"The run's base model is {recipe.model.path}, which others don't have: give its name on the hub "
            "with --base-model, for example --base-model HuggingFaceTB/SmolLM2-135M."
        )
    with TemporaryDirectory() as space:
        target = Path(space)
        for file in sorted(result.iterdir()):
            if file.is_symlink() or not file.is_file():
                continue  # a link would carry what it points to
            if WEIGHTS.fullmatch(file.name) or file.name in VOCABULARY:
                shutil.copyfile(file, target / file.name)
            elif file.name in SETTINGS:
                with damaged(str(file)):
                    values = read_object(file)
                    clean = _clean_note(values, base) if file.name == "lab.json" else _clean_settings(values, base)
                (target / file.name).write_text(
                    json.dumps(clean, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        text = card_text(folder, recipe, result / "README.md", base_model=base, licence=licence, repo=repo)
        (target / "README.md").write_text(text, encoding="utf-8")
        _check(target, run)
        yield Upload(target, repo, {file.name: file.stat().st_size for file in sorted(target.iterdir())})


def upload(ready: Upload, *, private: bool = False) -> str:
    """Create the repository where it is not there yet, upload the folder in one commit, and return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(ready.repo, private=private, exist_ok=True)
        if private and not api.model_info(ready.repo).private:
            raise UserError(f"{ready.repo} is there already, and public: leave out --private, or give another name.")
        done = api.upload_folder(
            repo_id=ready.repo, folder_path=ready.folder, commit_message=f"Upload by dual-lora {dual_lora.__version__}"
        )
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it and start again.") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        first = without_private_paths(described(error, Exception, lines=1))
        raise UserError(f"The hub refused: {first} Sign in with `hf auth login`, or set HF_TOKEN.") from None
    return str(done.commit_url)


def _clean_settings(values: dict[str, Any], base: str) -> dict[str, Any]:
    """A configuration whose top level names the base by its hub name, and no path of this machine."""
    found = {key: _without_paths(value) if isinstance(value, str) else value for key, value in values.items()}
    if "chat_template" in values:
        found["chat_template"] = values["chat_template"]  # a program, in which a slash is no path
    for key in ("base_model_name_or_path", "name_or_path", "_name_or_path"):
        if values.get(key):
            found[key] = base
    return found


def _clean_note(note: dict[str, Any], base: str) -> dict[str, Any]:
    """The laboratory's note with the base's hub name, and records by their names alone.

    Class names, choices and patterns stay as they are: a slash in them is no path.
    """
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in note["recipe"].items()}
    for key in ("about", "method", "origin"):
        recipe[key] = _without_paths(recipe.get(key))
    recipe["train"]["arguments"] = _without_paths(recipe["train"].get("arguments", {}))
    recipe["model"]["path"] = base
    records = [("data", "train"), ("data", "test"), ("data", "validation"), ("evaluate", "forgetting")]
    for part, key in records:
        if source := (recipe.get(part) or {}).get(key):
            recipe[part][key] = source_name(source)
    recipe["data"]["tests"] = {name: source_name(at) for name, at in (recipe["data"].get("tests") or {}).items()}
    return {**note, "recipe": recipe}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return without_private_paths(value) if isinstance(value, str) else value


def _check(folder: Path, run: Path) -> None:
    """The last look at every text but the vocabulary, in which anything may stand."""
    folders = [f"{folder}/" for folder in (Path.home(), run.resolve().parent) if len(folder.parts) > 1]
    for file in folder.iterdir():
        if file.suffix not in {".json", ".md"} or file.name in VOCABULARY:
            continue
        text = file.read_text(encoding="utf-8")
        if REMOVED in text or any(folder in text for folder in folders):
            raise UserError(f"{file.name} would carry a path of this machine or a token: mend the run's recipe.")
