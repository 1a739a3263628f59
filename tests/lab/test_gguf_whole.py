"""A GGUF file of which transformers leaves something out is not read as another model."""

import struct
import threading

import pytest
import torch

from dual_lora.lab.errors import UserError
from dual_lora.lab.model import read_gguf
from dual_lora.lab.model.empty import load_config
from dual_lora.lab.model.load import check_whole, load_model
from dual_lora.lab.model.read_gguf import reader_of
from dual_lora.lab.recipe.schema import ModelSection

gguf = pytest.importorskip("gguf")
FIELDS = {
    "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "head_count": 2,
    "head_count_kv": 1, "rope_freq_base": 10_000.0, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16,
}  # fmt: skip


def written(file, tensors=(), scaling=None, **fields):
    """A Llama of one layer, with further tensors [numbers] and a scaling of positions. fields: in place of FIELDS."""
    words = ["<s>", "</s>", "a", "b", "ab"]
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (FIELDS | fields).items():
        getattr(writer, f"add_{name}")(value)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b", "a b"])  # earlier versions of transformers take a list of one for a word
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (5, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32)}
    shapes |= {"blk.0.ffn_down": (32, 48)}
    named = {f"{name}.weight": shape for name, shape in shapes.items()} | {name: (n,) for name, n in tensors}
    for name, shape in named.items():
        writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSection(path=str(file))


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_the_quick_reader_reads_what_gguf_reads(order, tmp_path):
    written(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "more.gguf", "llama", endianess=getattr(gguf.GGUFEndian, order))
    writer.add_array("texts", ["", "ä", "\N{GREEK SMALL LETTER MU}" * 300])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("one", torch.arange(6.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in tmp_path.glob("*.gguf"):
        theirs, ours = gguf.GGUFReader(file), reader_of(file)
        assert list(ours.fields) == list(theirs.fields)
        for name, field in theirs.fields.items():
            assert (ours.fields[name].types, ours.fields[name].data) == (field.types, field.data), name
            assert [part.tolist() for part in ours.fields[name].parts] == [part.tolist() for part in field.parts], name
            assert ours.fields[name].contents() == field.contents(), name
        assert [t.data.tolist() for t in ours.tensors] == [t.data.tolist() for t in theirs.tensors]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_rows_are_unpacked_to_the_same_numbers(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(read_gguf, "_AT_ONCE", 700)  # bytes: several groups, the last of them a shorter one
    kind = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    packed = torch.randint(0, 60, (3, 17, 2 * size), dtype=torch.uint8).numpy()  # as half precision: finite
    theirs = gguf.quants.dequantize(packed, kind)
    with read_gguf.read_once(written(tmp_path / "m.gguf").path):
        ours = gguf.quants.dequantize(packed, kind)
    assert ours.shape == theirs.shape
    assert (ours == theirs).all()


@pytest.mark.parametrize("head", ["causal", "classification"])
def test_a_whole_file_is_read(head, tmp_path):
    part = written(tmp_path / "plain.gguf", tensors=[("output.weight", 160)] if head == "classification" else [])
    assert load_model(part.model_copy(update={"head": head}), 2).model.config.num_hidden_layers == 1


def test_a_copy_of_tied_embeddings_is_no_further_weight(tmp_path):
    """Bloom's files hold their head, and transformers ties it."""
    model = load_model(written(tmp_path / "plain.gguf")).model
    held = sum(p.numel() for p in model.parameters())
    written(tmp_path / "head.gguf", tensors=[("output.weight", 160)])
    model.config.tie_word_embeddings = True
    check_whole(tmp_path / "head.gguf", model)
    model.config.tie_word_embeddings = False
    with pytest.raises(UserError, match=f"holds {held + 160:,} weights"):
        check_whole(tmp_path / "head.gguf", model)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tensors": [("rope_freqs.weight", 8)]}, r"scales its positions \(rope_freqs.weight\)"),  # Llama 3.1 and later
        ({"scaling": gguf.RopeScalingType.LINEAR}, r"scales its positions \(rope.scaling.type\)"),
        ({"tensors": [("blk.0.attn_q.bias", 32)]}, "holds 7,968 weights, of which the model that was read has 7,936"),
    ],
)
@pytest.mark.parametrize("head", ["causal", "classification"])
def test_what_transformers_leaves_out_is_said(more, said, head, tmp_path):
    with pytest.raises(UserError, match=said):
        load_model(written(tmp_path / "more.gguf", **more).model_copy(update={"head": head}), 2)


def with_list(kind, count, values=b""):
    """A header's last field, with a list of this many values."""
    return struct.pack("<Q1sIIQ", 1, b"x", 9, kind, count) + values


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (with_list(0, 2**40), "values in lists"),  # gguf goes on past the end of the file, where nothing has a size
        (with_list(8, 2**63), "values in lists"),
        (with_list(9, 2**63), "values in lists"),
        (with_list(0, 5_000_000, bytes(5_000_000)), "values in lists"),  # 100 bytes of memory for each
        (with_list(8, 1, struct.pack("<Q", 110_000) + bytes(110_000)), "squared letters in a list"),
        (struct.pack("<Q20sIf", 20, b"llama.rope.dimension", 6, 1), "20,000,000,000 fields"),
    ],
)
def test_a_header_that_asks_for_much_is_refused_before_it_is_read(field, said, tmp_path):
    fields = 20_000_000_000 if "fields" in said else 2
    named = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, fields) + named + field)
    for read in (lambda: load_model(ModelSection(path=str(tmp_path))), lambda: load_config(str(tmp_path))):
        with pytest.raises(UserError, match=said):
            read()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("block_count", r"its header has llama\.block_count 1,000,000,000, expected at most 1,000"),
        ("feed_forward_length", r"llama\.feed_forward_length 1,000,000,000, expected at most 1,000,000"),
        ("expert_count", "expected at most 10,000"),
        ("context_length", "expected at most 20,000,000"),
    ],
)
def test_numbers_of_a_header_have_the_bounds_of_a_configuration(field, said, tmp_path):
    part = written(tmp_path / "m.gguf", **{field: 10**9})
    for read in (lambda: load_model(part), lambda: load_config(part.path)):
        with pytest.raises(UserError, match=said):
            read()


