"""Makes pytest-benchmark suites of contenders and work, checks every output, and hands rows to ``gpufgbg bench``."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from clocks import CLOCKS, synchronise
from contenders import EVENTS, HOST, Case, Job, Unsupported
from settings import SCALES, Settings

from gpufgbg.benchmarks.results import Row

_ROW = pytest.StashKey[Row]()
_MOST_ROUNDS = 30
_EVENT_SECONDS = 0.005  # a round on a card lasts at least so long, so that events are far apart


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpufgbg")
    group.addoption("--bench-scale", choices=sorted(SCALES), default="quick", help="size of the run")
    group.addoption("--bench-device", default="auto", help="auto (CPU and card), cpu, or cuda[:N] (card alone)")
    group.addoption("--bench-input", help="folder with bg/, fg/, fg_mask/ (default: built-in pictures)")
    group.addoption("--bench-work", help="folder for what is thrown away (default: a temporary one)")
    group.addoption("--bench-keep", help="folder for what other interpreters' runs may want (default: the former)")
    group.addoption("--bench-rows", help="file that a JSON line is added to for each row")
    group.addoption("--bench-skip", help="file with ids of rows that were measured already, a line each")


def pytest_configure(config: pytest.Config) -> None:
    _, _, index = config.getoption("bench_device").partition(":")
    if int(index or 0):
        import cupy

        cupy.cuda.Device(int(index)).use()  # for what is not told which card
    given = config.getoption("bench_work")
    work = Path(given or tempfile.mkdtemp(prefix="gpufgbg-bench-"))
    if not given:
        config.add_cleanup(lambda: shutil.rmtree(work, ignore_errors=True))
    keep = Path(config.getoption("bench_keep") or work)
    for folder in (work, keep):
        folder.mkdir(parents=True, exist_ok=True)
    if source := config.getoption("bench_input"):
        root = Path(source)
        pictures = root / "bg", root / "fg", root / "fg_mask" if (root / "fg_mask").is_dir() else None
    else:
        from gpufgbg.sample_assets import write_sample_assets

        pictures = (*write_sample_assets(work / "assets"), None)
    config.settings = Settings(  # type: ignore[attr-defined]
        SCALES[config.getoption("bench_scale")], config.getoption("bench_device"), *pictures, work, keep
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = list(metafunc.module.cases(metafunc.config.settings))
        metafunc.parametrize("case", found, ids=[str(case) for case in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = config.getoption("bench_skip")
    done = set(Path(skipped).read_text().splitlines()) if skipped else set()
    items[:] = [item for item in items if item.nodeid.rpartition("::")[2] not in done]


# -- rows for gpufgbg bench -----------------------------------------------------------------------------


def _tell(config: pytest.Config, content: dict[str, Any]) -> None:
    if path := config.getoption("bench_rows"):
        with Path(path).open("a") as file:
            file.write(json.dumps(content) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    case: Case = item.callspec.params["case"]  # type: ignore[attr-defined]
    _tell(item.config, {"begin": item.nodeid.rpartition("::")[2], "row": case.row})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    case: Case = item.callspec.params["case"]  # type: ignore[attr-defined]
    row = item.stash.get(_ROW, None)
    if report.when == "call" and report.passed and row is not None:
        _tell(item.config, {"row": asdict(row)})
    elif report.skipped:
        reason = str(call.excinfo.value) if call.excinfo else ""
        _tell(item.config, {"row": case.row | {"status": "absent", "reason": reason}})
    elif report.failed and call.excinfo:
        kind, text = call.excinfo.type.__name__, " ".join(str(call.excinfo.value).split())
        _tell(item.config, {"row": case.row | {"status": "failed", "reason": f"{kind}: {text[:300]}"}})
    return report


# -- measuring ------------------------------------------------------------------------------------------


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.settings  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def measure(request: pytest.FixtureRequest, settings: Settings) -> Callable[..., None]:
    """``measure(case, make_work)``: check a contender's output, time it, check again, and keep the row."""

    def measured(case: Case, make_work: Callable[[], Any], rounds: int | None = None) -> None:
        if reason := case.contender.why_absent(case.offer, case.device):
            pytest.skip(reason)
        work = make_work()
        try:
            job = case.offer.make(work, case.device, case.workers)
        except Unsupported as error:
            pytest.skip(str(error))
        try:
            checked = work.check(job, 0)
            times = _time(request, job, work.turns, settings, rounds)
            if work.turns > 1:
                work.check(job, work.turns - 1)
        finally:
            job.close()
        row = Row(
            **case.row, seconds=tuple(times), clock=job.clock, needs=work.needs(case.device.partition(":")[0]),
            check=checked, note=job.note, aside=job.aside,
        )  # fmt: skip
        request.node.stash[_ROW] = row

    return measured


def _time(
    request: pytest.FixtureRequest, job: Job, turns: int, settings: Settings, rounds: int | None
) -> list[float]:
    """Seconds of a call, a value a round, by pytest-benchmark with the job's clock; turns take turns."""
    request.node.add_marker(pytest.mark.benchmark(timer=CLOCKS[job.clock], disable_gc=True))
    benchmark = request.getfixturevalue("benchmark")
    turn = itertools.cycle(range(turns))
    together, most, least = 1, settings.scale.seconds, settings.scale.least_rounds
    if rounds is None:
        for _ in range(2):  # the first call warms up, so it is the second one that says how many rounds fit
            once = _seconds(lambda: job.run(next(turn)), job.clock)
        if job.clock == EVENTS:
            together = max(1, min(1000, round(_EVENT_SECONDS / once)))
        rounds = max(min(least, 2) if once > most else least, min(_MOST_ROUNDS, int(most / (once * together))))
    benchmark.pedantic(lambda: job.run(next(turn)), rounds=rounds, iterations=together)
    return list(benchmark.stats.stats.data)


def _seconds(function: Callable[[], Any], clock: str) -> float:
    start = time.perf_counter()
    function()
    if clock != HOST:
        synchronise()
    return max(1e-7, time.perf_counter() - start)
