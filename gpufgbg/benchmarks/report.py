"""A file of results as a page in Markdown: what was measured, who was faster, how far from the machine's limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpufgbg.benchmarks import plots
from gpufgbg.benchmarks.duels import Duel, comparable, duels
from gpufgbg.benchmarks.profile import BATCH
from gpufgbg.benchmarks.results import WHOLE_JOBS, Results, Row, by_work
from gpufgbg.benchmarks.runner import SUITES, per_second, percent, times
from gpufgbg.files import storage_errors, write_atomic

__all__ = [
    "REASONS",
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


_ONE_LOCK = (
    "reading and counting held one interpreter's lock in the published run at 0c73e80; helper processes came since "
    "and have not been measured on its 16 cores"
)
_THREADS = (
    "the library and its rate a picture are the rival's too ({}), so what is left is how threads are handed their "
    "work: in the published run at 0c73e80, 8 pictures a task for ours, 16 for the rival's. Not confirmed; 32 since"
)
#: (work, device) -> why rivals are faster there, as far as is known
REASONS = {
    ("mean and std of a data set's files", "cpu"): _ONE_LOCK,
    ("mean and std of a data set's files", "cuda"): _ONE_LOCK,
    ("grey to JPEG, quality 65, 224x224", "cpu"): _THREADS.format(
        "113 to 118 us of the CPU each, on 2 cores of another machine"
    ),
    ("RGB 4:2:0 to JPEG, quality 65, 224x224", "cpu"): _THREADS.format("by the rows of 1 thread, within their noise"),
    ("data set to tree, composites and masks", "cpu"): (
        "of the published run's 3.7 s, some 1.9 are start (interpreter, Numba, checks, fsync), and some 50 us a "
        "sample are spent under one interpreter's lock, which Pillow's processes don't share"
    ),
}


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
        parts += ["## Our kernels under the profiler", _KERNELS_LEGEND, kernels_table(results)]
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


def _runs(results: Results) -> list[str]:
    """A line a run, numbered from 1, and what was remarked of it afterwards."""
    lines = []
    for number, run in enumerate(results.used_runs, start=1):
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
        lines += [f"   - {remark}" for remark in known.get("remarks", [])]
    return ["\n".join(lines)] if lines else []


def summary_table(results: Results) -> str:
    """The best of ours for each work on each kind of device, the best of all rivals, and its share of the limit.

    On a card, what people have without one is a rival too, and marked.
    """
    lines = ["| work | device | gpufgbg | best rival | times as fast | of the limit |", "|---|---|---|---|---|---|"]
    remarks: dict[str, None] = {}
    for suite in SUITES[1:]:
        for work, rows in by_work(results.of_suite(suite)).items():
            for device in ("cuda", "cpu"):
                cells = _summary(results, rows, device, remarks)
                if cells:
                    lines.append(f"| {work} | {device} | {' | '.join(cells)} |")
    return "\n\n".join(["\n".join(lines), *remarks])


def _summary(results: Results, rows: list[Row], device: str, remarks: dict[str, None]) -> list[str]:
    """The summary's last four cells for a work on a device; none where nobody did it there."""
    here = [row for row in rows if row.device == device]
    own = [row for row in here if row.ours and row.measured]
    rivals = [row for row in rows if not row.ours and row.measured and row.device in (device, "cpu")]
    top = max((row for row in rivals if not row.aside), key=lambda row: row.rate, default=None)
    if not own:
        missing = next((row for row in here if row.ours), None)
        if missing is None or top is None or top.device != device:
            return []
        return [f"not measured in this run: {missing.reason}", f"{top.name}: {_rate(top)}", "", ""]
    fit = [row for row in own if not row.aside]
    best = max(fit or own, key=lambda row: row.rate)
    share = _share(results, best)
    if share.endswith(_OVER):
        remarks[_OVER_MEANS] = None
    size = f" of {best.count:,.0f}" if best.suite in WHOLE_JOBS else ""
    rate = f"{_rate(best)}{size}{_threads(best)}"
    if best.aside:
        return [rate, "" if top is None else _who(top, device), f"not compared: {best.aside}", ""]
    if top is None:
        return [rate, "none here", "", share]
    rival = _who(top, device)
    duels_with_top = [Duel(row, top) for row in fit if comparable(row, top)]
    if not duels_with_top:
        return [rate, rival, f"not compared: the rival made {top.count:,.0f}", share]
    duel = max(duels_with_top, key=lambda duel: duel.ratio)
    ratio = times(duel.ratio)
    if duel.verdict != "ours":
        ratio = f"**{ratio}**" if duel.verdict == "rival" else f"{ratio} (even)"
    if duel.ours is not best:
        ratio += f", with {_rate(duel.ours)} of {duel.ours.count:,.0f}"
    return [rate, rival, ratio, share]


