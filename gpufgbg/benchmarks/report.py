"""A file of results as a page in Markdown: what was measured, who was faster, how far from the machine's limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpufgbg.benchmarks import plots
from gpufgbg.benchmarks.results import Results, Row, by_work
from gpufgbg.benchmarks.runner import SUITES, per_second, percent, times
from gpufgbg.files import storage_errors, write_atomic

__all__ = [
    "TITLES",
    "Duel",
    "absent_table",
    "duels",
    "kernels_table",
    "report",
    "suite_table",
    "summary_table",
    "verdict",
    "write",
]

TITLES = {
    "limits": "Limits of the machine",
    "render": "Rendering: composites and masks in memory",
    "encode": "Encoding: JPEG files in memory",
    "moments": "Mean and standard deviation of pictures in memory",
    "depth": "Depth maps",
    "pipeline": "Whole data sets, to disk",
    "stream": "Batches for a training loop",
    "stats": "Mean and standard deviation of files",
}


class Duel:
    """A rival against the best of ours at the same work on the same kind of device.

    Attributes
    ----------
    ours, rival : Row
    """

    def __init__(self, ours: Row, rival: Row) -> None:
        self.ours = ours
        self.rival = rival

    @property
    def ratio(self) -> float:
        """Our rate over the rival's."""
        return self.ours.rate / self.rival.rate

    @property
    def noise(self) -> float:
        """The spread of both rows' rounds."""
        return self.ours.noise + self.rival.noise

    @property
    def verdict(self) -> str:
        """``ours``, ``rival`` or ``even``, within the noise."""
        if self.ratio > 1 + self.noise:
            return "ours"
        return "rival" if self.ratio < 1 / (1 + self.noise) else "even"


def duels(results: Results) -> list[Duel]:
    """Every rival that was measured beside us, each against the best of ours with as many threads at most.

    A rival's row of one thread is set against ours of one thread; any other against the best that we have there.
    """
    found = []
    for suite in SUITES[1:]:
        for rows in by_work(results.of_suite(suite)).values():
            for rival in rows:
                own = [row for row in rows if row.ours and row.measured and row.device == rival.device]
                if rival.ours or not rival.measured or not own:
                    continue
                alike = [row for row in own if _alone(row) == _alone(rival)] or own
                found.append(Duel(max(alike, key=lambda row: row.rate), rival))
    return found


def _alone(row: Row) -> bool:
    return row.name.endswith((", 1 thread", ", 1 process"))


def write(results: Results, folder: Path, stem: str, heading: str = "gpufgbg bench") -> tuple[Path, str]:
    """Write ``<stem>.md`` and its pictures, ``<stem>_<plot>.png``.

    Returns
    -------
    page : Path
    left_out : str
        Why there are no pictures; empty where there are.
    """
    names, left_out = [], ""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            names = plots.draw(results, folder, stem)
        except ImportError as error:
            left_out = f"matplotlib can't be imported ({error}): pip install 'gpufgbg[bench]'"
        page = folder / f"{stem}.md"
        write_atomic(page, report(results, names, heading).encode())
    return page, left_out


