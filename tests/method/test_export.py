"""torch.export and ONNX of merged and unmerged models: the same outputs, at other batch sizes too."""

import io

import pytest
import torch
from peft import get_peft_model
from tiny import EXPERTS, MODELS, TARGETS, VOCABULARY, adapted, mixture, points, tokens
from torch import nn
from torch.export import Dim

from dual_lora import DualLoraConfig, decompositions
from forked import before_peft

CLOSE = dict(rtol=1e-4, atol=1e-4)


class OneTensor(nn.Module):
    """A tensor in, a tensor out: a language model's logits without its cache of keys, which is no output of a graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        if hasattr(model, "config") and hasattr(model.config, "use_cache"):
            model.config.use_cache = False

    def forward(self, x):
        y = self.model(x)
        return y if isinstance(y, torch.Tensor) else y.logits


def language_model(name):
    torch.manual_seed(1)
    model = adapted(MODELS[name](layers=1), target_modules=TARGETS[name], init_weights=False)
    return OneTensor(model), tokens(2, 7), tokens(5, 7)


def mlp():
    return OneTensor(adapted(init_weights=False)), points(3), points(8)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def convolution(dimensions, **options):
    torch.manual_seed(1)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    net = nn.Sequential(kind(2, 4, 3, padding=1, **options), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4**dimensions, 3))
    model = adapted(net, target_modules=["0", "3"], init_weights=False)
    return OneTensor(model), numbers(2, 2, *[4] * dimensions), numbers(6, 2, *[4] * dimensions)


class Attends(nn.Module):
    """Self-attention, or with keys and values of widths 5 and 12."""

    def __init__(self, **widths):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.own = not widths

    def forward(self, x):
        key, value = (x, x) if self.own else (x[..., :5], torch.cat([x, -x], -1)[..., :12])
        return self.attention(x, key, value, need_weights=False)[0]


def attention(**widths):
    torch.manual_seed(1)
    model = adapted(Attends(**widths), target_modules=["attention"], init_weights=False)
    return OneTensor(model), numbers(3, 5, 8), numbers(6, 5, 8)


def encoder():
    """PyTorch's own layer, which takes a fast path around its attention where that is the plain one."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    model = adapted(net, target_modules=["self_attn", "linear1"], init_weights=False)
    return OneTensor(model), numbers(3, 5, 8), numbers(6, 5, 8)


def experts(layout, implementation="batched_mm"):
    model = mixture(layout, implementation)
    model = adapted(model, target_modules=[], target_parameters=EXPERTS, init_weights=False)
    return OneTensor(model), tokens(2, 4), tokens(5, 4)


def embedding_model():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(VOCABULARY, 16, padding_idx=0), nn.Linear(16, 3))
    model = get_peft_model(net, DualLoraConfig(r=4, target_modules=["0", "1"], init_weights=False, warmup_steps=0))
    return OneTensor(model), tokens(2, 7), tokens(5, 7)


CASES = {
    "mlp": mlp,
    "llama": lambda: language_model("llama"),
    "bert": lambda: language_model("bert"),
    "gpt2": lambda: language_model("gpt2"),
    "conv1d": lambda: convolution(1),
    "conv2d": lambda: convolution(2, groups=2, padding_mode="circular"),
    "conv3d": lambda: convolution(3),
    "embedding": embedding_model,
    "attention": attention,
    "separate attention": lambda: attention(kdim=5, vdim=12),
    "encoder": encoder,
    "experts": lambda: experts("mixtral"),
    "transposed experts": lambda: experts("gpt-oss"),
}


def exported(model, x):
    batch = Dim("batch", min=2, max=64)
    # Not strict, as later versions have it: torch 2.6's strict tracer stops at PEFT's context managers, LoRA's as well.
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)


def ours(program):
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("dual_lora.")]


def trials():
    """Each case, unmerged and merged. Of what is merged, which is plain PyTorch, three stand for the others."""
    for name in CASES:
        marks = [pytest.mark.slow] if "expert" in name else []
        yield pytest.param(name, False, marks=marks, id=name)
        stood_for = [] if name in ("mlp", "llama", "experts") else [pytest.mark.long]
        yield pytest.param(name, True, marks=marks + stood_for, id=f"{name}-merged")


@pytest.mark.parametrize(("name", "merged"), trials())
def test_exported_program(name, merged):
    model, x, other = CASES[name]()
    with torch.no_grad():
        expected = model(x), model(other)
    if merged:
        model.model.merge_adapter()
    program = exported(model, x)
    assert bool(ours(program)) != merged
    plain = program.run_decompositions(decompositions())
    assert not ours(plain)
    for which in (program, plain):
        run = which.module()
        with torch.no_grad():
            torch.testing.assert_close(run(x), expected[0], **CLOSE)
            torch.testing.assert_close(run(other), expected[1], **CLOSE)


