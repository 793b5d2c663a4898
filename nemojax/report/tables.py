"""The page's numbers as tables of text: sizes, speed, quality, distillation, reinforcement, wall times."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from nemojax.arch import describe
from nemojax.report.read import SOLUTION, Pipeline, Stage
from nemojax.stage import read_json

Interval = tuple[float, float, float]
NONE = "–"
_BYTES = {"float32": 4, "bfloat16": 2}
_TERMS = ("kl", "cosine", "lm")  # of the distillation loss; its other fields are not weights
_TRAINED = ("pretrain", "compress", "distill", "sft", "rl")


@dataclass(frozen=True)
class Table:
    """Text cells; the first of a row is its heading. `note`: a sentence below, may be empty."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        caption, note = html.escape(self.caption), html.escape(self.note)
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table><p>{note}</p>"


@dataclass(frozen=True)
class Model:
    """One model of the comparison, with the row that `evaluate` wrote about it (may be empty)."""

    name: str
    stage: Stage | None
    row: Mapping[str, Any]

    @property
    def heldout(self) -> Mapping[str, float]:
        return self.row.get("heldout") or {}

    def passed(self) -> dict[str, dict[str, Interval]]:
        """{family: {"on" | "off": (pass@1, low, high)}}, the family `all` last."""
        out: dict[str, dict[str, Interval]] = {}
        for mode, families in sorted((self.row.get("tasks") or {}).items(), reverse=True):
            for family, summary in families.items():
                if (interval := wilson(summary)) is not None:
                    out.setdefault(family, {})[mode] = interval
        return dict(sorted(out.items(), key=lambda item: (item[0] == "all", item[0])))


def models(pipeline: Pipeline) -> list[Model]:
    """The evaluated models, each after the one it was made from; sizes alone where `evaluate` is missing."""
    if evaluate := pipeline.first("evaluate"):
        order = {stage.name: n for n, stage in enumerate(pipeline.stages)}
        found = [
            Model(name, pipeline.stage_at(str(row.get("artifact", ""))), row)
            for name, row in (evaluate.result.get("models") or {}).items()
        ]
        return sorted(found, key=lambda m: order[m.stage.name] if m.stage else len(order))
    rows = []
    for stage in pipeline.stages:
        arch = stage.arch() if stage.kind in _TRAINED and stage.wall_seconds is not None else None
        if arch:
            row = {
                "num_params": arch.num_params(),
                "num_block_params": arch.num_block_params(),
                "kv_elements_per_token": arch.kv_elements_per_token(),
            }
            rows.append(Model(stage.name, stage, row))
    return rows


def wilson(summary: Mapping[str, Any], z: float = 1.96) -> Interval | None:
    """pass@1 with its 95% Wilson score interval over prompts; None when nothing was graded."""
    p, prompts, failed = (summary.get(key, 0.0) for key in ("pass@1", "prompts", "verifier_error_rate"))
    if not (is_number(p) and is_number(prompts) and is_number(failed)):
        return None
    if (n := prompts * (1 - failed)) <= 0:
        return None
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def size_table(pipeline: Pipeline, found: Sequence[Model]) -> Table:
    """Size, latency and held-out loss of every model."""
    sources = list(dict.fromkeys(s for m in found for s in m.heldout if s != "loss"))
    evaluate = pipeline.first("evaluate")
    dtype = _at(evaluate.config, "compute", "dtype") if evaluate else None
    width = _BYTES.get(str(dtype), 4)
    parent = found[0].row.get("num_block_params") if found else None
    rows = []
    for model in found:
        row, latency = model.row, model.row.get("latency") or {}
        blocks = row.get("num_block_params")
        rows.append(
            (
                model.name,
                count(row.get("num_params")),
                percent(blocks / parent) if blocks is not None and parent else NONE,
                count(_times(row.get("kv_elements_per_token"), width)),
                number(latency.get("prefill_ms"), 1),
                count(latency.get("decode_tokens_per_second")),
                number(model.heldout.get("loss"), 3),
                *(number(model.heldout.get(s), 3) for s in sources),
            )
        )
    header = ("model", "parameters", "blocks vs parent", "KV bytes/token", "prefill ms", "decode tokens/s")
    notes = f"KV cache in {dtype or 'float32'}. Held-out loss in nats a token."
    if latency := _at(evaluate.config, "latency") if evaluate else None:
        notes += (
            f" Prefill: {latency.get('batch')} prompts of {latency.get('prompt')} tokens at once, median of "
            f"{latency.get('repeats')}; decode: {latency.get('new_tokens')} tokens each, on this machine."
        )
    return Table(
        "Size, latency and loss", (*header, "held-out loss", *(f"loss: {s}" for s in sources)), rows, notes
    )