def _who(rival: Row, device: str) -> str:
    return f"{rival.name}{' (cpu)' if rival.device != device else ''}: {_rate(rival)}"


def _threads(row: Row) -> str:
    """With how many threads, where rows tell them apart."""
    last = row.name.rpartition(", ")[2]
    return f", {last}" if last.endswith((" thread", " threads")) else ""


def _rate(row: Row) -> str:
    return per_second(row.rate, row.unit)


_OVER = " (over)"
_OVER_MEANS = "Over 100 %: the limit as measured was too low, or the work gets by with less than was counted."


def _share(results: Results, row: Row) -> str:
    share = results.share(row)
    return "" if share is None else f"{percent(share[0])} of {share[1]}{_OVER if share[0] > 1 else ''}"


def verdict(results: Results) -> str:
    """A sentence: how often rivals are faster, said whether they are or not."""
    counts = Counter(duel.verdict for duel in duels(results))
    if not counts:
        return "No rival was measured beside us."
    said = (
        f"Of {sum(counts.values())} comparisons on the same kind of device, rivals are faster in {counts['rival']}, "
        f"and {counts['even']} are even within the noise."
    )
    aside = [row for row in results.rows.values() if row.measured and row.aside and not row.curve]
    if aside:
        rows = "1 row is" if len(aside) == 1 else f"{len(aside)} rows are"
        said += f" {rows} set aside and not counted, for the reason beside each."
    return said


_HOW_COMPARED = (
    "One of one thread is set against ours of one thread, any other against ours of several. Batches in memory are "
    "as large as each likes; whole jobs (data sets, statistics of files) are of the same size, or not compared. "
    "Uncertain by: 1.57 times the width of the middle half of the rounds over the root of their number, for both "
    "together; of fewer than five rounds, the width of all."
)


def _losses(results: Results) -> str:
    lines = []
    for duel in sorted((duel for duel in duels(results) if duel.verdict == "rival"), key=lambda d: d.ratio):
        why = REASONS.get((duel.rival.work, duel.rival.device), "not known")
        note = f"; {duel.rival.note}" if duel.rival.note else ""
        note += "; the two were measured in different runs" if duel.rival.run != duel.ours.run else ""
        lines.append(
            f"- {duel.rival.work}, {duel.rival.device}: **{duel.rival.name}** makes {_rate(duel.rival)}, "
            f"{duel.ours.name} {_rate(duel.ours)}: the rival is {1 / duel.ratio:.2f} times as fast "
            f"(uncertain by {100 * duel.noise:.0f} %). Why, as far as is known: {why}. Its output: "
            f"{duel.rival.check}{note}."
        )
    return "\n\n".join([verdict(results), _HOW_COMPARED, *(["\n".join(lines)] if lines else [])])


def suite_table(results: Results, rows: Iterable[Row]) -> str:
    """A suite's measured rows, work by work, the fastest first."""
    parts = []
    for work, same in by_work(rows).items():
        found = sorted((row for row in same if row.measured), key=lambda row: (row.device != "cuda", -row.rate))
        if not found:
            continue
        if found[0].suite == "limits":
            for row in found:
                said = "; ".join(part for part in (row.check, row.note) if part)
                parts.append(f"| {work} | {_rate(row)} | {100 * row.noise:.0f} % | {said} |")
            continue
        runs = results.used_runs
        lines = [f"**{work}**", "", "| who | device | rate | a call | noise | of the limit | output, notes |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in found:
            who = f"**{row.name}**" if row.ours else row.name
            run = f"run {runs.index(row.run) + 1}" if len(runs) > 1 else ""
            aside = f"**set aside: {row.aside}**" if row.aside else ""
            notes = "; ".join(part for part in (aside, row.check, row.note, row.clock, run) if part)
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
    lines = ["| work | who | device | a call | rate | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.work, row.name, row.device, _duration(row.median), _rate(row), row.aside)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_KERNELS_LEGEND = (
    f"Every launch works on {BATCH} samples of 224x224, as many as the pipeline makes at a time. A kernel that is "
    "there more than once was launched for composites and masks, or for each chroma subsampling. *Time* and counters "
    "are Nsight Compute's, with the card's caches flushed before and its clocks left alone. *Device memory* is what "
    "was moved a second, read and written; *of its bandwidth*, *of instruction issue*, *shared memory* and *L2* are "
    "shares of what each unit can do at most. *Bound by*: device memory from 60 % of its peak, else the busiest unit "
    "from 60 %, else what keeps all of them idle."
)


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
