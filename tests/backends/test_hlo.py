"""Collectives of real compiled programs, and of lines as compilers for other machines write them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nemojax.backends.hlo import Collective, collectives, estimated_cycles, kernels
from nemojax.sharding import MeshConfig, make_mesh

FOUR = {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}


def test_collectives_of_a_loop_count_as_often_as_it_turns():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp", "tensor"), out_specs=P("fsdp"), check_vma=False)
    def program(x):
        def body(_, h):
            return jnp.sin(jax.lax.psum(h, "tensor"))

        x = jax.lax.fori_loop(0, 5, body, x)
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(jnp.cos(whole), "fsdp", tiled=True)

    text = jax.jit(program).lower(jnp.ones((32, 16))).compile().as_text()
    found = {(c.kind, c.axes): (c.count, c.bytes) for c in collectives(text or "", dict(mesh.shape))}
    shard = 8 * 8 * 4  # bytes
    assert found["all-reduce", ("tensor",)] == (5, 5 * 2 * shard / 2)
    assert found["all-gather", ("fsdp",)] == (1, 3 * shard)
    assert found["reduce-scatter", ("fsdp",)] == (1, 3 * shard)
    assert len(found) == 3


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            "%a = bf16[4,512]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, "
            "replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}",
            Collective("all-gather", ("fsdp",), 1, 2048),
        ),
        (
            "%a = (bf16[512,256]{0,1}, bf16[512,512]{0,1}) all-gather-start(%p), channel_id=1, "
            "replica_groups={{0,1},{2,3}}, dimensions={1}",
            Collective("all-gather", ("tensor",), 1, 512 * 512),
        ),
        (
            "%a = ((bf16[512,64]{0,1}), bf16[256,64]{0,1}) reduce-scatter-start(%p), channel_id=6, "
            "replica_groups={{0,1},{2,3}}, dimensions={0}",
            Collective("reduce-scatter", ("tensor",), 1, 256 * 64 * 2),
        ),
        (
            "%a = f32[100]{0} all-reduce(%p), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=1,"
            "'axis_2'=2] {'axis_2'}, to_apply=%add",
            Collective("all-reduce", ("tensor",), 1, 400),
        ),
        (
            "%a = (f32[], f32[]) all-reduce(%p, %q), channel_id=3, "
            "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0','axis_1'}",
            Collective("all-reduce", ("fsdp", "tensor"), 1, 12),
        ),
        (
            "%a = bf16[10]{0} collective-permute(%p), channel_id=4, "
            "source_target_pairs={{0,0},{1,2},{2,1},{3,3}}",
            Collective("collective-permute", ("fsdp", "tensor"), 1, 20),
        ),
        (
            "%a = f8e4m3fn[8,16]{1,0} all-to-all(%p), channel_id=5, replica_groups={{0,2},{1,3}}",
            Collective("all-to-all", ("fsdp",), 1, 64),
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Collective) else "",
)
def test_lines_of_compilers(line, expected):
    program = f"ENTRY %main (p: f32[]) -> f32[] {{\n  {line}\n}}\n"
    assert collectives(program, FOUR) == [expected]
    twice = f"ENTRY %main (p: f32[]) -> f32[] {{\n  {line}\n  {line.replace('%a', '%b')}\n}}\n"
    assert collectives(twice, FOUR) == [expected], "one channel is one collective"


def test_an_all_reduce_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter():
    """As libtpu writes it."""
    text = """
%all-reduce-scatter.2.clone (input: bf16[512,256]) -> bf16[256,256] {
  %input = bf16[512,256] parameter(0)
  %all-reduce.1 = bf16[512,256] all-reduce(%input), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %mine = bf16[256,256] dynamic-slice(%all-reduce.1, %start, %zero), dynamic_slice_sizes={256,256}
}

ENTRY %main (p: bf16[512,256]) -> bf16[256,256] {
  ROOT %fusion = bf16[256,256] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2.clone
}
"""
    assert collectives(text, FOUR) == [Collective("reduce-scatter", ("tensor",), 1, 256 * 256 * 2)]


def test_loops_without_a_known_count_turn_as_often_as_their_condition_says():
    program = """
%cond (p: (s32[], f32[4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body
}
"""
    assert collectives(program, FOUR) == [Collective("all-reduce", ("tensor",), 6, 6 * 16)]


def test_an_attribute_of_several_lines_does_not_end_a_computation():
    """As libtpu writes a kernel's metadata."""
    gather = "bf16[4,512] all-gather({}), channel_id={}, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={{0}}"
    cycles = 'backend_config={"estimated_cycles":"30"}'
    text = f"""HloModule jit_step

%body (p: s32[]) -> bf16[4,512] {{
  %kernel = bf16[4,256] custom-call(%p), frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{block_q: 512}}"
}}}}, metadata={{op_name="splash"}}
  %first = {gather.format("%kernel", 1)}
  ROOT %last = bf16[4,512] fusion(%first), calls=%fused, {cycles}
}}, execution_thread="main"

%condition (p: s32[]) -> pred[] {{
  %limit = s32[] constant(6)
  ROOT %more = pred[] compare(%p, %limit), direction=LT
}}

ENTRY %main (p: s32[]) -> bf16[4,512] {{
  %loop = s32[] while(%p), condition=%condition, body=%body
  ROOT %second = {gather.format("%p", 2)}
}}
"""
    [found] = collectives(text, FOUR)
    assert (found.kind, found.count, found.bytes) == ("all-gather", 7, 7 * 2048)
    assert estimated_cycles(text) == (180, ((6, 30),))


def test_kernels_are_counted():
    text = 'a custom_call_target="tpu_custom_call", b custom_call_target="x" custom_call_target="x"'
    assert kernels(text) == {"tpu_custom_call": 1, "x": 2}


def test_cycles_of_a_loop_count_as_often_as_it_turns():
    """As libtpu writes them; a fusion has those of all that it does."""
    text = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]) parameter(0)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"w":{"estimated_cycles":"700"}}
  ROOT %t = (s32[], f32[8]) tuple(%i, %f)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]) parameter(0)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, config={"known_trip_count":{"n":"5"}}
  ROOT %g = f32[8]{0} fusion(%v), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"30"}
}
"""
    assert estimated_cycles(text) == (5 * 700 + 30, ((5, 700.0),))
    assert estimated_cycles(jax.jit(jnp.sin).lower(1.0).compile().as_text() or "") == (0.0, ())
