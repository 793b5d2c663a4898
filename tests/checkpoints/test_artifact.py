"""Checkpoints: canonical on disk, exact back, the last and the best kept, another format refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemojax.checkpoints.artifact import (
    Checkpoints,
    final_step,
    finished_steps,
    load_params,
    load_tokenizer,
    params_reader,
    save_params,
)
from nemojax.checkpoints.store import _shares, canonical, flat_paths, to_host
from nemojax.model import layout
from tests.checkpoints.toy_models import MIXED, random_params, write_tokenizer


def training_state(dtype=jnp.float32):
    params = jax.tree.map(jnp.asarray, random_params(MIXED, dtype=dtype))
    opt = jax.tree.map(lambda x: x + 1, optax.adamw(1e-3).init(params))
    return params, {"opt": opt, "ema": params, "key": jax.random.key(3), "skipped": jnp.int32(4)}


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    flat = flat_paths(want)
    for path, leaf in flat_paths(got).items():
        assert leaf.dtype == flat[path].dtype, path
        np.testing.assert_array_equal(to_host(leaf), to_host(flat[path]), err_msg=path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_of_state(tmp_path, dtype):
    params, state = training_state(dtype)
    with_disk = Checkpoints(tmp_path, arch=MIXED)
    with_disk.save(7, params, state, {"offset": 12})
    with_disk.wait()
    assert_equal(with_disk.restore_params(7, params), params)
    assert_equal(with_disk.restore_state(7, jax.eval_shape(lambda: state)), state)
    assert with_disk.restore_data(7) == {"offset": 12}
    with_disk.close()


def test_disk_is_canonical(tmp_path):
    params, state = training_state()
    flat = canonical({"opt": state["opt"]}, MIXED)
    assert "opt/0/mu/layers/2/attn/q" in flat and not [p for p in flat if "runs" in p]
    save_params(tmp_path, MIXED, params)
    expected = flat_paths(layout.unstack(params, MIXED))
    leaves = params_reader(tmp_path).leaves
    assert {p: tuple(x.shape) for p, x in leaves.items()} == {p: x.shape for p, x in expected.items()}


def test_views_not_copies():
    params = random_params(MIXED)
    on_device = jax.tree.map(jnp.asarray, params)
    flat = canonical(on_device, MIXED)
    assert flat["layers/1/ffn/up"].base is flat["layers/2/ffn/up"].base is not None


def test_canonical_input_and_sharded_restore(tmp_path):
    params, _ = training_state()
    save_params(tmp_path, MIXED, layout.unstack(params, MIXED))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), params)
    sharding["embed"]["weight"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    arch, got = load_params(tmp_path, shardings=sharding)
    assert arch == MIXED
    assert_equal(got, params)
    assert got["embed"]["weight"].sharding == sharding["embed"]["weight"]
    Checkpoints(tmp_path / "sharded", arch=MIXED).save(1, got)


def test_load_casts(tmp_path):
    params, _ = training_state()
    save_params(tmp_path, MIXED, params)
    _, got = load_params(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def test_keeps_last_and_best(tmp_path):
    params, _ = training_state()
    kept = Checkpoints(tmp_path, keep_last=2, best="loss:min", arch=MIXED)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        kept.save(step, params, metrics={"loss": loss})
    kept.wait()
    assert (kept.steps(), kept.latest(), kept.best()) == ([2, 4, 5], 5, 2)
    kept.close()
    again = Checkpoints(tmp_path, keep_last=2, best="loss:min", arch=MIXED)
    assert (again.steps(), again.best()) == ([2, 4, 5], 2)
    again.close()


def test_save_copies_before_it_returns(tmp_path):
    params = random_params(MIXED)
    held = Checkpoints(tmp_path, arch=MIXED)
    before = params["norm"]["scale"].copy()
    held.save(1, params)
    params["norm"]["scale"][:] = 0
    held.wait()
    np.testing.assert_array_equal(np.asarray(held.restore_params(1, params)["norm"]["scale"]), before)
    held.close()


def test_another_format_version(tmp_path):
    save_params(tmp_path, MIXED, random_params(MIXED))
    (tmp_path / "checkpoints" / "format.json").write_text(json.dumps({"format_version": 99}))
    for use in (load_params, final_step, Checkpoints):
        with pytest.raises(ValueError, match="expected format_version 1, got 99"):
            use(tmp_path)


def test_mismatch_names_the_leaf(tmp_path):
    params, state = training_state()
    with_disk = Checkpoints(tmp_path, arch=MIXED)
    with_disk.save(1, params, state)
    with_disk.wait()
    with pytest.raises(ValueError, match="opt/1/trace/embed/weight: expected shape"):
        with_disk.restore_state(1, {"opt": (None, {"trace": params})})
    with pytest.raises(ValueError, match="no such checkpoint; finished steps are"):
        with_disk.restore_params(2, params)
    with_disk.close()
    other = MIXED.replace(vocab_size=32)
    with pytest.raises(ValueError, match=r"embed/weight: expected shape \(32, 32\), got \(64, 32\)"):
        load_params(tmp_path, other)
    with pytest.raises(ValueError, match="nothing: expected an artifact, got nothing there"):
        final_step(tmp_path / "nothing")
    (tmp_path / "pipe").mkdir()
    with pytest.raises(ValueError, match="pipe: expected checkpoints/<step>, got none"):
        final_step(tmp_path / "pipe")
    (tmp_path / "pipe" / "pipeline.json").touch()
    with pytest.raises(
        ValueError, match="expected an artifact, got a pipeline; name one of the stages in it"
    ):
        final_step(tmp_path / "pipe")


def test_damaged_data_is_one_error(tmp_path, capfd):
    save_params(tmp_path, MIXED, random_params(MIXED))
    for file in (tmp_path / "checkpoints" / "0" / "params").rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="params"):
        load_params(tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_tokenizer_travels(tmp_path):
    write_tokenizer(tmp_path / "tok", 64)
    save_params(tmp_path / "a", MIXED, random_params(MIXED), tokenizer_dir=tmp_path / "tok")
    assert load_tokenizer(tmp_path / "a").convert_tokens_to_ids("<|eot_id|>") == 1
    with pytest.raises(ValueError, match="expected tokenizer.json, got none"):
        load_tokenizer(tmp_path)


def test_an_artifact_is_saved_again_over_what_a_kill_left(tmp_path):
    save_params(tmp_path, MIXED, random_params(MIXED))
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "params")
    save_params(tmp_path, MIXED, random_params(MIXED))
    assert finished_steps(tmp_path) == [0]


KILLED = """
import sys, numpy as np
from tests.checkpoints.toy_models import MIXED, random_params
from nemojax.checkpoints.artifact import Checkpoints
kept = Checkpoints(sys.argv[1], keep_last=2, arch=MIXED)
for step in range(1, 10_000):
    params = random_params(MIXED)
    params["norm"]["scale"][:] = step
    kept.save(step, params, {"n": np.full((400, 400), step)})
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.07, 0.11])
def test_kill_in_the_middle_of_a_save(tmp_path, delay):
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) and int(line) < 5:
        pass
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = Checkpoints(tmp_path, arch=MIXED)
    step = kept.latest()
    assert step is not None and step >= 4 and finished_steps(tmp_path)[-1] == step
    assert float(kept.restore_params(step, random_params(MIXED))["norm"]["scale"][0]) == step
    assert kept.restore_state(step, {"n": np.zeros((400, 400))})["n"][0, 0] == step
    kept.save(step + 1, random_params(MIXED))
    kept.close()
    assert all(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())


def test_full_disk(tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        kept = Checkpoints(small, arch=MIXED)
        params = random_params(MIXED)
        kept.save(1, {"norm": params["norm"]})
        kept.wait()
        with pytest.raises(ValueError, match="no space left while saving step 2"):
            kept.save(2, params, {"copy": params})
            kept.wait()
        assert finished_steps(small) == [1]
        assert "Traceback" not in capfd.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_processes_share_out_bytes_and_not_numbers_of_tensors():
    sizes = [8, 1, 1, 6, 1, 1, 8]
    shares = _shares(sizes, 3)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert sorted(sum(sizes[i] for i in share) for share in shares) == [8, 9, 9]
    assert _shares(sizes, 1) == [list(range(7))] and _shares([1], 2) == [[0], []]
