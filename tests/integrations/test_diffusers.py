"""diffusers: convolutions and attention of a UNet train, save, load and merge."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with pip install '.[integrations]'")
pytestmark = pytest.mark.slow


def prediction(model):
    generator = torch.Generator().manual_seed(2)
    noisy, colours = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 3, 3, generator=generator)
    with torch.no_grad():
        return model.eval()(noisy, torch.tensor([10, 500]), encoder_hidden_states=colours).sample


def test_trains_saves_loads_and_merges(example, tmp_path, healthy):
    from tiny import layers

    from dual_lora.method.layer import Linear
    from dual_lora.method.layers.conv import Conv2d

    model, losses = example("diffusers_unet").main(tmp_path, steps=30)
    assert losses["after"] < 0.8 * losses["before"]
    assert losses["merged"] == pytest.approx(losses["after"], rel=1e-4)
    kinds = {type(layer) for layer in layers(model).values()}
    assert kinds == {Conv2d, Linear}
    healthy(model)
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    assert torch.allclose(prediction(plain), prediction(model), atol=1e-4)


def test_diffusers_own_interface(example, tmp_path):
    """`add_adapter`, `disable_adapters`, `fuse_lora`, `save_lora_adapter` and `load_lora_adapter` know the method."""
    from dual_lora import DualLoraConfig

    module = example("diffusers_unet")
    unet = module.unet()
    base = prediction(unet)
    unet.add_adapter(DualLoraConfig(r=8, init_weights=False, target_modules=module.TARGETS))
    adapted = prediction(unet)
    assert not torch.allclose(adapted, base, atol=1e-2)
    unet.disable_adapters()
    assert torch.equal(prediction(unet), base)
    unet.enable_adapters()
    unet.fuse_lora()
    assert torch.allclose(prediction(unet), adapted, atol=1e-4)
    unet.unfuse_lora()
    unet.disable_adapters()
    assert torch.equal(prediction(unet), base)
    unet.save_lora_adapter(tmp_path)
    loaded = module.unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.allclose(prediction(loaded), adapted, atol=1e-4)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_offloading_by_groups_to_the_disk_brings_the_factors_back(kind, tmp_path):
    """Between two calls the memory of what is offloaded holds whatever it holds."""
    from diffusers.hooks import apply_group_offloading
    from peft import inject_adapter_in_model

    from dual_lora import DualLoraConfig

    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"],
        norm_num_groups=8,
    )
    inject_adapter_in_model(DualLoraConfig(r=4, init_weights=False, target_modules=["to_q", "to_k", "conv1"]), unet)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = unet(x, 1).sample
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(unet, cpu, cpu, offload_type=kind, offload_to_disk_path=str(tmp_path), **blocks)
        for _ in range(2):
            torch.testing.assert_close(unet(x, 1).sample, expected, atol=1e-4, rtol=1e-4)


class Scaled(torch.nn.Linear):
    """A layer with a forward of its own, which gets W + ΔW in its weight's place where it can."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * 1.0, self.bias)


def test_an_offloaded_layer_with_a_forward_of_its_own_is_not_read_before_it_is_called(tmp_path):
    from diffusers.hooks import apply_group_offloading
    from peft import inject_adapter_in_model

    from dual_lora import DualLoraConfig

    model = torch.nn.Sequential(Scaled(16, 16))
    inject_adapter_in_model(DualLoraConfig(r=4, init_weights=False, target_modules=["0"]), model)
    x, cpu = torch.randn(3, 16), torch.device("cpu")
    with torch.no_grad():
        expected = model(x)
        apply_group_offloading(model, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
        base = model[0].base_layer
        base.weight.data.fill_(7.0)  # as freed memory may hold anything
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_name_in_a_file_is_no_pattern():
    """The names in a stranger's file are looked for as they are: some patterns are searched without an end."""
    from peft.utils.other import get_pattern_key

    from dual_lora.method.diffusers_files import make_configuration

    trap = "(a+)+b"
    state = {}
    for layer, rank in ((trap, 2), ("to_q", 4), ("to_k", 4)):
        state |= {f"{layer}.dual_lora_{letter}": torch.zeros(rank, 8) for letter in "AC"}
    config = make_configuration(None, state)
    assert get_pattern_key(config.rank_pattern, "a" * 40) == "a" * 40
    assert get_pattern_key(config.rank_pattern, trap) in config.rank_pattern
    assert get_pattern_key(config.alpha_pattern, "to_q") in config.alpha_pattern


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"to_q.dual_lora_A": torch.zeros(8)}, r"to_q.dual_lora_A has the shape \(8,\), expected a matrix"),
        ({"to_q.dual_lora_C": torch.tensor(1.0)}, "expected a matrix"),
        ({"to_q.dual_lora_B": torch.zeros(8, 2)}, "no factor A or C"),
        ({"to_q.dual_lora_A": torch.zeros(2, 8), "to_q.dual_lora_alpha": torch.zeros(3)}, "expected a number"),
        ({"to_q.dual_lora_A": torch.zeros(2, 8), "to_q.dual_lora_alpha": torch.tensor(torch.nan)}, "expected a number"),
        ({"to_q.dual_lora_A": torch.zeros(2, 8)}, "r2"),
    ],
)
def test_a_file_of_other_tensors_is_said(state, said):
    from dual_lora.method.diffusers_files import make_configuration

    with pytest.raises(ValueError, match=said):
        make_configuration(None, state)