def report(results: Results, pictures: Sequence[str] = (), heading: str = "gpufgbg bench") -> str:
    """The whole page.

    Parameters
    ----------
    results : Results
    pictures : sequence of str
        File names of pictures beside the page, as `plots.draw` gives them.
    heading : str
    """
    parts = [f"# {heading}", _machine(results), *_runs(results), "## At a glance", summary_table(results)]
    parts += [f"![{_title(name)}]({name})" for name in pictures]
    parts += ["## Where a rival is faster", _losses(results)]
    for suite in SUITES:
        rows = results.of_suite(suite)
        if any(row.status != "absent" for row in rows):
            parts += [f"## {TITLES[suite]}", suite_table(results, rows)]
            if suite == "limits":
                parts.append(
                    "Shares below are of these: of the one that binds first, by what the work can't do without."
                )
    curves = [row for suite in SUITES for row in results.of_suite(suite, curve=True) if row.measured]
    if curves:
        parts += ["## Cost against size", _curve_table(results, curves)]
    if results.profile:
        parts += ["## Our kernels under the profiler", kernels_table(results)]
    failed = [row for row in results.rows.values() if row.status == "failed"]
    if failed:
        lines = [f"- {row.work}: {row.name} ({row.device}): {row.reason}" for row in failed]
        parts += ["## Failed", "\n".join(lines)]
    parts += ["## Absent", absent_table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(name: str) -> str:
    return name.rpartition(".")[0].rpartition("_")[2].replace("-", " ")


def _machine(results: Results) -> str:
    m = results.machine
    parts = [f"{m['cpu']}, {m['cores']} cores"]
    if m.get("memory_gb"):
        parts.append(f"{m['memory_gb']} GB")
    parts.append(m["system"])
    if m.get("gpu"):
        gpu = f"{m['gpu']} ({m['gpu_memory_gb']} GB, {m['gpu_multiprocessors']} multiprocessors, "
        driver = f", driver {m['gpu_driver']}" if m.get("gpu_driver") else ""
        parts.append(f"{gpu}{m['gpu_l2_mb']} MB L2{driver})")
    else:
        parts.append("no GPU")
    return "; ".join(parts) + "."


def _used(results: Results) -> list[int]:
    """The runs that rows are left of, in order: the report numbers them from 1."""
    return sorted({row.run for row in results.rows.values()} | {entry["run"] for entry in results.profile})


def _runs(results: Results) -> list[str]:
    """A line a run."""
    lines = []
    for number, run in enumerate(_used(results), start=1):
        known = results.runs[run]
        suites = [
            s for s in SUITES if any(r.run == run and r.suite == s and r.measured for r in results.rows.values())
        ]
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        commit = f" at {known['commit']}" if known.get("commit") else ""
        lines.append(
            f"{number}. {known['date']}: `{known['command']}` ({known['scale']}, pictures: {known['input']}), "
            f"gpufgbg {known['gpufgbg']}{commit}, Python {known['python']}: {', '.join(suites)}. {versions}."
        )
    return ["\n".join(lines)] if lines else []


def summary_table(results: Results) -> str:
    """The best of ours for each work on each kind of device, its best rival there, and its share of the limit."""
    lines = ["| work | device | gpufgbg | best rival | times as fast | of the limit |", "|---|---|---|---|---|---|"]
    for suite in SUITES[1:]:
        for work, rows in by_work(results.of_suite(suite)).items():
            for device in ("cuda", "cpu"):
                here = [row for row in rows if row.measured and row.device == device]
                own = [row for row in here if row.ours]
                if not own:
                    continue
                best = max(own, key=lambda row: row.rate)
                rivals = [row for row in here if not row.ours]
                # On a card, what people have without one is a rival too.
                if device == "cuda" and not rivals:
                    rivals = [row for row in rows if row.measured and not row.ours]
                rival, ratio = "none here", ""
                if rivals:
                    top = max(rivals, key=lambda row: row.rate)
                    where = " (cpu)" if top.device != device else ""
                    duel = Duel(best, top)
                    rival, ratio = f"{top.name}{where}: {_rate(top)}", times(duel.ratio)
                    if duel.verdict != "ours":
                        ratio = f"**{ratio}**" if duel.verdict == "rival" else f"{ratio} (even)"
                lines.append(f"| {work} | {device} | {_rate(best)} | {rival} | {ratio} | {_share(results, best)} |")
    return "\n".join(lines)


def _rate(row: Row) -> str:
    return per_second(row.rate, row.unit)


def _share(results: Results, row: Row) -> str:
    share = results.share(row)
    return "" if share is None else f"{percent(share[0])} of {share[1]}"


def verdict(results: Results) -> str:
    """A sentence: how often rivals are faster, said whether they are or not."""
    counts = Counter(duel.verdict for duel in duels(results))
    if not counts:
        return "No rival was measured beside us."
    return (
        f"Of {sum(counts.values())} comparisons on the same kind of device, rivals are faster in {counts['rival']}, "
        f"and {counts['even']} are even within the noise."
    )


def _losses(results: Results) -> str:
    lines = []
    for duel in sorted((duel for duel in duels(results) if duel.verdict == "rival"), key=lambda d: d.ratio):
        note = f"; {duel.rival.note}" if duel.rival.note else ""
        note += "; the two were measured in different runs" if duel.rival.run != duel.ours.run else ""
        lines.append(
            f"- {duel.rival.work}, {duel.rival.device}: **{duel.rival.name}** makes {_rate(duel.rival)}, "
            f"{duel.ours.name} {_rate(duel.ours)}: the rival is {1 / duel.ratio:.2f} times as fast "
            f"(noise {100 * duel.noise:.0f} %). Its output: {duel.rival.check}{note}."
        )
    return "\n\n".join([verdict(results), *(["\n".join(lines)] if lines else [])])


def suite_table(results: Results, rows: Iterable[Row]) -> str:
    """A suite's measured rows, work by work, the fastest first."""
    parts = []
    for work, same in by_work(rows).items():
        found = sorted((row for row in same if row.measured), key=lambda row: (row.device != "cuda", -row.rate))
        if not found:
            continue
        if found[0].suite == "limits":
            parts += [f"| {work} | {_rate(row)} | {100 * row.noise:.0f} % | {row.check} |" for row in found]
            continue
        runs = _used(results)
        lines = [f"**{work}**", "", "| who | device | rate | a call | noise | of the limit | output, notes |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in found:
            who = f"**{row.name}**" if row.ours else row.name
            run = f"run {runs.index(row.run) + 1}" if len(runs) > 1 else ""
            notes = "; ".join(part for part in (row.check, row.note, row.clock, run) if part)
            call = f"{row.count:,.0f} in {_duration(row.median)}"
            share = _share(results, row)
            lines.append(
                f"| {who} | {row.device} | {_rate(row)} | {call} | {100 * row.noise:.0f} % | {share} | {notes} |"
            )
        parts.append("\n".join(lines))
    if parts and parts[0].startswith("| "):
        return "\n".join(["| limit | rate | noise | |", "|---|---|---|---|", *parts])
    return "\n\n".join(parts)


def _duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _curve_table(results: Results, rows: Iterable[Row]) -> str:
    lines = ["| work | who | device | a call | rate |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.work} | {row.name} | {row.device} | {_duration(row.median)} | {_rate(row)} |")
    return "\n".join(lines)


def kernels_table(results: Results) -> str:
    """Our kernels: time, shares, what bounds each."""
    columns = ("kernel", "blocks", "time", "device memory", "of its bandwidth", "of instruction issue",
               "shared memory", "L2", "bound by")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in results.profile:
        time_s, moved = entry.get("nanoseconds"), entry.get("dram_bytes")
        took = _duration(time_s / 1e9) if time_s else "?"
        rate = per_second(moved / time_s * 1e9, "B") if time_s and moved else "?"
        shares = (_percent(entry, f"{name}_percent") for name in ("dram", "issue", "shared", "l2"))
        grid = entry["grid"].strip("()").replace(", ", "x")
        lines.append(f"| {entry['kernel']} | {grid} | {took} | {rate} | {' | '.join(shares)} | {entry['bound_by']} |")
    return "\n".join(lines)


def _percent(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    return "not counted" if value is None else f"{value:.0f} %"


def absent_table(results: Results) -> str:
    """Who was not there, and why; works that one contender lacks for one reason share a line."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows.values():
        if row.status == "absent":
            name = row.work if row.suite == "limits" else row.name
            suites = reasons.setdefault((name, row.device, row.reason), [])
            if row.suite not in suites:
                suites.append(row.suite)
    if not reasons:
        return "Nobody."
    lines = ["| who | device | in | why |", "|---|---|---|---|"]
    for (name, device, reason), suites in reasons.items():
        lines.append(f"| {name} | {device} | {', '.join(suites)} | {reason} |")
    return "\n".join(lines)
