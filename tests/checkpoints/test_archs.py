"""Shipped architectures: parameters and tensors as published, nothing allocated."""

import json

import pytest

from nemojax.arch import ArchSpec, SwiGLU, load_arch, shipped_archs
from nemojax.checkpoints import anymodel, decilm
from nemojax.checkpoints.hf_config import arch_from_config, config_from_arch
from nemojax.checkpoints.hf_weights import weights_of
from tests.checkpoints.toy_models import MIXED

PUBLISHED = {
    "llama_3_2_1b": (1_235_814_400, 146),
    "llama_3_1_8b": (8_030_261_248, 291),
    "llama_3_1_70b": (70_553_706_496, 723),
    "llama_3_1_405b": (405_853_388_800, 1137),
    "nemotron_super_49b": (49_867_145_216, 568),
    "nemotron_ultra_253b": (253_401_268_224, 647),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_tensors(name):
    arch = load_arch(name)
    assert (arch.num_params(), len(weights_of(arch))) == PUBLISHED[name]
    assert ArchSpec.from_json(json.loads(arch.dumps())) == arch


def test_all_shipped_are_pinned():
    assert set(shipped_archs()) == set(PUBLISHED)


def test_ultra_map():
    arch = load_arch("nemotron_ultra_253b")
    assert arch.num_layers == 162 and len(arch.attention_layers) == 64
    assert sum(b.is_empty for b in arch.blocks) == 81
    fused = [arch.blocks[i].ffn for i in (125, 134, 143, 149)]
    assert fused == [SwiGLU(399360), SwiGLU(425984), SwiGLU(343040), SwiGLU(301056)]
    assert arch.rope.scaling is not None and arch.rope.scaling.factor == 16.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_round_trip(name):
    arch = load_arch(name)
    kind = "decilm" if "nemotron" in name else "llama"
    config = json.loads(json.dumps(config_from_arch(arch, kind, None, "bfloat16", {})))
    assert arch_from_config(config, "config.json") == arch


def test_published_multiplier_survives_beside_the_arch():
    arch = load_arch("nemotron_ultra_253b")
    original = config_from_arch(arch, "decilm", None, "bfloat16", {})
    entry = original["block_configs"][8]["ffn"]
    assert entry["ffn_mult"] != 1.95 and decilm.width_of(1.95, arch.dim) == 21504
    entry["ffn_mult"] = 1.95
    assert arch_from_config(original, "") == arch
    assert config_from_arch(arch, "decilm", original, "bfloat16", {}) == original
    # one other layer changed: the published number of this one still stays
    smaller = arch.replace(blocks=(*arch.blocks[:-1], arch.blocks[0]))
    again = config_from_arch(smaller, "decilm", original, "bfloat16", {})
    assert again["block_configs"][8]["ffn"]["ffn_mult"] == 1.95
    assert again["block_configs"][-1]["ffn"]["ffn_mult"] == decilm.ffn_mult_of(5376, arch.dim)


@pytest.mark.parametrize("dim", [64, 768, 4096, 8192, 16384, 12288])
def test_multiplier_is_exact_for_multiples_of_256(dim):
    for width in range(256, 256 * 300, 256):
        assert decilm.width_of(decilm.ffn_mult_of(width, dim), dim) == width


def test_every_key_is_written():
    entry = decilm.configs_from_blocks(MIXED)[0]
    assert len(entry["attention"]) == 8 and len(entry["ffn"]) == 4
    assert isinstance(entry["ffn"]["ffn_mult"], float)


def test_short_form_is_read():
    short = [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 12.0}}]
    assert decilm.blocks_from_configs(short, 32, 4, "config.json")[0] == MIXED.blocks[1]


def test_anymodel_round_trip():
    plain = MIXED.replace(blocks=tuple(b for i, b in enumerate(MIXED.blocks) if i != 6))
    configs = json.loads(json.dumps(anymodel.configs_from_blocks(plain)))
    assert anymodel.blocks_from_configs(configs, "config.json") == plain.blocks
    with pytest.raises(ValueError, match="layer 6: window: expected none, got 5"):
        anymodel.configs_from_blocks(MIXED)


def test_loader_warnings_name_the_layer():
    text = "\n".join(decilm.loader_warnings(MIXED))
    for part in (
        "layer 0 has no attention",
        "[1, 2, 4]",
        "layer 6 has a sliding window",
        "layer 4 has a linear",
    ):
        assert part in text
    assert decilm.loader_warnings(load_arch("nemotron_ultra_253b")) == []
