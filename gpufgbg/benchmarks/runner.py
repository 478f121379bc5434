"""Runs the suites, each in a process of its own, and keeps every row as soon as it is measured.

A contender that fails is a row that says so. One that takes the process with it, or does not come back, is too: the
suite is started again without it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpufgbg
from gpufgbg.backends import check_device, cuda
from gpufgbg.benchmarks.machine import describe, describe_run
from gpufgbg.benchmarks.profile import profile, why_no_profile
from gpufgbg.benchmarks.results import Results, Row
from gpufgbg.exceptions import DeviceError, InputError, OptionError, printable
from gpufgbg.files import storage_errors

__all__ = ["RESULTS_FILE", "SUITES", "BenchOptions", "per_second", "percent", "run", "suites_folder", "times"]

#: in the order in which they run; the first always does
SUITES = ("limits", "render", "encode", "moments", "depth", "pipeline", "stream", "stats")
SCALES = ("full", "quick", "tiny")
RESULTS_FILE = "results.json"
_PATIENCE_S = {"full": 300.0, "quick": 120.0, "tiny": 60.0}  # for one row
_POLL_S = 0.1
_PACKAGE = Path(gpufgbg.__file__).parent

Tell = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What to run.

    Parameters
    ----------
    out : path
        Folder of the results; rows that are there stay, but for those that are measured again.
    only : tuple of str
        Names of `SUITES`; all where it is empty.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` measures on the CPU and on the first card, ``cuda`` on the card alone.
    scale : {"full", "quick", "tiny"}
        ``tiny`` is for testing the suites: its figures mean nothing.
    pictures : path, optional
        Folder with ``bg/``, ``fg/`` and, where there are masks, ``fg_mask/``; by default built-in pictures.
    profile : bool
        Run our kernels under Nsight Compute as well.

    Raises
    ------
    OptionError, InputError, DeviceError
        A name is unknown, the folder is not there, or the device is not.
    """

    out: Path
    only: tuple[str, ...] = ()
    device: str = "auto"
    scale: str = "full"
    pictures: Path | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in SUITES:
                raise OptionError("only", f"got {name!r}, expected some of {','.join(SUITES)}")
        if self.scale not in SCALES:
            raise OptionError("scale", f"got {self.scale!r}, expected one of {', '.join(SCALES)}")
        check_device(self.device)
        if self.device.startswith("cuda"):
            reason = cuda.why_not(int(self.device.partition(":")[2] or 0))
            if reason is not None:
                raise DeviceError(f"device {self.device}: {reason}; or use device cpu")
        if self.pictures is not None:
            for name in ("bg", "fg"):
                if not (self.pictures / name).is_dir():
                    raise InputError(
                        f"--input {printable(self.pictures)}: no folder {name}/ in it: expected bg/ and fg/, and "
                        "fg_mask/ where there are masks"
                    )
        if self.profile and (reason := why_no_profile()):
            raise DeviceError(f"--profile: {reason}")
        if self.out.exists() and not self.out.is_dir():
            raise OptionError("out", f"{printable(self.out)} is no folder")

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites to run, in order."""
        return tuple(name for name in SUITES if not self.only or name in self.only or name == SUITES[0])


def suites_folder() -> Path:
    """The folder ``bench`` with the suites: the wheel's, or the checkout's.

    Raises
    ------
    DeviceError
        This installation has none, or the packages that run them are missing.
    """
    for folder in (_PACKAGE / "bench", _PACKAGE.parent / "bench"):
        if (folder / "suites" / "test_limits.py").is_file():
            break
    else:
        raise DeviceError("the suites are not in this installation: install gpufgbg from its wheel or its repository")
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise DeviceError(f"{' and '.join(missing)} can't be imported: pip install 'gpufgbg[bench]'")
    return folder


def run(options: BenchOptions, tell: Tell) -> Results:
    """Run suites and return all rows of ``options.out``, which are also in its ``results.json``.

    Parameters
    ----------
    options : BenchOptions
    tell : callable
        Called with a line of text for each row.

    Raises
    ------
    OptionError
        The folder has results of another machine or scale.
    DeviceError
        The suites or pytest are missing.
    """
    folder = suites_folder()
    path = options.out / RESULTS_FILE
    results = Results.open(path, describe(options.device), options.scale)
    with storage_errors(options.out):
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".work-", dir=options.out))
    pictures = "built-in" if options.pictures is None else options.pictures.resolve().name
    results.begin(describe_run(options.scale, pictures, options.device))
    try:
        for suite in options.suites:
            tell(f"== {suite}")
            begun = time.monotonic()
            for row in _Suite(folder, suite, options, work).rows():
                results.add(row)
                results.save(path)
                if row.status != "absent" or not row.curve:
                    tell(line(results, row))
            tell(f"   {time.monotonic() - begun:.0f} s")
        if options.profile:
            tell("== our kernels under ncu")
            program = [sys.executable, str(folder / "profile_kernels.py"), *_profiled(options)]
            failed = Row("profile", "our kernels", "ncu", "cuda", status="failed")
            results.rows.pop(failed.key, None)
            try:
                found = profile(program, _environment(folder), options.out / "logs" / "profile.log", tell)
                results.profile = [entry | {"run": len(results.runs) - 1} for entry in found]
            except DeviceError as error:  # what was measured before stays
                row = replace(failed, reason=str(error))
                results.add(row)
                tell(line(results, row))
            results.save(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return results


def _profiled(options: BenchOptions) -> list[str]:
    """Arguments of profile_kernels.py."""
    device = options.device if options.device.startswith("cuda") else "cuda"
    root = options.pictures
    folders = [] if root is None else [root / name for name in ("bg", "fg", "fg_mask") if (root / name).is_dir()]
    return [*map(str, folders), f"--device={device}"]


def line(results: Results, row: Row) -> str:
    """A row as a line of text."""
    who = f"{row.work}: {row.name} ({row.device})"
    if not row.measured:
        return f"   {who}: {row.status}: {row.reason}"
    share = results.share(row)
    reached = "" if share is None else f", {percent(share[0])} of {share[1]}"
    return f"   {who}: {per_second(row.rate, row.unit)}{reached}"


def per_second(rate: float, unit: str = "") -> str:
    """A rate with three digits: ``17.7 M pairs/s``, ``4.25 TB/s``."""
    found = next(
        ((f, p) for f, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if rate >= 0.9995 * f),
        (1, ""),
    )
    number = f"{rate / found[0]:.3g} {found[1]}".rstrip()
    if unit in ("B", "flop"):
        return f"{number}{unit}/s" if found[1] else f"{number} {unit}/s"
    return f"{number} {unit}/s".replace(" /s", "/s")


def times(ratio: float) -> str:
    """A ratio with three digits: ``0.861``, ``12.4``, ``1,260``."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def percent(share: float) -> str:
    """A share with two digits or more: ``0.51 %``, ``104 %``."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


class _Suite:
    """One suite's process, started again where a row ends it."""

    def __init__(self, folder: Path, suite: str, options: BenchOptions, work: Path) -> None:
        self._folder = folder
        self._suite = suite
        self._options = options
        self._work = work
        self._log = options.out / "logs" / f"{suite}.log"
        self._done: list[str] = []
        self._under_way: dict[str, Any] | None = None

    def rows(self) -> Iterator[Row]:
        """All rows, as they are measured."""
        while True:
            reason = ""
            for content in self._process():
                if "begin" in content:
                    self._done.append(content["begin"])
                    self._under_way = content["row"]
                elif "stopped" in content:
                    reason = content["stopped"]
                else:
                    self._under_way = None
                    yield Row.of(content["row"])
            if self._under_way is None:
                if reason:  # before any row began, or behind the last one: nothing is left to be tried
                    yield self._failed({"work": "the suite itself", "name": "pytest"}, reason)
                return
            yield self._failed(self._under_way, reason or "its process ended")
            self._under_way = None

    def _failed(self, known: dict[str, Any], reason: str) -> Row:
        told = f"{reason}; see logs/{self._log.name}"
        return Row.of({"suite": self._suite, "device": "cpu", "status": "failed", "reason": told} | known)

    def _process(self) -> Iterator[dict[str, Any]]:
        """What a process says, line by line, and why it stopped if it did not end well."""
        rows, skipped = (self._work / f"{self._suite}.{name}" for name in ("rows", "skip"))
        rows.write_text("")
        skipped.write_text("".join(f"{name}\n" for name in self._done))
        with self._log.open("ab" if self._done else "wb") as log:
            process = subprocess.Popen(
                self._command(rows, skipped), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=_environment(self._folder), start_new_session=os.name == "posix",
            )  # fmt: skip
            try:
                with rows.open() as file:
                    yield from self._read(process, file)
            finally:
                _end(process)

    def _read(self, process: subprocess.Popen[bytes], file: Any) -> Iterator[dict[str, Any]]:
        patience = _PATIENCE_S[self._options.scale]
        heard, partial = time.monotonic(), ""
        while True:
            ended = process.poll()
            text = file.readline()
            if text:
                heard, partial = time.monotonic(), partial + text
                if partial.endswith("\n"):
                    yield json.loads(partial)
                    partial = ""
            elif ended is not None:
                if ended not in (0, 1, 5):  # all passed, some failed, none collected
                    signalled = ended < 0 or ended > 128
                    yield {
                        "stopped": f"its process {'was ended by signal' if signalled else 'exited with'} {abs(ended)}"
                    }
                return
            elif time.monotonic() - heard > patience:
                yield {"stopped": f"not done after {patience:.0f} s"}
                return
            else:
                time.sleep(_POLL_S)

    def _command(self, rows: Path, skipped: Path) -> list[str]:
        options = self._options
        given = [
            f"--bench-scale={options.scale}", f"--bench-device={options.device}", f"--bench-work={self._work}",
            f"--bench-keep={options.out}", f"--bench-rows={rows}", f"--bench-skip={skipped}",
        ]  # fmt: skip
        if options.pictures is not None:
            given.append(f"--bench-input={options.pictures}")
        suite = self._folder / "suites" / f"test_{self._suite}.py"
        config = ["-c", self._folder / "pytest.ini", f"--rootdir={self._folder}", "-q", "--tb=short"]
        return [sys.executable, "-m", "pytest", suite, *config, *given]  # type: ignore[list-item]


def _environment(folder: Path) -> dict[str, str]:
    """This process's, for what is run of ``folder``; a checkout that is not installed is put where that finds it.

    Without pytest's own variables: where this process is one of pytest-xdist's, nothing would be measured.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [os.environ.get("PYTHONPATH", "")]
    if folder.parent != _PACKAGE:
        paths.insert(0, str(_PACKAGE.parent))
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, if it has not ended, and the workers that it may have left."""
    if os.name != "posix":
        process.kill()
    elif process.poll() is None or process.returncode < 0:
        with suppress(ProcessLookupError):  # no worker is left of one that a signal ended
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
