"""FP8 exports say the weights within e4m3's rounding, to us and to transformers, and come in again."""

import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import load_params
from nemojax.checkpoints.commands import export_command
from nemojax.checkpoints.hf_fp8 import Dequantized
from nemojax.model import llama
from tests.checkpoints.toy_models import make_llama, read_config, read_tensors

# where `pip install --target DIR --no-deps compressed-tensors loguru psutil` put them, if not beside torch
PLACE = os.environ.get("NEMOJAX_COMPRESSED_TENSORS")
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
THEIRS = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

for name, how in ("wide", {"quantization_config": CompressedTensorsConfig(dequantize=True)}), ("kept", {}):
    model, info = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], output_loading_info=True, dtype="float32", **how
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = model.eval()(torch.tensor(np.load(sys.argv[2]))).logits
    np.save(f"{sys.argv[3]}/{name}.npy", logits.numpy())
"""
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 40))


def tensors_of(directory) -> dict[str, np.ndarray]:
    """As the files have them; numpy has no e4m3, so those are read as bytes."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        kinds = {"F8_E4M3": E4M3, "BF16": BF16, "F32": np.float32}
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                values = np.frombuffer(data[start + first : start + last], kinds[entry["dtype"]])
                found[name] = values.reshape(entry["shape"])
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exported(request, tmp_path_factory):
    """(the directory that came, what was made of it, the FP8 directory that went)."""
    path = tmp_path_factory.mktemp("fp8")
    make_llama(path / "hf", dtype=request.param)
    hf.import_hf(path / "hf", path / "a")
    assert export_command([str(path / "a"), str(path / "out"), "--dtype=fp8", "--max_shard_bytes=20000"]) == 0
    return path


def test_the_tensors(exported):
    before, after = read_tensors(exported / "hf"), tensors_of(exported / "out")
    matrices = [name for name in before if "_proj" in name]
    assert after.keys() == before.keys() | {f"{name}_scale" for name in matrices}
    for name in before.keys() - set(matrices):
        np.testing.assert_array_equal(after[name], before[name].astype(BF16))
    for name in matrices:
        values, scale = after[name], after[f"{name}_scale"]
        weight = before[name].astype(np.float32)
        assert (values.dtype, scale.shape, scale.dtype) == (E4M3, (1,), np.float32)
        assert np.log2(scale) % 1 == 0 and 224 < np.abs(values.astype(np.float32)).max() <= 448
        # three bits after the point: off by a sixteenth at most, or by half of the least step
        off = np.abs(values.astype(np.float32) * scale - weight)
        assert (off <= np.maximum(np.abs(weight) / 16, scale * 2.0**-10)).all() and off.max() > 0
    index = json.loads((exported / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    config = read_config(exported / "out")
    assert config["quantization_config"]["format"] == "float-quantized"
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"


def test_it_comes_in_again_as_bf16_and_goes_the_same(exported, tmp_path):
    hf.import_hf(exported / "out", tmp_path / "b")
    assert load_params(tmp_path / "b")[1]["runs"]["000"]["attn"]["q"].dtype == jnp.bfloat16
    once = tensors_of(exported / "out")
    hf.export_hf(tmp_path / "b", tmp_path / "plain")
    assert "quantization_config" not in read_config(tmp_path / "plain")
    for name, tensor in tensors_of(tmp_path / "plain").items():
        scale = once.get(f"{name}_scale", np.float32(1))
        np.testing.assert_array_equal(tensor.astype(np.float32), once[name].astype(np.float32) * scale)
    hf.export_hf(tmp_path / "b", tmp_path / "again", dtype="fp8", max_shard_bytes=20000)
    for name, tensor in tensors_of(tmp_path / "again").items():
        assert tensor.tobytes() == once[name].tobytes(), name


def test_scales_by_channel_and_of_activations_are_read(exported, tmp_path):
    from safetensors.numpy import save_file

    tensors, config = tensors_of(exported / "out"), read_config(exported / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    rows = tensors[name].shape[0]
    tensors[f"{name}_scale"] = np.linspace(0.1, 0.2, rows, dtype=np.float32).reshape(rows, 1).astype(BF16)
    tensors["model.layers.1.mlp.up_proj.input_scale"] = np.ones(1, np.float32)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    source = Dequantized(tmp_path / "hf")
    expected = tensors[name].astype(np.float32) * tensors[f"{name}_scale"].astype(np.float32)
    np.testing.assert_array_equal(source.read(name), expected.astype(BF16))
    hf.import_hf(tmp_path / "hf", tmp_path / "a")
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=f"expected {name}_scale beside FP8 weights, got none"):
        hf.import_hf(tmp_path / "hf", tmp_path / "b")


def test_bf16(exported, tmp_path):
    hf.export_hf(exported / "a", tmp_path / "out", dtype="bf16")
    before, after = read_tensors(exported / "hf"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(BF16))


@pytest.mark.slow
@pytest.mark.skipif(
    not (PLACE or importlib.util.find_spec("compressed_tensors")),
    reason="compressed-tensors is not installed (NEMOJAX_COMPRESSED_TENSORS names the folder)",
)
def test_transformers_reads_it(exported, tmp_path):
    """Its logits, with the weights widened as it loads them, are ours of the directory imported again."""
    np.save(tmp_path / "tokens.npy", TOKENS)
    env = os.environ | {"PYTHONPATH": PLACE or ""}
    arguments = [str(exported / "out"), str(tmp_path / "tokens.npy"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", THEIRS, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    arch = hf.import_hf(exported / "out", tmp_path / "b")
    _, params = load_params(tmp_path / "b")
    batch = {"tokens": jnp.asarray(TOKENS)}
    ours = np.asarray(llama.apply(params, arch, batch)[0])
    np.testing.assert_allclose(ours, np.load(tmp_path / "wide.npy"), atol=2e-4, rtol=0)
    # activations rounded per token, there with scales of any size, here with powers of two
    kept = np.asarray(llama.apply(llama.quantize(params), arch, batch)[0])
    theirs, spread = np.load(tmp_path / "kept.npy"), ours.std()
    assert 0 < (theirs - ours).std() < 0.2 * spread and 0 < (kept - ours).std() < 0.2 * spread
