"""Every figure, drawn once: functions from plain numbers or architectures to SVG text.

The SVG is meant to stand inside a page: text stays text, the background is transparent, and whatever is not
data has the colour of the text around it, so that one drawing fits a light and a dark page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemojax.arch import ArchSpec, Attention, AttnSpec, FfnSpec, Linear, SwiGLU, describe

# Okabe and Ito's colours for every kind of eyes, without those that vanish on white or on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ATTENTION, FEED_FORWARD, LINEAR = "#0072b2", "#d55e00", "#8a8a8a"
_INK = "#010203"  # stands for the page's text colour, see `_svg`
_WIDTH = 5.2  # inches; drawings are scaled to the page

Point = tuple[float, float]


def curves(
    series: Mapping[str, Sequence[Point]], *, title: str, ylabel: str, xlabel: str = "step", log: bool = False
) -> str:
    """Lines of (x, y) by name. A series of one point, as a loss measured once, is a dot. log: y axis."""
    figure, axes = _figure(2.7)
    for n, (name, points) in enumerate(series.items()):
        kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        xs, ys = [x for x, _ in kept], [y for _, y in kept]
        marker = "o" if len(kept) < 12 else None
        axes.plot(xs, ys, label=_plain(name), color=COLOURS[n % len(COLOURS)], marker=marker, ms=4, lw=1.6)
    if log:
        axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(_plain(xlabel))
    axes.set_ylabel(_plain(ylabel))
    if len(series) > 1:
        _legend(figure)
    return _svg(figure, title)


def block_map(archs: Mapping[str, ArchSpec], *, title: str) -> str:
    """Architectures side by side: a row a layer, an attention and a feed-forward cell in it.

    A cell is as wide as its share of the widest of its kind in any of them (KV heads, channels); what is
    missing is an empty frame, and a layer that differs from the first architecture's has a dot.
    """
    layers = max((arch.num_layers for arch in archs.values()), default=0)
    height = max(1.2, min(0.24, 24 / max(layers, 1)) * layers + 0.9)
    figure, axes = _figure(height)
    blocks = [block for arch in archs.values() for block in arch.blocks]
    heads = max((b.attn.num_kv_heads for b in blocks if isinstance(b.attn, Attention)), default=1)
    width = max((b.ffn.width for b in blocks if isinstance(b.ffn, SwiGLU)), default=1)
    first = next(iter(archs.values()), None)
    for column, (name, arch) in enumerate(archs.items()):
        left = 2.5 * column
        axes.text(left + 1.05, -1.0, _plain(name), ha="center", va="center", color=_INK, weight="bold")
        for layer, block in enumerate(arch.blocks):
            _cell(axes, left, layer, 0.8, _share(block.attn, heads), block.attn, layers)
            _cell(axes, left + 0.9, layer, 1.2, _share(block.ffn, width), block.ffn, layers)
            if first and layer < first.num_layers and block != first.blocks[layer]:
                axes.plot(left - 0.12, layer, "o", color=_INK, ms=3)
    every = max(1, round(layers / 40))
    axes.set_yticks(range(0, layers, every))
    axes.set_ylim(layers - 0.4, -1.6)
    axes.set_xlim(-0.25, 2.5 * len(archs) - 0.35)
    axes.set_ylabel("layer")
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return _svg(figure, title)


def tradeoff(points: Mapping[str, Point], *, title: str, xlabel: str, ylabel: str) -> str:
    """A labelled dot for each name at (x, y)."""
    figure, axes = _figure(2.9)
    kept = {n: (x, y) for n, (x, y) in points.items() if math.isfinite(x) and math.isfinite(y)}
    places = _label_places(list(kept.values()))
    for n, (name, place) in enumerate(zip(kept, places, strict=True)):
        x, y = kept[name]
        axes.plot(x, y, "o", color=COLOURS[n % len(COLOURS)], ms=7)
        left, down = place
        axes.annotate(
            _plain(name), (x, y), xytext=(-7 if left else 7, -2 - 10 * down), textcoords="offset points",
            color=_INK, fontsize=9, ha="right" if left else "left",
        )  # fmt: skip
    axes.margins(0.12, 0.2)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(_plain(xlabel))
    axes.set_ylabel(_plain(ylabel))
    return _svg(figure, title)


def heat_map(
    matrix: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    scale: str = "",
    top: float | None = None,
) -> str:
    """A square matrix, the darker the larger; a cell that is not a number stays empty.

    labels: of both axes. scale: what the numbers are. top: the darkest number; None takes the largest.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    figure, axes = _figure(0.85 * _WIDTH)
    # from nothing to full, not from white: the page behind may be dark
    shades = LinearSegmentedColormap.from_list("shades", [(*to_rgb(ATTENTION), a) for a in (0.04, 1.0)], N=32)
    known = [value for row in matrix for value in row if math.isfinite(value)]
    most = top if top is not None else max(known, default=0.0)
    cells = [[value if math.isfinite(value) else math.nan for value in row] for row in matrix]
    if cells:
        drawn = axes.pcolormesh(cells, cmap=shades, vmin=0.0, vmax=most or 1.0)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
        bar.set_label(_plain(scale), color=_INK)
        bar.ax.tick_params(colors=_INK, labelsize=8)
        bar.outline.set_visible(False)
    every = max(1, -(-len(labels) // 30))
    ticks = [n + 0.5 for n in range(0, len(labels), every)]
    shown = [_plain(label) for label in labels[::every]]
    axes.set_xticks(ticks, shown)
    axes.set_yticks(ticks, shown)
    axes.set_xlim(0, max(len(labels), 1))
    axes.set_ylim(max(len(labels), 1), 0)
    axes.set_aspect("equal")
    axes.grid(False)
    axes.set_xlabel(_plain(xlabel))
    axes.set_ylabel(_plain(ylabel))
    return _svg(figure, title)


def grouped_bars(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    title: str,
    ylabel: str,
    top: float | None = None,
) -> str:
    """Bars with intervals: {group: {bar: (value, low, high)}}; bars of one name share a colour.

    top: the end of the y axis, the same in figures to be compared; None takes what is needed.
    """
    figure, axes = _figure(2.9)
    names = list(dict.fromkeys(name for bars in values.values() for name in bars))
    size = 0.8 / max(len(names), 1)
    for n, name in enumerate(names):
        spots = [(g, bars[name]) for g, bars in enumerate(values.values()) if name in bars]
        xs = [g + (n - (len(names) - 1) / 2) * size for g, _ in spots]
        ys = [v for _, (v, _, _) in spots]
        errors = [[max(0.0, v - lo) for _, (v, lo, _) in spots], [max(0.0, h - v) for _, (v, _, h) in spots]]
        axes.bar(
            xs, ys, 0.9 * size, yerr=errors, label=_plain(name), color=COLOURS[n % len(COLOURS)], ecolor=_INK,
            capsize=2, error_kw={"lw": 1},
        )  # fmt: skip
    axes.set_xticks(range(len(values)), [_plain(group) for group in values])
    axes.tick_params(axis="x", labelrotation=20 if len(values) > 5 else 0)
    axes.set_ylabel(_plain(ylabel))
    axes.set_ylim(0, top)
    if len(names) > 1:
        _legend(figure)
    return _svg(figure, title)


def _label_places(points: Sequence[Point]) -> list[tuple[bool, int]]:
    """For each dot, whether its label stands left of it, and how many lines it moves down for the others."""
    low = [min((p[i] for p in points), default=0.0) for i in (0, 1)]
    span = [max((p[i] for p in points), default=0.0) - low[i] or 1.0 for i in (0, 1)]
    at = [((x - low[0]) / span[0], (y - low[1]) / span[1]) for x, y in points]
    line = 0.09  # a line of text as a share of the axis
    places, taken = {}, []
    for n in sorted(range(len(at)), key=lambda n: -at[n][1]):
        x, y = at[n]
        left, down = x > 0.6, 0
        while any(left == s and abs(x - u) < 0.35 and abs(y - down * line - v) < line for s, u, v in taken):
            down += 1
        taken.append((left, x, y - down * line))
        places[n] = (left, down)
    return [places[n] for n in range(len(at))]


def _legend(figure: Any) -> None:
    """Above the axes, where it hides nothing."""
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=_INK, fontsize=9)


def _share(sub: AttnSpec | FfnSpec, most: int) -> float:
    """Width of a cell relative to the widest of its kind; a linear layer has no such width."""
    match sub:
        case Attention(num_kv_heads=size) | SwiGLU(width=size):
            return size / most
        case Linear():
            return 0.4
        case _:
            return 0.0


def _cell(
    axes: Any, left: float, layer: int, room: float, share: float, sub: AttnSpec | FfnSpec, layers: int
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, layer - 0.4), room, 0.8, fill=False, ec=_INK, lw=0.4, alpha=0.4))
    colour = {Attention: ATTENTION, SwiGLU: FEED_FORWARD, Linear: LINEAR}.get(type(sub))
    if colour:
        axes.add_patch(Rectangle((left, layer - 0.4), room * share, 0.8, fc=colour, ec="none", alpha=0.45))
    if layers <= 100:
        axes.text(left + 0.04, layer, describe(sub), va="center", ha="left", color=_INK, fontsize=7)