def test_two_threads_that_read_leave_gguf_as_it_was(tmp_path):
    file, theirs = written(tmp_path / "m.gguf").path, gguf.GGUFReader
    entered, may_leave = ([threading.Event(), threading.Event()] for _ in range(2))

    def read(which):
        with read_gguf.read_once(file):
            entered[which].set()
            may_leave[which].wait(30)

    threads = [threading.Thread(target=read, args=(which,)) for which in range(2)]
    threads[0].start()
    assert entered[0].wait(30)
    threads[1].start()
    entered[1].wait(0.5)  # it waits for the first one; else it would put back what the first one has put there
    for thread, event in zip(threads, may_leave, strict=True):
        event.set()
        thread.join(30)
    with read_gguf.read_once(file), read_gguf.read_once(file):
        assert gguf.GGUFReader is not theirs
    assert gguf.GGUFReader is theirs


@pytest.mark.parametrize("hard", [False, True], ids=["link", "hard link"])
def test_no_file_of_the_user_becomes_a_template_of_a_gguf_file(hard, tmp_path):
    """A GGUF file without a template has those that lie in a folder next to it, and each run is saved with them."""
    (tmp_path / "mine").write_text("my-password")
    (tmp_path / "sent/additional_chat_templates").mkdir(parents=True)
    part = written(tmp_path / "sent/m.gguf")
    template = tmp_path / "sent/additional_chat_templates/tool.jinja"
    template.hardlink_to(tmp_path / "mine") if hard else template.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="second name elsewhere" if hard else "lies outside of its folder"):
        load_model(part)
    template.unlink()
    template.write_text("theirs")
    assert load_model(part).tokenizer.chat_template == {"tool": "theirs"}
