"""How programs are compiled, by machine and mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from nemojax.backends import gpu, kernels
from nemojax.sharding import MeshConfig, make_mesh, use_mesh


def test_a_gpu_alone_runs_small_products_at_once():
    """On a mesh that would take memory: see `decoding_options`."""
    alone, many = gpu.decoding_options(1), gpu.decoding_options(8)
    assert alone == {**many, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def test_programs_that_decode_are_compiled_for_the_mesh_in_scope(monkeypatch):
    asked = []

    def decoding_options(devices: int) -> dict[str, int]:
        asked.append(devices)
        return {}

    own = SimpleNamespace(COMPILER_OPTIONS={}, decoding_options=decoding_options)
    monkeypatch.setattr(kernels, "machine", lambda name: own)
    decode, train = (kernels.jit(lambda: "gpu", decodes=decodes)(jnp.sin) for decodes in (True, False))
    assert decode(0.0) == train(0.0) == decode(0.0) == 0.0 and asked == [1]
    with use_mesh(make_mesh(MeshConfig(fsdp=len(jax.devices())))):
        assert decode.lower(0.0).compile()(0.0) == 0.0
    assert asked == [1, len(jax.devices())] and len(jax.devices()) > 1