def _figure(height: float) -> tuple[Any, Any]:
    """A figure of the page's width and its axes, outside of pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
    axes.grid(True, color=_INK, alpha=0.12, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """One <svg> element without prolog, metadata or fixed size; `title` is what a screen reader says."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemojax"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"^<svg[^>]*>", "", text)
    # several drawings in one page must not share an id
    prefix = f"f{hashlib.sha256((title + text).encode()).hexdigest()[:8]}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", text)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)  # whatever the reader's machine has
    text = text.replace("*{", "svg *{")  # the rest of the page is not the drawing's business
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg role="img" aria-label="{label}" {box[0] if box else ""}>{text.strip()}'


def standalone(svg: str) -> str:
    """A drawing as a file of its own: with the namespace that a page does not need."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _plain(text: str) -> str:
    """matplotlib would read dollars as mathematics, and hide a legend entry that starts with `_`."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shares(
    rows: Sequence[Sequence[float]],
    columns: Sequence[str],
    labels: Sequence[str],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> str:
    """A table of shares (0 to 1) in percent, the cells the darker the larger; the first row is on top."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    figure, axes = _figure(max(1.4, 0.3 * len(rows) + 0.9))
    shades = LinearSegmentedColormap.from_list("shades", [(*to_rgb(ATTENTION), a) for a in (0.04, 0.8)], N=32)
    axes.pcolormesh(rows, cmap=shades, vmin=0.0, vmax=1.0)
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            axes.text(
                x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=_INK, fontsize=8
            )
    axes.set_xticks([n + 0.5 for n in range(len(columns))], [_plain(name) for name in columns])
    axes.set_yticks([n + 0.5 for n in range(len(labels))], [_plain(name) for name in labels])
    axes.set_ylim(len(rows), 0)
    axes.grid(False)
    axes.set_xlabel(_plain(xlabel))
    axes.set_ylabel(_plain(ylabel))
    return _svg(figure, title)
