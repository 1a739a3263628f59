"""The shipped accelerate configurations are read by accelerate itself and say what their comments say."""

from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type).upper().endswith(kinds[path.stem])
    if path.stem == "fsdp2":  # a mixed precision policy would round the factors
        assert config.mixed_precision == "no"
        assert config.fsdp_config["fsdp_version"] == 2


def test_there_is_one_for_every_strategy():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]
