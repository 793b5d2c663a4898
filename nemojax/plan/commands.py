"""`nemojax plan`: does it fit, how fast can it be, what does it cost."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemojax.commands import Parser

if TYPE_CHECKING:
    from nemojax.plan.planner import Plan
    from nemojax.plan.programs import Work
    from nemojax.sharding import MeshConfig

GIB = 2**30
EPILOG = """\
Compiles the very programs that the step would run, for a machine that need not be there, and prints what
a device would hold, what it would send, and how long it would take at least. TPUs need libtpu (the extra
`tpu`), GPUs jax-cuda12-plugin and jax-cuda12-pjrt, or those of cuda13; NEMOJAX_LIBTPU and
NEMOJAX_CUDA_PLUGINS name folders that have them. Times are a roofline's: peak rates and bandwidths,
everything hidden behind what takes longest."""


def plan_command(args: Sequence[str]) -> None:
    parser = _parser()
    options = parser.parse_args(args)
    _before_jax(options.topology)

    from nemojax.backends.topology import open_topology
    from nemojax.plan.fitting import what_fits
    from nemojax.plan.planner import make_plan

    work, mesh = _work(options, parser), _mesh(options.mesh, parser)
    topology = open_topology(options.topology)

    def told(line: str) -> None:
        print(f"plan: {line}", file=sys.stderr, flush=True)

    if options.sweep:
        _sweep(options, work, topology, told)
        return
    plan = make_plan(work, topology, mesh)
    remedy = None
    if not plan.fits and options.tries:
        remedy = what_fits(plan, mesh, tries=options.tries, told=told)
    if options.json:
        out = plan.to_json() | ({"cost": plan.cost(options.tokens, options.price)} if options.tokens else {})
        if remedy:
            out["would_fit"] = {"change": remedy[0].words, **remedy[1].to_json()}
        print(json.dumps(out))
        return
    print(as_text(plan, options.tokens, options.price))
    if remedy:
        change, found = remedy
        print(f"would fit    with {change.words}: {_gib(found.largest.bytes)} of {_gib(found.room)} a device")
    elif not plan.fits and options.tries:
        print("would fit    nothing of what was tried; take more chips")


def _sweep(options: Any, work: Work, topology: Any, told: Any) -> None:
    from nemojax.plan.fitting import sweep

    batches = tuple(sorted({int(n) for n in options.batches.split(",")} if options.batches else {work.batch}))
    plans = sweep(work, topology, batches, compiled=options.sweep, told=told)
    if options.json:
        print(json.dumps([plan.to_json() for plan in plans]))
        return
    if not plans:
        raise ValueError(f"plan: nothing of {work.step} fits {topology.name}; take more chips")
    print(table(plans))


def table(plans: Sequence[Plan]) -> str:
    """A line a plan: mesh, batch, memory, time."""
    head = ("batch", 7), ("GiB/device", 12), ("fits", 6), ("step s", 10), ("MFU", 7), ("tokens/s", 12)
    lines = [f"{'mesh':<28}" + "".join(f"{name:>{width}}" for name, width in head)]
    for plan in plans:
        mesh = ",".join(f"{n}:{s}" for n, s in plan.mesh.items() if s > 1) or "one device"
        fits = "yes" if plan.fits else "no"
        lines.append(
            f"{mesh:<28}{plan.work.batch:>7}{plan.largest.bytes / GIB:>12.1f}{fits:>6}"
            f"{plan.step_seconds:>10.4g}{100 * plan.mfu:>6.0f}%{plan.tokens_per_second:>12,.0f}"
        )
    return "\n".join(lines)


def as_text(plan: Plan, tokens: float | None, price: float | None) -> str:
    """A plan for people."""
    top, work = plan.topology, plan.work
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    mesh = f"{len(top.devices)} devices: {mesh}" if mesh else "one device"
    lines = [
        f"{work.step}, batch {work.batch}, context {work.context:,}, {work.dtype}, on {top.num_chips} "
        f"{top.chip.name} ({mesh})"
    ]
    for part in plan.parts:
        lines += ["", f"{part.name}, {part.bytes / GIB:.2f} GiB a device"]
        held = {**part.held, **part.beside, "temporaries": part.compiled.temporaries}
        lines += [f"  {name:<18}{size / GIB:>10.2f} GiB" for name, size in held.items()]
        if host := part.compiled.host:
            lines.append(f"  {'in host memory':<18}{host / GIB:>10.2f} GiB; copies of it cost time besides")
        lines.append(
            f"  at least {part.seconds:.4g} s: computing {part.compute_seconds:.4g}, memory "
            f"{part.memory_seconds:.4g}, sending {part.collective_seconds:.4g}"
        )
        if part.expected_seconds is not None:
            loops = ", ".join(f"{turns} x {seconds:.3g}" for turns, seconds in part.loops[:6])
            expected = f"  its compiler expects {part.expected_seconds:.4g} s, sending not counted"
            lines.append(expected + (f"; blocks: {loops}" if loops else ""))
        for one in part.compiled.collectives[:6]:
            axes, each = ", ".join(one.axes) or "?", one.bytes / max(one.count, 1) / 2**20
            lines.append(f"  {one.kind:<20}{axes:<16}{one.count:>8.0f} x {each:>9.2f} MiB")
        if part.compiled.kernels:
            lines.append("  kernels: " + ", ".join(f"{n} {c}" for n, c in part.compiled.kernels.items()))
        if part.compiled.refused:
            lines.append(f"  the compiler: {part.compiled.refused}")
        lines.append(f"  compiled in {part.compiled.compile_seconds:.0f} s")
    free = plan.room - plan.largest.bytes
    verdict = f"yes, {_gib(free)} of {_gib(plan.room)} free" if plan.fits else f"no, by {_gib(max(-free, 0))}"
    lines.append("")
    if plan.attention:
        lines.append(f"attention    {plan.attention}")
    if plan.caveat:
        lines.append(f"but          {plan.caveat}")
    lines += [
        f"fits         {verdict}",
        f"step         {plan.step_seconds:.4g} s at least, {plan.tokens_per_second:,.0f} tokens/s, MFU "
        f"{100 * plan.mfu:.0f}% at most",
    ]
    if tokens:
        cost = plan.cost(tokens, price)
        money = f", {cost['cost']:,.0f} at {price:g} a chip-hour" if price is not None else ""
        lines.append(
            f"{tokens:,.0f} tokens  {cost['hours']:,.1f} h, {cost['chip_hours']:,.0f} chip-hours{money}"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _parser() -> Parser:
    parser = Parser(prog="nemojax plan", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", required=True, help="architecture file, or a shipped name")
    add("--step", default="train", help="train (also SFT), distill, generate, rl, bld, score")
    add("--teacher", default="", help="architecture of the teacher, for distill")
    add(
        "--topology",
        required=True,
        help="v5p:8x8x8, v6e:16x16, v6e:16x16*2 (slices), 7x:4x4x4, h100:512, cpu:8",
    )
    add("--mesh", default="", help="fsdp:64,tensor:8; what is left goes to fsdp")
    add("--batch", type=int, default=1, help="rows of a step, or sequences generated together")
    add("--context", type=int, default=8192, help="tokens of a row, or room for prompt and answer")
    add("--dtype", default="bf16", choices=("bf16", "fp8", "f32"), help="of activations and products")
    add("--weights", default="float32", choices=("float32", "bfloat16"), help="trained weights and moments")
    add("--remat", default="full", choices=("none", "dots", "full", "offload"), help="see compute.remat")
    add("--accumulate", type=int, default=1, help="micro-batches a step")
    add("--loss_chunk", type=int, default=1024, help="positions with logits at once; 0: all")
    add("--zero1", action="store_true", help="optimiser moments are split over the data axis too")
    add("--offload", action="store_true", help="optimiser moments lie in host memory")
    add("--terms", default="kl,cosine", help="terms of a distillation's loss")
    add("--answers", type=int, default=0, help="rl: sequences sampled together; 0: batch")
    add("--generated", type=int, default=0, help="rl: tokens of an answer; 0: half of context")
    add("--tokens", type=float, default=None, help="a budget to price, as 5e9")
    add("--price", type=float, default=None, help="of a chip-hour, in any currency")
    add("--tries", type=int, default=3, help="compilations in search of what would fit; 0: none")
    add("--sweep", type=int, nargs="?", const=6, default=0, help="try meshes and batches; N are compiled")
    add("--batches", default="", help="batches of a sweep, as 64,128")
    add("--json", action="store_true", help="one object")
    return parser


def _before_jax(topology: str) -> None:
    """What JAX reads when it starts: nothing here needs a device, and virtual ones have a number."""
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if count := re.fullmatch(r"cpu:(\d+)", topology):
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count[1]}"


def _work(options: Any, parser: Parser) -> Work:
    from nemojax.arch import load_arch
    from nemojax.distill.losses import TERMS
    from nemojax.plan.programs import STEPS, Training, Work

    if options.step not in STEPS:
        parser.error(f"--step: expected one of {', '.join(STEPS)}, got {options.step!r}")
    terms = tuple(options.terms.split(","))
    if unknown := sorted(set(terms) - set(TERMS)):
        parser.error(f"--terms: expected some of {', '.join(TERMS)}, got {unknown[0]!r}")
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", options.batches):
        parser.error(f"--batches: expected whole numbers such as 64,128, got {options.batches!r}")
    training = Training(
        options.weights,
        options.remat,
        options.accumulate,
        options.loss_chunk,
        terms,
        zero1=options.zero1,
        offload=options.offload,
    )
    return Work(
        load_arch(options.arch),
        options.step,
        options.batch,
        options.context,
        load_arch(options.teacher) if options.teacher else None,
        options.dtype,
        training,
        options.answers,
        options.generated,
    )


def _mesh(text: str, parser: Parser) -> MeshConfig:
    from nemojax.sharding import AXES, MeshConfig

    sizes: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, size = item.partition(":")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
            parser.error(f"--mesh: expected AXIS:SIZE of {', '.join(AXES)}, got {item!r}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)