@pytest.mark.parametrize("first", [4, 20], ids="{} tokens".format)
def test_the_length_of_a_prompt_is_free(first):
    """Whatever a layer may decide by it: a prompt begins something, a token or two go on."""
    model, *_ = CASES["llama"]()
    length = Dim("length", min=2, max=64)
    program = torch.export.export(model, (tokens(2, first),), dynamic_shapes=({1: length},), strict=False)
    for other in (3, 33):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(tokens(2, other)), model(tokens(2, other)), **CLOSE)


def test_lambda_is_part_of_what_is_exported():
    model = adapted(init_weights="paper", warmup_steps=4, init_std=0.5)
    for module in model.modules():
        if hasattr(module, "dual_lora_A"):
            module.set_left("default", 2)
    model = OneTensor(model)
    with torch.no_grad():
        half = model(points())
    run = exported(model, points()).module()
    torch.testing.assert_close(run(points()), half, **CLOSE)


def test_a_quantised_base_is_refused_with_the_way_out():
    bnb = pytest.importorskip("bitsandbytes", reason="quantised layers need bitsandbytes")
    net = nn.Sequential(bnb.nn.Linear4bit(64, 8, compute_dtype=torch.float32, quant_type="nf4")).to("cpu")
    model = get_peft_model(net, DualLoraConfig(r=4, target_modules=["0"], init_weights=False))
    x = torch.randn(3, 64)
    assert OneTensor(model)(x).shape == (3, 8)
    with pytest.raises(NotImplementedError, match=r"layer cannot be exported.*bf16 or fp32.*merge_and_unload"):
        torch.export.export(OneTensor(model), (x,))


def test_a_loop_over_experts_is_refused_with_the_way_out():
    model, x, _ = experts("mixtral", "eager")
    with pytest.raises(
        NotImplementedError, match=r"loops over the experts.*set_experts_implementation\('batched_mm'\)"
    ):
        torch.export.export(model, (x,), strict=False)
    model.model.set_experts_implementation("batched_mm")
    assert ours(torch.export.export(model, (x,), strict=False))


@pytest.mark.parametrize("name", ["conv2d", "embedding", "separate attention", "encoder", "experts"])
def test_what_merge_and_unload_leaves(name):
    model, x, _ = CASES[name]()
    with torch.no_grad():
        expected = model(x)
    model.model = model.model.merge_and_unload()
    program = torch.export.export(model, (x,), strict=False)
    assert not [key for key in program.state_dict if "dual_lora" in key]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), expected, **CLOSE)


LOADS = """
import sys, torch
sys.modules["dual_lora"] = sys.modules["peft"] = None
program = torch.export.load("{folder}/program.pt2")
torch.save(program.module()(torch.load("{folder}/x.pt")), "{folder}/y.pt")
"""


@pytest.mark.slow
def test_a_decomposed_program_runs_without_this_package(tmp_path):
    model, x, other = mlp()
    program = exported(model, x).run_decompositions(decompositions())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(other, tmp_path / "x.pt")
    before_peft(LOADS.format(folder=tmp_path))
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(other), **CLOSE)


# ONNX.


@pytest.fixture
def onnx_runs():
    """Function: (model, example, input) -> what onnxruntime computes from the exported model."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"ONNX export needs {name}: pip install 'dual-lora[export]'")
    import onnxruntime

    def run(model, example, *inputs):
        batch = Dim("batch", min=2, max=64)
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        domains = {node.domain for node in program.model.graph}
        assert domains <= {"", "pkg.onnxscript.torch_lib"}, domains
        file = io.BytesIO()
        program.save(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in inputs]

    return run


# A merged model holds no operator of ours (`test_exported_program`), so a few stand for all of them.
ONNX = [(name, False) for name in CASES] + [("llama", True), ("encoder", True), ("experts", True)]
# Some ten seconds each; of several forms of one layer, and of the language models, one is in `make test`.
STOOD_FOR = {("conv1d", False), ("conv3d", False), ("separate attention", False), ("transposed experts", False),
             ("bert", False), ("gpt2", False), ("llama", True), ("encoder", True), ("experts", True),
             ("conv2d", False), ("attention", False)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "merged"),
    [pytest.param(*each, marks=pytest.mark.long) if each in STOOD_FOR else each for each in ONNX],
    ids=[f"{name}{'-merged' * merged}" for name, merged in ONNX],
)
def test_onnx(name, merged, onnx_runs):
    model, x, other = CASES[name]()
    with torch.no_grad():
        expected = [model(x), model(other)]
    if merged:
        model.model.merge_adapter()
    for got, wanted in zip(onnx_runs(model, x, x, other), expected, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)