def pass_table(found: Sequence[Model]) -> Table:
    """pass@1 by family and setting of the toggle, with intervals."""
    columns = [
        (family, mode)
        for family in dict.fromkeys(f for m in found for f in m.passed())
        for mode in ("on", "off")
        if any(mode in m.passed().get(family, {}) for m in found)
    ]
    rows = []
    for model in found:
        passed = model.passed()
        cells = [interval_text(passed.get(family, {}).get(mode)) for family, mode in columns]
        if passed:
            rows.append((model.name, *cells))
    prompts = {
        f"{summary['prompts']} of {family}"
        for m in found
        for families in (m.row.get("tasks") or {}).values()
        for family, summary in families.items()
        if family != "all" and "prompts" in summary
    }
    note = f"Held-out prompts: {', '.join(sorted(prompts))}. In brackets, the 95% Wilson interval."
    header = ("model", *(f"{family}, thinking {mode}" for family, mode in columns))
    return Table("pass@1", header, rows, note if rows else "")


def long_context_table(found: Sequence[Model]) -> Table:
    """Recall on long texts by task and length."""
    measured = {m.name: m.row["long_context"] for m in found if m.row.get("long_context")}
    lengths = list(dict.fromkeys(n for tasks in measured.values() for cells in tasks.values() for n in cells))
    rows = [
        (name, task, *(percent(_at(cells, n, "recall")) for n in lengths))
        for name, tasks in measured.items()
        for task, cells in tasks.items()
    ]
    header = ("model", "task", *(f"{int(n):,} tokens" for n in lengths))
    return Table(
        "Long context", header, rows, "Share of the expected strings that answers hold." if rows else ""
    )


def distill_table(pipeline: Pipeline) -> Table:
    """Every distillation of the pipeline, the one by the LM loss alone among them."""
    rows = []
    for stage in pipeline.of("distill"):
        result, terms = stage.result, stage.config.get("loss") or {}
        before, after = _at(result, "heldout_before", "loss"), _at(result, "heldout", "loss")
        used = " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if name in _TERMS and weight)
        rows.append(
            (
                stage.name,
                used or NONE,
                count(result.get("tokens")),
                number(_at(result, "heldout_teacher", "loss"), 3),
                number(before, 3),
                number(after, 3),
                number(result.get("gap_nats"), 3),
                percent(result.get("gap_closed")),
            )
        )
    header = ("stage", "loss terms", "tokens", "teacher", "before", "after", "gap opened", "gap closed")
    return Table("Distillation", header, rows, "Held-out loss in nats a token, over all sources.")


def gain_table(pipeline: Pipeline) -> Table:
    """What reinforcement changed: pass@1 before and after, and the paired difference with its interval."""
    rows = []
    for stage in pipeline.of("rl"):
        gains = stage.result.get("gain") or {}
        for mode, gain in gains.items():
            if mode == "all" and len(gains) == 2:  # one setting was asked: the same numbers again
                continue
            before, after = (_overall(stage.result.get(when) or {}, mode) for when in ("before", "after"))
            name = f"{stage.name}, " + ("overall" if mode == "all" else f"thinking {mode}")
            rows.append((name, count(after[1]), percent(before[0]), percent(after[0]), gain_text(gain)))
    header = ("stage", "prompts", "pass@1 before", "pass@1 after", "difference")
    return Table("Reinforcement, the same prompts before and after", header, rows, _BOOTSTRAP)


