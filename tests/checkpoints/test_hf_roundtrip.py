"""Hugging Face directories: every tensor bitwise and every key of the config, in and out again."""

import json

import numpy as np
import pytest

from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import load_params, params_reader, save_params
from nemojax.checkpoints.commands import export_command, import_command
from nemojax.checkpoints.hf_weights import plan_shards
from tests.checkpoints.toy_models import (
    LLAMAS,
    MIXED,
    make_llama,
    random_params,
    read_config,
    read_tensors,
    write_tokenizer,
)


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", LLAMAS)
def test_llama(tmp_path, kind, dtype):
    make_llama(tmp_path / "hf", kind, dtype)
    hf.import_hf(tmp_path / "hf", tmp_path / "a")
    done = hf.export_hf(tmp_path / "a", tmp_path / "out", max_shard_bytes=30_000)
    assert done.format == "llama" and done.warnings == ()
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "hf"))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "hf")


def test_decilm(tmp_path, mixed_artifact):
    done = hf.export_hf(mixed_artifact, tmp_path / "one")
    assert done.format == "decilm" and any("layer 0" in w for w in done.warnings)
    arch = hf.import_hf(tmp_path / "one", tmp_path / "a")
    assert arch == MIXED
    hf.export_hf(tmp_path / "a", tmp_path / "two", max_shard_bytes=1)
    assert_same_tensors(read_tensors(tmp_path / "two"), read_tensors(tmp_path / "one"))
    assert read_config(tmp_path / "two") == read_config(tmp_path / "one")


def test_old_spelling_single_file_and_quirks(tmp_path):
    """rope_theta beside rope_scaling, one file without an index, rotary buffers, a repeated tied head."""
    from safetensors.numpy import save_file

    make_llama(tmp_path / "hf", "tied")
    tensors = read_tensors(tmp_path / "hf")
    for file in tmp_path.glob("hf/model*"):
        file.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    config = read_config(tmp_path / "hf")
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 77.0, "rope_scaling": None, "torch_dtype": "float32", "_name_or_path": "x"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    arch = hf.import_hf(tmp_path / "hf", tmp_path / "a")
    assert arch.rope.theta == 77.0 and arch.head_dim == 8 and arch.tie_embeddings
    hf.export_hf(tmp_path / "a", tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"], tensors["lm_head.weight"]
    assert_same_tensors(read_tensors(tmp_path / "out"), tensors)


def test_anymodel(tmp_path):
    narrow = MIXED.replace(blocks=MIXED.blocks[:6], head_dim=16)
    save_params(tmp_path / "a", narrow, random_params(narrow))
    assert hf.export_hf(tmp_path / "a", tmp_path / "out", "anymodel").format == "anymodel"
    config = read_config(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["block_configs"][0]["ffn"]["intermediate_size"] == 256
    assert hf.import_hf(tmp_path / "out", tmp_path / "b") == narrow
    np.testing.assert_array_equal(
        load_params(tmp_path / "b")[1]["embed"]["weight"], load_params(tmp_path / "a")[1]["embed"]["weight"]
    )


def test_import_is_lazy_and_bounded(tmp_path, monkeypatch):
    """With a budget of one byte, tensors are read one at a time, and each only once."""
    from nemojax.checkpoints import hf_weights, store

    make_llama(tmp_path / "hf")
    monkeypatch.setattr(store, "LAZY_BYTES", 1)
    reads = []
    read = hf_weights.SafetensorsDir.read
    monkeypatch.setattr(
        hf_weights.SafetensorsDir, "read", lambda self, n: (reads.append(n), read(self, n))[1]
    )
    hf.import_hf(tmp_path / "hf", tmp_path / "a")
    assert sorted(reads) == sorted(read_tensors(tmp_path / "hf"))
    assert set(params_reader(tmp_path / "a").leaves) >= {"layers/2/ffn/down", "head/weight"}


def test_shards_are_cut_by_size():
    assert plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]


def test_index_and_names(tmp_path, mixed_artifact):
    hf.export_hf(mixed_artifact, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * MIXED.num_params()


def test_tokenizer_and_generation_config(tmp_path, mixed_artifact):
    from transformers import AutoTokenizer

    hf.export_hf(mixed_artifact, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}
    assert read_config(tmp_path / "out")["eos_token_id"] == 1
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    assert text == "a b<|eot_id|>"


def test_side_files_travel(tmp_path, llama_dir):
    (llama_dir / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    hf.import_hf(llama_dir, tmp_path / "a")
    hf.export_hf(tmp_path / "a", tmp_path / "out")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((llama_dir / name).read_text())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (llama_dir / name).read_bytes()


def test_commands(tmp_path, llama_dir, capsys):
    assert import_command([str(llama_dir), str(tmp_path / "a")]) == 0
    assert export_command([str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    assert "3 layers" in capsys.readouterr().out
    assert read_config(tmp_path / "out") == read_config(llama_dir)


def test_chosen_step(tmp_path):
    for step in (3, 4):
        params = random_params(MIXED, seed=step)
        from nemojax.checkpoints.artifact import Checkpoints

        (tmp_path / "arch.json").write_text(MIXED.dumps())
        held = Checkpoints(tmp_path, keep_last=5)
        held.save(step, params)
        held.close()
    hf.export_hf(tmp_path, tmp_path / "out", step=3)
    want = random_params(MIXED, seed=3)["norm"]["scale"]
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")["model.norm.weight"], want)


def test_pruned_child_of_an_import_is_not_the_original(tmp_path, llama_dir):
    """The kept config.json is only trusted while it describes the arch."""
    arch = hf.import_hf(llama_dir, tmp_path / "a")
    child = arch.replace(blocks=arch.blocks[:2])
    save_params(tmp_path / "a", child, random_params(child), step=1)
    write_tokenizer(tmp_path / "a" / "tokenizer", 64)
    hf.export_hf(tmp_path / "a", tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config["num_hidden_layers"] == 2 and config["initializer_range"] == 0.2
