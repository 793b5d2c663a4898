"""The `report` stage: one self-contained HTML page about a pipeline, next to its stages.

It reads what the stages wrote (result.json, metrics.jsonl, arch.json, DONE) and computes nothing but
intervals, so that it can be made at any moment; what has not been run is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax import plots
from nemojax.buckets import place, write_text
from nemojax.config import field, required
from nemojax.data.chat import split_thinking
from nemojax.report import tables
from nemojax.report.read import CONVERSATIONS, Pipeline, Stage, read_pipeline
from nemojax.report.tables import Model, Table, is_number
from nemojax.stage import run_stage

FILE = "report.html"


@dataclass(frozen=True)
class Config:
    pipeline: str = required("directory of the pipeline, as `nemojax run` made it")
    title: str = field("nemojax report", "heading of the page")
    prompts: int = field(3, "sample prompts of each family and setting of the toggle")


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption. `svg` is ours and goes into the page as it is."""

    caption: str
    svg: str

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f'<div style="max-width: 36rem">{self.svg}</div>'


@dataclass(frozen=True)
class Answer:
    """One model's completion, its thinking apart."""

    model: str
    thinking: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Sample:
    """One prompt with every model's answer."""

    prompt: str
    reference: str
    answers: list[Answer]


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Writes `report.html` into the pipeline's directory; returns its path in there and what it shows."""
    pipeline = place(cfg.pipeline)
    read_pipeline(pipeline)  # a clear error before anything is written
    return run_stage("report", cfg, workdir, [pipeline], lambda _: write(cfg, pipeline / FILE))


def write(cfg: Config, path: Path) -> dict[str, Any]:
    """Renders the page to `path`, whole or not at all."""
    html, shown = render(cfg)
    write_text(path, html)
    return {"path": path.name, "bytes": len(html.encode()), **shown}


