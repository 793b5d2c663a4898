"""Damaged and foreign checkpoints: one line that names the file, tensor, key or layer, and nothing left."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemojax.arch import SwiGLU
from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import save_params
from tests.checkpoints.toy_models import MIXED, random_params, read_config, write_tokenizer


def refused(tmp_path, llama_dir, *parts):
    with pytest.raises(ValueError) as caught:
        hf.import_hf(llama_dir, tmp_path / "a")
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def edit_config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(read_config(directory) | changes))


def shard_of(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def edit_shard(directory, name, change):
    path = shard_of(directory, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_truncated_shard(tmp_path, llama_dir):
    path = shard_of(llama_dir, "model.layers.1.mlp.up_proj.weight")
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path, llama_dir, path.name, "corrupt safetensors")


def test_garbage_shard(tmp_path, llama_dir):
    path = shard_of(llama_dir, "model.norm.weight")
    path.write_bytes(b"\xff" * 64)
    refused(tmp_path, llama_dir, path.name, "corrupt safetensors")


def test_missing_shard(tmp_path, llama_dir):
    path = shard_of(llama_dir, "model.norm.weight")
    path.unlink()
    refused(tmp_path, llama_dir, path.name, "no such file")


def test_truncated_index(tmp_path, llama_dir):
    index = llama_dir / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    refused(tmp_path, llama_dir, index.name, "truncated or damaged index")


def test_index_that_forgets(tmp_path, llama_dir):
    """The tensor is in a file all the same: nothing is missing, the import succeeds."""
    index = llama_dir / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(data))
    hf.import_hf(llama_dir, tmp_path / "a")


def test_index_that_promises_too_much(tmp_path, llama_dir):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_shard(llama_dir, name, lambda t: (t.pop(name), t.update(filler=np.zeros(1, np.float32))))
    refused(tmp_path, llama_dir, name, "the file lacks it")


def test_missing_tensor(tmp_path, llama_dir):
    edit_config(llama_dir, num_hidden_layers=4)
    refused(
        tmp_path, llama_dir, "model.layers.3.input_layernorm.weight: expected [32], got none", "and 4 more"
    )


def test_extra_tensor(tmp_path, llama_dir):
    edit_shard(
        llama_dir, "model.norm.weight", lambda t: t.update({"model.extra": np.zeros((2, 3), np.float32)})
    )
    refused(tmp_path, llama_dir, "model.extra: not expected, got [2, 3]")


def test_misshapen_tensor(tmp_path, llama_dir):
    edit_config(llama_dir, intermediate_size=64)
    refused(tmp_path, llama_dir, "model.layers.0.mlp.gate_proj.weight: expected [64, 32], got [48, 32]")


def test_integer_tensor(tmp_path, llama_dir):
    name = "model.norm.weight"
    edit_shard(llama_dir, name, lambda t: t.update({name: np.zeros(32, np.int8)}))
    refused(tmp_path, llama_dir, f"{name}: expected one of F32, F16, BF16, F64, got I8")


def test_pickled_weights(tmp_path, llama_dir):
    for file in llama_dir.glob("model*"):
        file.unlink()
    (llama_dir / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, llama_dir, "expected model.safetensors", "pytorch_model.bin is not safetensors")


def test_a_head_beside_a_tied_embedding(tmp_path, llama_dir):
    edit_config(llama_dir, tie_word_embeddings=True)
    refused(tmp_path, llama_dir, "lm_head.weight: expected the embedding")


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral", "phi3"])
def test_relatives_by_name(tmp_path, llama_dir, name):
    edit_config(llama_dir, model_type=name, architectures=None)
    refused(tmp_path, llama_dir, f"{name} is not supported: it", "supported are llama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type: expected llama or nemotron-nas (DeciLM), got 'bert'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias: expected false"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "compressed-tensors of 8-bit floats with a scale per tensor or channel, got 'fp8'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None},
            "rope_type: expected default or llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "expected factor for llama3"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
        ({"num_key_value_heads": 3}, "layer 0: expected KV heads dividing the 4 query heads, got 3"),
    ],
)
def test_config_values(tmp_path, llama_dir, changes, message):
    edit_config(llama_dir, **changes)
    refused(tmp_path, llama_dir, "config.json", message)


def test_config_is_not_json(tmp_path, llama_dir):
    (llama_dir / "config.json").write_text('{"model_type": "lla')
    refused(tmp_path, llama_dir, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attention": {"n_heads_in_group": 3}, "ffn": {"no_op": True}}, "layer 0: n_heads_in_group"),
        ({"attention": {"no_op": True, "replace_with_linear": True}, "ffn": {"no_op": True}}, "got both"),
        ({"attention": {"no_op": True}, "ffn": {"ffn_mult": None}}, "layer 0: ffn_mult: expected a positive"),
        (
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0, "sparsify": ["x"]}},
            "sparsify: expected null",
        ),
        ({"attention": {"no_op": True}, "ffn": {"mult": 1.0}}, "mult: unknown key"),
        (
            {"attention": {"n_heads_in_group": 2, "num_sink_tokens": 4}, "ffn": {"no_op": True}},
            "num_sink_tokens",
        ),
        ({"attention": None, "ffn": {}}, "expected a block config"),
    ],
)
def test_block_configs(tmp_path, llama_dir, entry, message):
    edit_config(
        llama_dir, model_type="nemotron-nas", architectures=None, num_hidden_layers=1, block_configs=[entry]
    )
    refused(tmp_path, llama_dir, message)


def test_tokenizer_larger_than_the_embedding(tmp_path, llama_dir):
    write_tokenizer(llama_dir, 70)
    refused(tmp_path, llama_dir, "tokenizer.json", "has id 69, expected ids below vocab_size 64")


def test_damaged_tokenizer(tmp_path, llama_dir):
    (llama_dir / "tokenizer.json").write_text("{}")
    refused(tmp_path, llama_dir, "tokenizer.json", "not a readable tokenizer")


def test_target_exists(tmp_path, llama_dir):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        hf.import_hf(llama_dir, tmp_path / "a")
    assert (tmp_path / "a" / "mine").read_text() == "keep"


def test_no_such_source(tmp_path):
    for source in (tmp_path / "nothing", "nobody/no-such-model", "plain-name"):
        with pytest.raises(ValueError, match="nothing|nobody|plain-name"):
            hf.import_hf(source, tmp_path / "a")


def test_width_that_decilm_cannot_say(tmp_path):
    odd = MIXED.replace(
        blocks=(*MIXED.blocks[:5], MIXED.blocks[1].__class__(MIXED.blocks[1].attn, SwiGLU(300)))
    )
    save_params(tmp_path / "a", odd, random_params(odd))
    with pytest.raises(ValueError, match="layer 5: ffn width: expected a multiple of 256, got 300"):
        hf.export_hf(tmp_path / "a", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_head_dim_that_decilm_cannot_say(tmp_path):
    odd = MIXED.replace(head_dim=16)
    save_params(tmp_path / "a", odd, random_params(odd))
    with pytest.raises(ValueError, match="head_dim: expected dim / num_heads = 8, got 16"):
        hf.export_hf(tmp_path / "a", tmp_path / "out")


def test_mixed_layers_are_not_llama(tmp_path, mixed_artifact):
    with pytest.raises(ValueError, match="layer 0 is - ffn256, expected attention and SwiGLU"):
        hf.export_hf(mixed_artifact, tmp_path / "out", "llama")


def test_weights_of_another_arch(tmp_path):
    save_params(tmp_path / "a", MIXED, random_params(MIXED))
    (tmp_path / "a" / "arch.json").write_text(MIXED.replace(vocab_size=32).dumps())
    with pytest.raises(ValueError, match=r"embed/weight: expected \(32, 32\), got \(64, 32\)"):
        hf.export_hf(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_never_overwritten(tmp_path, mixed_artifact):
    hf.export_hf(mixed_artifact, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="out: already exists; remove it or choose another name"):
        hf.export_hf(mixed_artifact, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
