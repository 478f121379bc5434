"""Our kernels under Nsight Compute: time, share of bandwidth, share of instruction issue, and what bounds each.

``bench/profile_kernels.py`` launches every kernel once at the batch of the main job; ``ncu`` replays each launch for
its counters, with the card's caches flushed before and its clocks left alone.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpufgbg.exceptions import DeviceError

__all__ = ["BATCH", "KERNELS", "METRICS", "bound_by", "entry", "profile", "read_csv", "why_no_profile"]

KERNELS = "regex:^(composite|moments|jpeg_|depth_|normalise_)"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
#: why a warp waits -> what that means
STALLS = {
    "long_scoreboard": "loads from memory",
    "short_scoreboard": "shared memory or special functions",
    "mio_throttle": "the queue to shared memory",
    "lg_throttle": "the queue to global memory",
    "math_pipe_throttle": "a busy arithmetic unit",
    "wait": "results of a fixed latency",
    "barrier": "other warps of its block",
    "membar": "a memory fence",
    "branch_resolving": "branches",
    "no_instruction": "instructions",
    "drain": "stores at its end",
    "not_selected": "its turn",
}
#: what the report wants -> ncu's metric
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "shared_percent": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
    "registers": "launch__registers_per_thread",
    **{f"stall_{name}": STALL.format(name) for name in STALLS},
}
#: the counters that can show what a kernel is limited by, and what to call that
_UNITS = {
    "dram_percent": "device memory",
    "issue_percent": "instruction issue",
    "shared_percent": "shared memory",
    "l1_percent": "L1 cache and shared memory",
    "l2_percent": "L2 cache",
}
BATCH = 668  # samples of 224x224 that `gpufgbg.cuda_pipeline` makes at a time, and a launch is profiled with
_PATIENCE_S = 600
_BOUND = 60.0  # per cent of a unit's peak from which it is said to be the limit
_FEW_WAVES = 0.5  # of the card's multiprocessors: with fewer blocks, most of it idles


def why_no_profile() -> str | None:
    """What keeps this machine from counting, with what to do, or None."""
    if shutil.which("ncu") is None:
        return "ncu is not on the PATH: install Nsight Compute, which comes with the CUDA toolkit"
    return None


def profile(
    program: Sequence[str], environment: Mapping[str, str], log: Path, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run a program under ncu and return an entry a launch of a kernel of ours.

    Raises
    ------
    DeviceError
        ncu is missing, or may not read the counters; the message says why.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise DeviceError(
            "--profile: ncu is not on the PATH: install Nsight Compute, which comes with the CUDA toolkit"
        )
    wanted = dict(METRICS)
    while True:
        command = [
            "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--kernel-name", KERNELS, "--metrics", ",".join(wanted.values()),
            "--log-file", str(log), *program,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, env=environment)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"--profile: ncu was not done after {_PATIENCE_S} s; see {log}") from None
        said = log.read_text() if log.exists() else ""
        unknown = [
            name
            for name, metric in wanted.items()
            if re.search(rf"find metric\D*\b{re.escape(metric)}", said + done.stderr)
        ]
        if not unknown:
            break
        for name in unknown:
            tell(f"   ncu knows no {wanted.pop(name)}: left out")
    entries = read_csv(said, wanted)
    if not entries:
        errors = [
            line for line in (said + done.stdout + done.stderr).splitlines() if "ERR" in line or "Error" in line
        ]
        raise DeviceError(f"--profile: ncu gave no counters: {errors[0].strip() if errors else f'see {log}'}")
    return entries


def read_csv(text: str, wanted: dict[str, str] = METRICS) -> list[dict[str, Any]]:
    """Entries of ncu's raw page in CSV: of several launches of a kernel, each has its own."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    for record in csv.DictReader(lines[start:]):
        if record["ID"].isdigit():  # not the line of units
            values = {name: _number(record.get(metric)) for name, metric in wanted.items()}
            found.append(entry(record["Kernel Name"], record.get("Grid Size", ""), values))
    return found


def entry(kernel: str, grid: str, values: dict[str, float | None]) -> dict[str, Any]:
    """What the results keep of a launch."""
    return {"kernel": kernel.partition("(")[0], "grid": grid, **values, "bound_by": bound_by(values)}


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # n/a: not to be had on this card
        return None


def bound_by(values: dict[str, float | None]) -> str:
    """What keeps a kernel from being faster, by its counters.

    Device memory, where that is at 60 % of its peak; the L2 cache, through which all goes, is busier then. Else the
    unit that is busiest, where that is at least at 60 %. Else nothing is busy: too few blocks for the card, or warps
    wait, and what for is said.
    """
    busy = [(values.get(name) or 0.0, unit) for name, unit in _UNITS.items()]
    share, unit = busy[0] if busy[0][0] >= _BOUND else max(busy)
    if share >= _BOUND:
        return unit
    waves = values.get("waves")
    if waves is not None and waves < _FEW_WAVES:
        return f"too few blocks for the card ({waves:.2f} waves)"
    stalls = {name: values.get(f"stall_{name}") or 0.0 for name in STALLS if name != "not_selected"}
    name = max(stalls, key=lambda key: stalls[key])
    if not stalls[name]:
        return f"unknown; busiest: {unit}"
    return f"latency: warps wait for {STALLS[name]}; busiest: {unit}"
