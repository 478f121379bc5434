"""Pictures of results: bars against rivals, shares of limits, a roofline of our kernels, cost against size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpufgbg.benchmarks.duels import against
from gpufgbg.benchmarks.results import Results, Row, by_work
from gpufgbg.benchmarks.runner import SUITES, per_second, percent, times

__all__ = ["PLOTS", "draw"]

_OURS, _RIVAL, _GREY = "#d1495b", "#7a8fa6", "#5a5a5a"
_DEVICES = {"cuda": "card", "cpu": "CPU"}


def draw(results: Results, folder: Path, stem: str) -> list[str]:
    """Draw all plots that the results have rows for; returns the names of the files, ``<stem>_<plot>.png``.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for name, plot in PLOTS.items():
        figure = plot(results, pyplot)
        if figure is not None:
            figure.savefig(folder / f"{stem}_{name}.png", dpi=110)
            pyplot.close(figure)
            names.append(f"{stem}_{name}.png")
    return names


def rivals(results: Results, pyplot: Any) -> Any:
    """A panel a work: everybody's rate, on a logarithmic axis, and how often ours on the same device is that."""
    panels = []
    for suite in SUITES[1:]:
        for work, rows in by_work(results.of_suite(suite)).items():
            found = sorted((row for row in rows if row.measured), key=lambda row: row.rate)
            if found:
                panels.append((work, found))
    if not panels:
        return None
    columns = 2 if len(panels) > 1 else 1
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(found) for _, found in line) + 2.2 for line in lines]
    figure, axes = pyplot.subplots(
        len(lines), columns, figsize=(7.2 * columns, 0.27 * sum(heights) + 0.4), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for at, (axis, (work, found)) in enumerate(zip(axes.flat, panels, strict=False)):
        _bars(axis, work, found, max(len(rows) for _, rows in lines[at // columns]))
    figure.tight_layout()
    return figure


def _bars(axis: Any, work: str, rows: list[Row], slots: int) -> None:
    rates = [row.rate for row in rows]
    labels = [f"{row.name} ({_DEVICES[row.device]})" for row in rows]
    colours = [_OURS if row.ours else _RIVAL for row in rows]
    bars = axis.barh(range(len(rows)), rates, color=colours, height=0.72)
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.ours else "normal")
    axis.set_xscale("log")
    span = max(rates) / min(rates)
    axis.set_xlim(min(rates) / max(4.0, span**0.25), max(rates) * max(8.0, span**0.6))
    axis.set_ylim(len(rows) - slots - 0.6, len(rows) - 0.4)
    for at, row in enumerate(rows):
        duel = None if row.ours else against(row, [other for other in rows if other.device == row.device])
        said = "" if duel is None else f"   gpufgbg: {times(duel.ratio)} x"
        if row.aside:
            said = "   set aside"
            bars[at].set(alpha=0.4, hatch="//")
        axis.text(row.rate * 1.15, at, per_second(row.rate) + said, va="center", fontsize=8, color=_GREY)
    axis.set_title(f"{work}\n{rows[0].unit} a second (longer is better)", fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    axis.xaxis.set_minor_formatter("")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def limits(results: Results, pyplot: Any) -> Any:
    """Our rows as shares of the limit that binds each first."""
    found = []
    for suite in SUITES[1:]:
        for rows in by_work(results.of_suite(suite)).values():
            for device in _DEVICES:
                own = [row for row in rows if row.ours and row.measured and row.device == device and not row.aside]
                best = max(own, key=lambda row: row.rate, default=None)
                if best is not None and (share := results.share(best)) is not None:
                    found.append((best, *share))
    if not found:
        return None
    found.reverse()
    figure, axis = pyplot.subplots(figsize=(11, 0.36 * len(found) + 1.1))
    bars = axis.barh(range(len(found)), [min(100 * reached, 110) for _, reached, _ in found], color=_OURS, height=0.7)
    axis.set_yticks(range(len(found)), [f"{row.work} ({_DEVICES[row.device]})" for row, _, _ in found], fontsize=8)
    axis.axvline(100, color=_GREY, linewidth=1)
    for at, (_, reached, name) in enumerate(found):
        over = " (over: measured too low?)" if reached > 1 else ""
        bars[at].set_hatch("//" if over else "")
        axis.text(113, at, f"{percent(reached)} of {name}{over}", va="center", fontsize=8, color=_GREY)
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))
    axis.set_title("gpufgbg: share of the machine's limit, in per cent", fontsize=9, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def roofline(results: Results, pyplot: Any) -> Any:
    """Our kernels under the profiler: instructions a byte against instructions a second, below both roofs."""
    points = []
    for entry in results.profile:
        time_ns, moved, made = (entry.get(name) for name in ("nanoseconds", "dram_bytes", "instructions"))
        if time_ns and moved and made:
            points.append((entry["kernel"], made / moved, made / time_ns, time_ns, entry))
    if not points:
        return None
    # Roofs, by the profiler's own shares: of the kernels that come nearest to them.
    issue = [(p[4]["issue_percent"], p[2]) for p in points if p[4].get("issue_percent")]
    memory = [(p[4]["dram_percent"], p[4]["dram_bytes"] / p[3]) for p in points if p[4].get("dram_percent")]
    if not issue or not memory:
        return None
    peak = max(issue)[1] / max(issue)[0] * 100
    bandwidth = max(memory)[1] / max(memory)[0] * 100  # bytes a nanosecond
    figure, axis = pyplot.subplots(figsize=(11, 6))
    lowest, highest = min(p[1] for p in points) / 2, max(*(p[1] for p in points), peak / bandwidth) * 3
    xs = [lowest, peak / bandwidth, highest]
    axis.plot(xs, [bandwidth * lowest, peak, peak], color=_GREY, linewidth=1.5)
    memory_roof = f"device memory, {bandwidth / 1e3:.2f} TB/s"
    axis.text(lowest * 1.2, bandwidth * lowest, memory_roof, fontsize=8, va="center")
    axis.text(highest, peak * 1.08, f"instruction issue, {peak:,.0f} G/s", fontsize=8, ha="right")
    axis.set_ylim(min([bandwidth * lowest, *(p[2] for p in points)]) / 1.5, peak * 2.5)
    axis.set(xscale="log", yscale="log", xlim=(lowest / 1.3, highest * 1.3))
    figure.subplots_adjust(left=0.07, right=0.8, top=0.93, bottom=0.1)
    labels = _Labels(figure, axis, [(p[1], p[2]) for p in points])
    numbers: dict[str, int] = {}
    for kernel, x, y, time_ns, _ in sorted(points, key=lambda p: -p[3]):
        axis.scatter(
            x, y, s=12 + 60 * (time_ns / max(p[3] for p in points)) ** 0.5, color=_OURS, alpha=0.75, linewidths=0
        )
        if kernel not in numbers:
            numbers[kernel] = len(numbers) + 1
            labels.put(str(numbers[kernel]), x, y)
    names = "\n".join(f"{number:>2} {kernel}" for kernel, number in numbers.items())
    axis.text(1.02, 1, names, transform=axis.transAxes, fontsize=7, va="top", family="monospace", linespacing=1.4)
    axis.set(xlabel="warp instructions a byte of device memory", ylabel="warp instructions, G a second")
    title = (
        "Our kernels below the card's roofs (larger dots take longer; of several launches the longest has the number)"
    )
    axis.set_title(title, fontsize=9, loc="left")
    axis.grid(alpha=0.2, which="both")
    return figure


class _Labels:
    """Puts short labels beside points of a finished axis, where neither points nor other labels are."""

    _WIDTH, _HEIGHT = 13.0, 10.0  # of a label, in points

    def __init__(self, figure: Any, axis: Any, points: list[tuple[float, float]]) -> None:
        self._axis = axis
        self._unit = figure.dpi / 72  # pixels
        self._taken = [(*self._at(*point), 5.0, 5.0) for point in points]

    def _at(self, x: float, y: float) -> tuple[float, float]:
        across, up = self._axis.transData.transform((x, y)) / self._unit
        return float(across), float(up)

    def put(self, text: str, x: float, y: float) -> None:
        """The nearest free place, joined to its point by a line where that is not beside it."""
        across, up = self._at(x, y)
        for distance in (9, 14, 20, 27, 35, 44, 54, 65):
            for turn in range(16):
                dx, dy = distance * math.cos(turn * math.pi / 8 + 0.4), distance * math.sin(turn * math.pi / 8 + 0.4)
                box = (across + dx, up + dy, self._WIDTH, self._HEIGHT)
                if not any(self._overlap(box, other) for other in self._taken):
                    self._taken.append(box)
                    line = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
                    self._axis.annotate(
                        text, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=7, ha="center",
                        va="center", arrowprops=line if distance > 9 else None,
                    )  # fmt: skip
                    return

    @staticmethod
    def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(abs(one[i] - other[i]) < (one[i + 2] + other[i + 2]) / 2 for i in (0, 1))


def cost(results: Results, pyplot: Any) -> Any:
    """A panel a suite: seconds a call against its size."""
    curves: dict[str, dict[str, list[Row]]] = {}
    for suite in SUITES[1:]:
        for row in results.of_suite(suite, curve=True):
            if row.measured:
                name = f"{row.name} ({_DEVICES[row.device]})"
                curves.setdefault(suite, {}).setdefault(name, []).append(row)
    # The usual size is a point of the curve as well.
    for suite, found in curves.items():
        for rows in found.values():
            first = rows[0]
            same = [row for row in results.of_suite(suite) if (row.name, row.device) == (first.name, first.device)]
            rows += [row for row in same if row.measured and first.work.startswith(row.work)]
    if not curves:
        return None
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.4 * len(curves), 3.8), squeeze=False)
    for axis, (suite, found) in zip(axes.flat, curves.items(), strict=True):
        unit = ""
        for (name, rows), marker in zip(found.items(), "osD^v", strict=False):
            ordered = sorted(rows, key=lambda row: row.count)
            axis.plot([r.count for r in ordered], [r.median for r in ordered], f"{marker}-", label=name, markersize=4)
            unit = ordered[0].unit
        axis.set(xscale="log", yscale="log", xlabel=f"{unit} a call", ylabel="seconds a call")
        for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            side.set_major_locator(_ticks(high / low))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axis.set_title(suite, fontsize=9, loc="left")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _ticks(span: float) -> Any:
    """Few labels on an axis, but more than one."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0,) if span > 80 else (1.0, 2.0, 5.0), numticks=9)


#: name -> what draws it, or None where the results have no rows for it
PLOTS: dict[str, Callable[[Results, Any], Any]] = {
    "rivals": rivals,
    "limits": limits,
    "roofline": roofline,
    "cost-against-size": cost,
}