def comparison_table(pipeline: Pipeline, found: Sequence[Model]) -> Table:
    """`evaluate`'s paired comparisons, each turned so that the later model comes second."""
    order = {model.name: n for n, model in enumerate(found)}
    evaluate = pipeline.first("evaluate")
    rows = []
    for entry in (evaluate.result.get("comparisons") or []) if evaluate else []:
        before, after, gain = str(entry.get("before")), str(entry.get("after")), entry
        if order.get(before, 0) > order.get(after, 0):
            before, after = after, before
            gain = {"pass@1": -entry["pass@1"], "low": -entry["high"], "high": -entry["low"]}
        rows.append((f"{before} → {after}", str(entry.get("thinking", "")), gain_text(gain)))
    rows.sort(key=lambda row: row[1], reverse=True)
    return Table("pass@1, model against model", ("models", "thinking", "difference"), rows, _BOOTSTRAP)


_BOOTSTRAP = "In brackets, the 95% interval of a paired bootstrap over prompts, in points of pass@1."


def stage_table(pipeline: Pipeline) -> Table:
    """Every stage with its state and wall time; kinds that are absent are listed as not run."""
    rows = [
        (s.name, s.kind, s.state, NONE if s.wall_seconds is None else f"{s.wall_seconds:,.1f}")
        for s in pipeline.stages
    ]
    rows += [(kind, kind, "not run", NONE) for kind in pipeline.missing()]
    total = sum(s.wall_seconds or 0.0 for s in pipeline.stages)
    rows.append(("total", "", "", f"{total:,.1f}"))
    return Table("Stages", ("stage", "kind", "state", "wall seconds"), rows)


def block_table(pipeline: Pipeline) -> Table:
    """The chosen block of each layer beside the parent's, with its replace-one-block score."""
    stage = pipeline.first("compress")
    parent = pipeline.stage_at(str(stage.config.get("parent", ""))) if stage else None
    child_arch, parent_arch = stage.arch() if stage else None, parent.arch() if parent else None
    rows: list[tuple[str, ...]] = []
    if stage and child_arch and parent_arch:
        chosen = (read_json(stage.path / SOLUTION) or {}).get("layers", [])
        scores = {entry.get("layer"): entry.get("score") for entry in chosen}
        for i, (old, new) in enumerate(zip(parent_arch.blocks, child_arch.blocks, strict=False)):
            cells = [describe(sub) for sub in (old.attn, new.attn, old.ffn, new.ffn)]
            rows.append((str(i), *cells, number(scores.get(i), 4)))
    header = ("layer", "parent attention", "child attention", "parent FFN", "child FFN", "score")
    metric = _at(stage.config, "scoring", "metric") if stage else None
    return Table(
        "The child, layer by layer", header, rows, f"Score: {metric or 'cost'} of this block alone, replaced."
    )


def library_table(pipeline: Pipeline) -> Table:
    """Blockwise distillation: mean loss over layers, first and last, by kind of block."""
    stage = pipeline.first("compress")
    rows = []
    for kind, curve in ((stage.result.get("bld") or {}) if stage else {}).items():
        first, last = (_mean(curve.get(when)) for when in ("first", "last"))
        rows.append((kind, number(first, 4), number(last, 4)))
    note = "Loss at the first and the last step, mean over layers."
    return Table("Blockwise distillation", ("block", "first", "last"), rows, note)