def render(cfg: Config) -> tuple[str, dict[str, int]]:
    """The page's text, and the numbers of its stages, figures and sample conversations."""
    import jinja2
    from markupsafe import Markup

    pipeline = read_pipeline(cfg.pipeline)
    found = tables.models(pipeline)
    figures = {stage.name: stage_figures(stage) for stage in pipeline.stages}
    maps, quality = _drawn(block_maps(pipeline)), quality_figures(found)
    samples = conversations(pipeline, found, cfg.prompts)
    context = {
        "title": cfg.title,
        "directory": pipeline.path.name,
        "headlines": tables.headlines(pipeline, found),
        "stages": tables.stage_table(pipeline),
        "missing": set(pipeline.missing()),
        "curves": {name: drawn for name, drawn in figures.items() if drawn},
        "maps": maps,
        "blocks": tables.block_table(pipeline),
        "library": tables.library_table(pipeline),
        "sizes": tables.size_table(pipeline, found),
        "passes": tables.pass_table(found),
        "long": tables.long_context_table(found),
        "quality": quality,
        "distillation": tables.distill_table(pipeline),
        "gains": tables.gain_table(pipeline),
        "comparisons": tables.comparison_table(pipeline, found),
        "samples": samples,
        "versions": versions(pipeline),
        "configs": {s.name: json.dumps(s.config, indent=2, ensure_ascii=False) for s in pipeline.stages},
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nemojax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.jinja").render(context, svg=Markup)
    shown = {
        "stages": len(pipeline.stages),
        "figures": len(maps) + len(quality) + sum(map(len, figures.values())),
        "conversations": sum(len(s.answers) for group in samples.values() for s in group),
    }
    return html, shown


def stage_figures(stage: Stage) -> list[Figure]:
    """What a stage's metrics.jsonl shows: losses, or rewards and lengths when it is reinforcement."""
    rows = stage.metrics()
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    validated = [k for k in keys if k.startswith("validation/") and len(_series(rows, k)) > 1]
    if stage.kind == "rl":
        asked = [k for k in keys if k.startswith("train/accuracy")]
        wanted = ["train/reward", *asked, "train/format", "validation/accuracy"]
        lengths = [k for k in keys if k.startswith("train/mean_gen_tokens_per_sample")]
        plans = [("reward and accuracy", "share", wanted), ("length of answers", "tokens", lengths[:1])]
    elif stage.kind == "distill":
        terms = [k for k in ("train/kl", "train/cosine", "train/lm") if k in keys]
        terms = ["train/loss", *terms] if len(terms) > 1 else terms
        plans = [("loss terms in training", "loss", terms), ("held-out loss", "nats a token", validated)]
    else:
        by_source = [k for k in validated if k != "validation/loss"]
        plans = [
            ("loss", "nats a token", ["train/loss", "validation/loss"]),
            ("held-out loss by source", "nats a token", by_source),
        ]
    drawn = [_curves(f"{stage.name}: {what}", unit, rows, wanted) for what, unit, wanted in plans]
    return [figure for figure in drawn if figure]


def block_maps(pipeline: Pipeline) -> Figure | None:
    """The parent beside the child, or None when nothing was compressed."""
    stage = pipeline.first("compress")
    parent = pipeline.stage_at(str(stage.config.get("parent", ""))) if stage else None
    archs = {"parent": parent.arch() if parent else None, "child": stage.arch() if stage else None}
    there = {name: arch for name, arch in archs.items() if arch}
    if not stage or not there:
        return None
    caption = (
        "Parent and child, a row a layer: attention (blue) by KV heads, feed-forward (orange) by channels, "
        "linear (grey), nothing (empty). A dot marks a layer that was changed."
    )
    title = "Block map of parent and child; the table below says the same"
    return Figure(caption, plots.block_map(there, title=title))


def quality_figures(found: Sequence[Model]) -> list[Figure]:
    """Loss against size and speed, and pass@1 with thinking on and off."""
    figures = []
    for key, label in (("num_params", "parameters"), ("decode_tokens_per_second", "decoded tokens/s")):
        points: dict[str, plots.Point] = {}
        for model in found:
            cost = {**model.row, **(model.row.get("latency") or {})}.get(key)
            loss = model.heldout.get("loss")
            if is_number(cost) and is_number(loss):
                points[model.name] = (cost, loss)
        if points:
            caption = f"held-out loss against {label}"
            svg = plots.tradeoff(points, title=caption, xlabel=label, ylabel="held-out loss, nats a token")
            figures.append(Figure(caption, svg))
    for family in dict.fromkeys(f for m in found for f in m.passed()):
        bars = {m.name: m.passed()[family] for m in found if family in m.passed()}
        named = {m: {f"thinking {mode}": v for mode, v in modes.items()} for m, modes in bars.items()}
        if family != "all" or len(found[-1].passed()) > 2:
            caption = f"pass@1, {'all families' if family == 'all' else family}"
            svg = plots.grouped_bars(named, title=caption, ylabel="pass@1", top=1.0)
            figures.append(Figure(f"{caption}, with 95% intervals", svg))
    return figures


def conversations(pipeline: Pipeline, found: Sequence[Model], prompts: int) -> dict[str, list[Sample]]:
    """{"FAMILY, thinking on": samples}; every model answers the same prompts, in the table's order."""
    evaluate = pipeline.first("evaluate")
    order = {model.name: n for n, model in enumerate(found)}
    rows = evaluate.records(CONVERSATIONS) if evaluate else []
    rows.sort(key=lambda row: (str(row.get("family")), not row.get("thinking")))
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        mode = "on" if row.get("thinking") else "off"
        group = groups.setdefault(f"{row.get('family')}, thinking {mode}", {})
        group.setdefault(str(row.get("prompt", "")), []).append(row)
    out = {}
    for name, by_prompt in groups.items():
        out[name] = [
            Sample(
                prompt,
                str(asked[0].get("reference", "")),
                [_answer(r) for r in sorted(asked, key=lambda r: order.get(str(r.get("model")), len(order)))],
            )
            for prompt, asked in list(by_prompt.items())[:prompts]
        ]
    return out


def versions(pipeline: Pipeline) -> Table:
    """The versions that the stages ran with; more than one where they differ."""
    seen: dict[str, list[str]] = {}
    for stage in pipeline.stages:
        for package, version in stage.versions.items():
            if version not in seen.setdefault(package, []):
                seen[package].append(str(version))
    return Table("Versions", ("package", "version"), [(p, ", ".join(v)) for p, v in seen.items()])


def _answer(row: Mapping[str, Any]) -> Answer:
    thinking, answer = split_thinking(str(row.get("text", "")))
    accuracy = row.get("accuracy")
    verdict = "not graded" if not is_number(accuracy) else ("right" if accuracy >= 1 else "wrong")
    return Answer(str(row.get("model", "")), thinking or "", answer, verdict)


def _curves(title: str, unit: str, rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Figure | None:
    series = {key: points for key in wanted if (points := _series(rows, key))}
    if not series:
        return None
    named = {key.replace("train/", "training "): points for key, points in series.items()}
    named = {key.replace("validation/", "held-out "): points for key, points in named.items()}
    return Figure(title, plots.curves(named, title=title, ylabel=unit))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key)) and is_number(row.get("step"))]


def _drawn(figure: Figure | None) -> list[Figure]:
    return [figure] if figure else []
