"""Which kernel attends, and that a machine's own kernel computes what plain attention does."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.backends import gpu, kernels
from nemojax.backends.kernels import attention_kernel
from nemojax.backends.rows import Rows
from nemojax.backends.splash import attend_splash
from nemojax.model.attention import attend_packed, kernel_of, make_context, masked_attention
from nemojax.sharding import MeshConfig, make_mesh, use_mesh

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "attention.py"
BF16, F32 = jnp.bfloat16, jnp.float32
ROW = Rows(8192, 128, BF16)


@pytest.fixture
def installed(monkeypatch):
    """cuDNN and tokamax, as far as the choice minds."""
    monkeypatch.setattr(gpu, "cudnn_version", lambda: 91002)
    monkeypatch.setattr(gpu, "tokamax_kernels", lambda: (None, None, None))


@pytest.mark.parametrize(
    "platform, rows, expected",
    [
        ("cpu", ROW, "blockwise"),
        ("cpu", ROW._replace(length=511), "short"),
        ("tpu", ROW, "splash"),
        ("tpu", ROW._replace(head_dim=80, dtype=F32), "splash"),
        ("tpu", ROW._replace(length=512), "short"),
        ("tpu", ROW._replace(split=True), "blockwise"),
        ("tpu", ROW._replace(length=512, split=True), "blockwise"),
        ("gpu", ROW, "tokamax"),
        ("cuda", ROW._replace(packed=False), "cudnn"),
        ("gpu", ROW._replace(packed=False, head_dim=256), "tokamax"),
        ("gpu", ROW._replace(head_dim=80), "blockwise"),
        ("gpu", ROW._replace(dtype=F32), "blockwise"),
        ("gpu", ROW._replace(split=True), "blockwise"),
        ("gpu", ROW._replace(length=512), "tokamax"),
        ("gpu", ROW._replace(length=256), "short"),
        ("neuron", ROW, "blockwise"),
    ],
)
def test_the_choice(installed, platform, rows, expected):
    assert attention_kernel(platform, rows, long=512 if platform == "cpu" else 2048) == expected


@pytest.mark.parametrize(
    "platform, rows, asked, reason",
    [
        ("gpu", ROW, "cudnn", "it knows no documents within a row"),
        ("gpu", ROW._replace(dtype=F32), "tokamax", "it computes in bfloat16, not in float32"),
        ("gpu", ROW._replace(head_dim=80), "tokamax", "192 or 256 channels, not 80"),
        ("gpu", ROW._replace(head_dim=256, packed=False), "cudnn", "up to 128 channels"),
        ("gpu", ROW, "splash", "it is a kernel for TPUs"),
        ("tpu", ROW, "cudnn", "it is a kernel for GPUs"),
        ("cpu", ROW, "tokamax", "it is a kernel for GPUs"),
        ("tpu", ROW._replace(split=True), "splash", "devices that share a row have another"),
        ("tpu", ROW._replace(split=True), "short", "devices that share a row have another"),
    ],
)
def test_a_kernel_that_cannot_is_refused(installed, platform, rows, asked, reason):
    with pytest.raises(ValueError, match=f"^attention: expected .*, got {asked}: .*{reason}.*; choose auto$"):
        attention_kernel(platform, rows, asked, long=2048)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "cudnn_version", lambda: None)
    monkeypatch.setattr(gpu, "tokamax_kernels", lambda: None)
    assert attention_kernel("gpu", ROW, long=2048) == "blockwise"
    with pytest.raises(ValueError, match="tokamax 0.0.* is not installed"):
        attention_kernel("gpu", ROW, "tokamax", long=2048)
    with pytest.raises(ValueError, match="cuDNN is not installed"):
        attention_kernel("gpu", ROW._replace(packed=False), "cudnn", long=2048)


def test_it_minds_the_mesh_in_scope():
    assert kernel_of(512, 8, F32) == kernel_of(512, 8, F32, packed=False) == "blockwise"
    assert kernel_of(256, 8, F32) == "short"
    with use_mesh(make_mesh(MeshConfig(fsdp=4, context=2))):
        assert kernel_of(256, 8, F32) == "blockwise"


# --- splash, in Pallas's interpreter

LENGTH, HEADS, KV_HEADS, DIM = 150, 4, 2, 8
SEGMENTS = np.array([[1] * LENGTH, [1] * 47 + [2] * 81 + [3] + [0] * 21], np.int32)


def inputs(kv_heads: int = KV_HEADS) -> list[jax.Array]:
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [jax.random.normal(jax.random.key(i), (2, LENGTH, n, DIM)) for i, n in enumerate(heads)]


def mask(window: int | None) -> jax.Array:
    back_TS = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    same_BTS = SEGMENTS[:, :, None] == SEGMENTS[:, None]
    return jnp.asarray((back_TS >= 0) & (back_TS < (window or LENGTH)) & same_BTS)


@functools.partial(jax.jit, static_argnames="attend")
def value_and_grads(attend, q, k, v, d):
    out, vjp = jax.vjp(attend, q, k, v)
    return (out, *vjp(d))


def check_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("window", [None, 70])
def test_splash_is_plain_attention(window):
    """Two blocks, the second one filled up; documents, grouped heads, values and gradients."""
    want = value_and_grads(lambda q, k, v: masked_attention(q, k, v, mask(window)), *inputs())
    segments = jnp.asarray(SEGMENTS)
    splash = functools.partial(attend_splash, segments_BT=segments, window=window, block=128, interpret=True)
    check_close(value_and_grads(splash, *inputs()), want)


def test_splash_on_a_mesh_is_splash(monkeypatch):
    """Rows and heads split; the one KV head is held by every device."""
    arch = uniform(
        vocab_size=8, dim=32, num_layers=1, num_heads=4, num_kv_heads=1, ffn_width=8, context=LENGTH
    )
    positions = jnp.broadcast_to(jnp.arange(LENGTH), SEGMENTS.shape)
    ctx = make_context(arch, positions, jnp.asarray(SEGMENTS), kernel="splash")
    q, k, v, d = inputs(1)
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        got = value_and_grads(lambda q, k, v: attend_packed(q, k, v, ctx, Attention(1)), q, k, v, d)
    want = value_and_grads(lambda q, k, v: masked_attention(q, k, v, mask(None)), q, k, v, d)
    check_close(got, want)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
def test_whole_blocks_are_told_by_their_corners(window):
    from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask

    from nemojax.backends.splash import _Band

    ours, plain = _Band(512, window), LocalMask((512, 512), (window and window - 1, 0), 0)
    if window is None:
        plain = LocalMask((512, 512), (None, 0), 0)
    for i in range(0, 512, 128):
        for j in range(0, 512, 128):
            block = (slice(i, i + 128), slice(j, j + 128))
            got = np.broadcast_to(ours[block], (128, 128))
            assert np.array_equal(got, plain[block])


# --- kernels of GPUs


def test_where_documents_begin():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]])
    assert gpu.document_starts(segments).tolist() == [[0, 0, 2, 2, 2, 5, 5], [0] * 7]


def test_each_machine_says_the_same_things():
    for platform in ("cpu", "gpu", "tpu"):
        machine = kernels.machine(platform)
        assert isinstance(machine.COMPILER_OPTIONS, dict)
        assert all(machine.refusal(kernel, ROW) is None for kernel in machine.KERNELS if platform != "gpu")


@pytest.mark.slow
@pytest.mark.skipif("NEMOJAX_CUDA_PLUGINS" not in os.environ, reason="no CUDA plugin (NEMOJAX_CUDA_PLUGINS)")
def test_kernels_compile_for_an_h100():
    """cuDNN's and tokamax's, where they are installed, forward and backward."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NEMOJAX_LIBTPU")}
    command = [sys.executable, str(BENCHMARK), "--targets=H100", "--vocab=1024", "--length=2048"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stderr
    found = dict(re.findall(r"^  (\w+) +(.*)$", out.stdout, re.MULTILINE))
    assert " GiB" in found["blockwise"]
    expected = {
        "cudnn": ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"),
        "tokamax": ("__gpu$xla.gpu.triton",),
    }
    missing = [name for name in expected if "is not installed" in found[name]]
    for name in expected.keys() - missing:
        assert set(expected[name]) <= set(found[name].split()), found[name]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