def headlines(pipeline: Pipeline, found: Sequence[Model]) -> list[tuple[str, str, str]]:
    """(what, number, explanation) for the top of the page; what was not run is left out."""
    out: list[tuple[str, str, str]] = []
    compress, rl, sft = (pipeline.first(kind) for kind in ("compress", "rl", "sft"))
    if compress and is_number(ratio := compress.result.get("block_params_ratio")):
        sizes = (count(compress.result.get(key)) for key in ("parent_num_params", "num_params"))
        out.append(("of the parent's block parameters kept", percent(ratio), " → ".join(sizes) + " in all"))
    best = max(pipeline.of("distill"), key=_kl_weight, default=None)
    if best and is_number(best.result.get("gap_nats")):
        gap = number(best.result.get("gap_nats"), 3)
        closed = percent(best.result.get("gap_closed"))
        out.append(("of the gap closed by distillation", closed, f"pruning opened {gap} nats a token"))
    tuned = next((m for m in found if sft and m.stage is sft), None)
    easiest = max(
        ((v[0], f, mode) for f, modes in (tuned.passed() if tuned else {}).items() if f != "all"
         for mode, v in modes.items()), default=None,
    )  # fmt: skip
    if easiest:
        out.append(("pass@1 after SFT", percent(easiest[0]), f"{easiest[1]}, thinking {easiest[2]}"))
    gain = _at(rl.result, "gain", "all") if rl else None
    if gain:
        value, _, interval = gain_text(gain).partition(" ")
        out.append(("points of pass@1 by GRPO", value, f"95% interval {interval}"))
    ends = [_at(m.row, "latency", "decode_tokens_per_second") for m in (*found[:1], *found[-1:])]
    speeds = [speed for speed in ends if is_number(speed)]
    if len(found) > 1 and len(speeds) == 2 and speeds[0] > 0:
        told = f"{count(speeds[0])} → {count(speeds[1])} tokens/s"
        out.append(("the parent's decoding speed", f"{speeds[1] / speeds[0]:.2f}×", told))
    total = sum(s.wall_seconds or 0.0 for s in pipeline.stages)
    out.append(("minutes in all", f"{total / 60:.1f}", f"{len(pipeline.stages)} stages"))
    return out


def count(value: Any) -> str:
    return f"{value:,.0f}" if is_number(value) else NONE


def number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if is_number(value) else NONE


def percent(share: Any) -> str:
    return f"{100 * share:.1f}%" if is_number(share) else NONE


def interval_text(interval: Interval | None) -> str:
    """`81.2% [77.6, 84.4]`."""
    if interval is None:
        return NONE
    value, low, high = (100 * x for x in interval)
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def gain_text(gain: Mapping[str, Any]) -> str:
    """`+12.1 [+8.0, +16.2]` points."""
    values = [gain.get(key) for key in ("pass@1", "low", "high")]
    # adding zero turns -0.0 into 0.0
    points = [f"{round(100 * v, 1) + 0.0:+.1f}" if is_number(v) else NONE for v in values]
    return f"{points[0]} [{points[1]}, {points[2]}]"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _overall(summaries: Mapping[str, Any], mode: str) -> tuple[float | None, int]:
    """pass@1 and number of prompts over all families, of one setting of the toggle or (`all`) of both."""
    parts = [s["all"] for m, s in summaries.items() if mode in (m, "all") and "all" in s]
    prompts = sum(part.get("prompts", 0) for part in parts)
    passed = [part.get("pass@1") for part in parts]
    if not prompts or not all(is_number(p) for p in passed):
        return None, prompts
    return sum(part["pass@1"] * part["prompts"] for part in parts) / prompts, prompts


def _times(value: Any, factor: float) -> float | None:
    return value * factor if is_number(value) else None


def _mean(values: Any) -> float | None:
    return sum(values) / len(values) if values else None


def _kl_weight(stage: Stage) -> float:
    weight = _at(stage.config, "loss", "kl")
    return weight if is_number(weight) else 0.0
