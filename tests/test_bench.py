"""`gpufgbg bench`: every suite runs and judges its outputs, whatever a rival does; files merge, compare, report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys

import numpy as np
import pages
import pytest

from gpufgbg import cli
from gpufgbg.benchmarks import profile, report, runner
from gpufgbg.benchmarks.compare import changes
from gpufgbg.benchmarks.results import Results, Row
from gpufgbg.exceptions import DeviceError, InputError, OptionError

BENCH = pages.ROOT / "bench"
MACHINE = {"cpu": "a processor", "cores": 2, "memory_gb": 8, "system": "Linux", "gpu": None}


def row(name: str = "gpufgbg", seconds: tuple[float, ...] = (1.0, 1.0, 1.0), **more) -> Row:
    known = {"suite": "render", "work": "some work", "device": "cpu", "ours": name == "gpufgbg", "unit": "pairs"}
    return Row(**{**known, "name": name, "count": 100, "seconds": seconds, **more})


def results(*rows: Row, interpreter: str = "/usr/bin/python", machine: dict | None = None) -> Results:
    found = Results(dict(machine or MACHINE))
    found.begin(
        {
            "date": "2026-01-01 00:00 UTC", "command": "gpufgbg bench", "python": "3.12", "interpreter": interpreter,
            "gpufgbg": "1", "commit": None, "versions": {}, "scale": "full", "input": "built-in", "device": "auto",
        }
    )  # fmt: skip
    for one in rows:
        found.add(one)
    return found


# -- running --------------------------------------------------------------------------------------------


@pytest.mark.skipif("GPUFGBG_BENCH_RUNS" in os.environ, reason="CI runs gpufgbg bench --quick itself")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_suite_runs_and_checks_its_outputs(device, tmp_path):
    if device == "cuda" and (reason := runner.cuda.why_not()):
        pytest.skip(reason)
    told: list[str] = []
    found = runner.run(runner.BenchOptions(tmp_path / "out", device=device, scale="tiny"), told.append)
    rows = list(found.rows.values())
    ran = {r.suite for r in rows if r.measured}
    assert (
        ran == set(runner.SUITES) if device == "cpu" else {"render", "encode", "moments", "pipeline", "stream"} <= ran
    )
    judged = rows if device == "cpu" else [r for r in rows if r.ours]  # rivals on a card are not ours to mend
    assert [f"{r.name}: {r.reason}" for r in judged if r.status == "failed"] == []
    for r in rows:
        assert r.measured or r.reason, r
        if r.measured and r.suite != "limits":
            assert r.check.startswith("against "), r
            assert found.share(r) is not None or r.suite == "depth" or r.aside, r
            assert not r.aside or r.name.startswith("gpufgbg, frames used again"), r
        if r.measured and r.ours and r.suite in ("render", "encode", "moments"):
            assert "equal" in r.check, r
    if device == "cpu":
        (rival,) = (r for r in rows if r.name == "albumentations")
        assert rival.measured or "albumentations can't be imported" in rival.reason
    stored = Results.load(tmp_path / "out" / runner.RESULTS_FILE)
    assert {r.key: r.seconds for r in stored.rows.values()} == {r.key: r.seconds for r in rows}
    assert stored.runs[0]["versions"]["numpy"] == np.__version__
    assert not list((tmp_path / "out").glob(".work-*"))
    page, left_out = report.write(stored, tmp_path / "out", "report")
    assert left_out == ""
    drawn = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())
    assert set(drawn) == {"report_rivals.png", "report_limits.png", "report_cost-against-size.png"}
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in drawn)
    assert len([line for line in told if "gpufgbg" in line]) >= 10


_CONTENDERS = """
import os, signal, time
from contenders import Case, Contender, Job, Offer, Tolerance
from settings import Settings


class Work:
    turns = 2

    def check(self, job, turn):
        assert job.output(turn) == 42, "not 42"
        return "against 42: equal"

    def needs(self, device):
        return {"host memory, write": 1000.0}


def fails(work, device, workers):
    raise RuntimeError("no luck\\ntoday")


def dies(work, device, workers):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(work, device, workers):
    time.sleep(600)


def job(answer):
    return lambda work, device, workers: Job(lambda turn: time.sleep(0.001), lambda turn: answer)


def contender(name, make, *modules):
    return Contender(name, modules, name, {"moments": (Offer(make),)}, ours=name == "gpufgbg")


WHO = (
    contender("gpufgbg", job(42)), contender("fails", fails), contender("dies", dies), contender("wrong", job(41)),
    contender("hangs", hangs), contender("missing", job(42), "no_such_module"), contender("last", job(42)),
)


def cases(settings: Settings):
    for who in WHO:
        yield Case("moments", "the answer", "answers", who, who.offers["moments"][0], "cpu", 1, 1)


def test_answer(case: Case, measure) -> None:
    measure(case, Work)
"""


def test_a_rival_that_fails_dies_or_hangs_does_not_end_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "bench"
    shutil.copytree(BENCH, folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (folder / "suites" / "test_moments.py").write_text(_CONTENDERS)
    monkeypatch.setattr(runner, "suites_folder", lambda: folder)
    monkeypatch.setitem(runner._PATIENCE_S, "tiny", 12.0)
    monkeypatch.setattr(runner.BenchOptions, "suites", ("moments",))
    options = runner.BenchOptions(tmp_path / "out", device="cpu", scale="tiny")
    found = runner.run(options, lambda text: None)
    rows = {r.name: r for r in found.rows.values()}
    assert {name: r.status for name, r in rows.items()} == {
        "gpufgbg": "measured", "fails": "failed", "dies": "failed", "wrong": "failed", "hangs": "failed",
        "missing": "absent", "last": "measured",
    }  # fmt: skip
    assert rows["fails"].reason == "RuntimeError: no luck today"
    assert "signal 9" in rows["dies"].reason
    assert rows["wrong"].reason.startswith("AssertionError: not 42")
    assert "not done after 12 s" in rows["hangs"].reason
    assert rows["missing"].reason == (
        "no_such_module can't be imported (No module named 'no_such_module'): pip install missing"
    )
    assert rows["last"].check == "against 42: equal"
    assert 0.001 <= rows["last"].median < 0.1


def test_the_command_measures_and_tells(tmp_path, run, monkeypatch):
    measure = runner.run

    def smaller(options, tell):
        assert options.scale == "quick"
        return measure(dataclasses.replace(options, scale="tiny"), tell)

    monkeypatch.setattr(runner, "run", smaller)
    out = tmp_path / "out"
    code, printed, _ = run("bench", "--quick", "--only=limits", "--device=cpu", f"--out={out}")
    assert code == 0
    assert "disk, write" in printed
    assert f"report: {out / 'report.md'}" in printed
    assert {r["suite"] for r in json.loads((out / "results.json").read_text())["rows"]} == {"limits"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=render,paint"], "--only: got 'paint', expected some of limits,render"),
        (["--device=gpu"], "--device: got 'gpu'"),
        (["--input={out}/nowhere"], "no folder bg/ in it: expected bg/ and fg/"),
    ],
)
def test_bad_options_are_refused(arguments, said, refused, tmp_path):
    out = tmp_path / "out"
    assert said in refused("bench", "--quick", f"--out={out}", *(a.format(out=out) for a in arguments))


def test_without_pytest_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'gpufgbg\[bench\]'"):
        runner.suites_folder()


def test_a_card_that_is_not_there_is_refused(tmp_path):
    if runner.cuda.why_not() is None:
        pytest.skip("this machine has a card")
    with pytest.raises(DeviceError, match="device cuda"):
        runner.BenchOptions(tmp_path, device="cuda")


def test_an_interrupted_run_leaves_its_report(tmp_path, run, monkeypatch):
    def interrupted(options, tell):
        found = results(row(), row("OpenCV"))
        options.out.mkdir()
        found.save(options.out / runner.RESULTS_FILE)
        tell("a row")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    out = tmp_path / "out"
    code, _, told = run("bench", "--quick", "--device=cpu", f"--out={out}")
    assert code == 130
    assert "report of what there is" in told
    assert "OpenCV" in (out / "report.md").read_text()
    (out / "report.md").unlink()
    code, printed, _ = run("bench", "report", out)
    assert code == 0
    assert "best rival" in printed
    assert "OpenCV" in (out / "report.md").read_text()


@pytest.fixture
def contenders(monkeypatch):
    """The suites' module, as they import it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import contenders

    return contenders


def test_rivals_run_on_both_devices_where_there_is_a_card(contenders, monkeypatch):
    offers = {"render": (contenders.Offer(None, ("cpu", "cuda"), all_cores=True),)}
    rival = contenders.Contender("rival", (), "rival", offers)
    monkeypatch.setattr(contenders, "default_workers", lambda: 7)
    for reason, expected in ((None, [("cpu", 7), ("cuda:0", 1)]), ("no card", [("cpu", 7)])):
        monkeypatch.setattr(contenders, "why_no_card", lambda device, reason=reason: reason)
        found = list(contenders.cases("render", (rival,), "auto", "cuda:0", False))
        assert [(device, workers) for _, _, device, workers in found] == expected


def test_processes_are_there_before_they_are_timed(contenders):
    pool = contenders.started_processes(2)
    assert len(pool._processes) == 2
    assert pool.submit(os.getpid).result() in pool._processes
    pool.shutdown()


# -- the file -------------------------------------------------------------------------------------------


def test_runs_of_two_interpreters_make_one_file(tmp_path):
    path = tmp_path / "results.json"
    one = results(row(), row("TensorRT", (), status="absent", reason="not here"), interpreter="/one")
    one.save(path)
    both = Results.open(path, MACHINE)
    both.begin({**one.runs[0], "interpreter": "/two"})
    both.add(row("TensorRT", (0.5, 0.5)))
    both.add(row(seconds=(), status="absent", reason="no Numba"))
    both.save(path)
    found = Results.load(path)
    assert found.rows[row("TensorRT").key].median == 0.5
    assert found.runs[found.rows[row("TensorRT").key].run]["interpreter"] == "/two"
    assert found.rows[row().key].measured  # what /two lacks, /one has measured
    assert found.runs[found.rows[row().key].run]["interpreter"] == "/one"
    found.begin({**one.runs[0]})
    found.add(row(seconds=(), status="absent", reason="gone"))
    assert not found.rows[row().key].measured  # /one itself says so
    found.add(row(seconds=(2.0,)))
    found.add(row("TensorRT", (0.25,)))
    found.save(path)
    last = Results.load(path)
    assert [run["interpreter"] for run in last.runs] == ["/one"]  # the others have no row left
    assert last.rows[row("TensorRT").key].seconds == (0.25,)


def test_results_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "results.json"
    results(row()).save(path)
    with pytest.raises(OptionError, match="has results of a processor, 2, this is a processor, 4: choose another"):
        Results.open(path, {**MACHINE, "cores": 4})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_other_files_are_refused(tmp_path, text, refused):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError):
        Results.load(path)
    assert "a.json" in refused("bench", "compare", path, path)


def test_share_is_of_the_limit_that_binds_first():
    limits = [
        row("this machine", (1.0,), suite="limits", work=name, count=rate, unit="B")
        for name, rate in (("fast", 1000.0), ("slow", 10.0))
    ]
    one = row(needs={"fast": 500.0, "slow": 20.0, "unmeasured": 1e9}, seconds=(4.0, 4.0))
    assert results(*limits, one).share(one) == (0.5, "slow")
    assert results(one).share(one) is None


def test_limits_are_those_of_the_rows_own_run(tmp_path):
    def limit(rate: float) -> Row:
        return row("this machine", (1.0,), suite="limits", work="fast", count=rate, unit="B")

    path = tmp_path / "results.json"
    found = results(limit(1000.0), row(needs={"fast": 500.0}))
    found.begin(dict(found.runs[0]))
    found.add(limit(10.0))
    other = row("OpenCV", needs={"fast": 5.0})
    found.add(other)
    found.save(path)
    for each in (found, Results.load(path)):
        assert each.share(each.rows[row().key]) == (0.5, "fast")
        assert each.share(each.rows[other.key]) == (0.5, "fast")


def test_results_of_another_scale_are_refused(tmp_path):
    path = tmp_path / "results.json"
    results(row()).save(path)
    assert Results.open(path, MACHINE, "full").rows
    with pytest.raises(OptionError, match="has results of scale full, this is quick: choose another folder"):
        Results.open(path, MACHINE, "quick")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["rows"][0].update(count="many"), "count is 'many'"),
        (lambda c: c["rows"][0].update(count=0), "count 0 of a row with times"),
        (lambda c: c["rows"][0].update(name=None), "name is 'None'"),
        (lambda c: c["rows"][0].update(seconds=["1"]), "seconds is"),
        (lambda c: c["rows"][0].update(seconds=[float("nan")]), "seconds is"),
        (lambda c: c["rows"][0].update(run=7), "of run 7 of 1"),
        (lambda c: c.update(machine="a string"), "machine is 'a string'"),
        (lambda c: c.update(rows=None), "no results of gpufgbg bench"),
        (lambda c: c["machine"].pop("cores"), "no 'cores'"),
        (lambda c: c["runs"][0].pop("scale"), "no 'scale'"),
        (lambda c: c["runs"][0].update(limits={"fast": "very"}), "limits is"),
    ],
)
def test_a_file_that_is_not_right_is_one_line(change, said, tmp_path, refused):
    path = tmp_path / "a.json"
    results(row()).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert said in refused("bench", "compare", path, path)


def test_a_file_that_is_nested_deeply_is_one_line(tmp_path, refused):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    assert "nested too deeply" in refused("bench", "compare", path, path)


def test_a_median_of_five_rounds_is_surer_than_their_spread():
    few, many = row(seconds=(1.0, 1.2, 1.4)), row(seconds=(1.0, 1.1, 1.2, 1.3, 1.4) * 5)
    assert few.uncertainty == few.noise == pytest.approx(0.4 / 1.2)
    assert many.noise == pytest.approx(0.2 / 1.2)
    assert many.uncertainty == pytest.approx(1.57 * 0.2 / 5 / 1.2)
    assert row(seconds=(1.0,) * 9).uncertainty == 0.03


# -- comparing ------------------------------------------------------------------------------------------


def compared(run, tmp_path, old: list[Row], new: list[Row]) -> tuple[int, dict[str, str]]:
    for name, rows in (("old", old), ("new", new)):
        results(*rows).save(tmp_path / f"{name}.json")
    code, printed, _ = run("bench", "--json", "compare", tmp_path / "old.json", tmp_path / "new.json")
    return code, {entry["name"]: entry["verdict"] for entry in json.loads(printed)}


@pytest.mark.parametrize(
    ("new", "verdict", "code"),
    [
        ([row(seconds=(1.02, 1.02, 1.02))], "same", 0),
        ([row(seconds=(1.2, 1.2, 1.2))], "slower", 1),
        ([row(seconds=(1.2, 1.0, 1.5))], "same", 0),  # its rounds are as far apart
        ([row(seconds=(0.5, 0.5, 0.5))], "faster", 0),
        ([row(seconds=(), status="failed", reason="broken")], "lost", 1),
        ([], "lost", 1),
    ],
)
def test_a_regression_beyond_the_noise_is_exit_code_1(new, verdict, code, run, tmp_path):
    assert compared(run, tmp_path, [row()], new) == (code, {"gpufgbg": verdict})


def test_only_rows_of_ours_regress(run, tmp_path):
    old, new = [row(), row("OpenCV")], [row(), row("OpenCV", (9.0, 9.0)), row("kornia", (9.0, 9.0))]
    assert compared(run, tmp_path, old, new) == (0, {"gpufgbg": "same", "OpenCV": "slower", "kornia": "new"})


def test_ratio_is_of_rates_so_sizes_may_differ():
    (change,) = changes(results(row()), results(dataclasses.replace(row(), count=200, seconds=(1.0, 1.0))))
    assert change.ratio == 2.0


def test_suites_that_were_not_run_are_not_lost(run, tmp_path):
    other = {"suite": "encode"}
    old = [row(), row("on a card", device="cuda", ours=True), row("encoder", ours=True, **other)]
    new = [row(), row("more", ours=True)]
    code, found = compared(run, tmp_path, old, new)
    assert code == 0
    assert found == {"gpufgbg": "same", "on a card": "not run", "encoder": "not run", "more": "new"}
    broken = row("the suite itself", (), status="failed", reason="its process ended", **other)
    assert compared(run, tmp_path, old, [*new, broken])[1]["encoder"] == "lost"


def test_rows_that_did_other_work_since_are_not_compared(run, tmp_path):
    old = [row(aside="too little work"), row("job", suite="pipeline", ours=True)]
    new = [row(seconds=(9.0, 9.0)), dataclasses.replace(old[1], count=7)]
    assert compared(run, tmp_path, old, new) == (0, {"gpufgbg": "not compared", "job": "not compared"})


def test_other_machines_and_scales_are_refused_but_by_force(run, refused, tmp_path):
    one, machine, scale = (tmp_path / f"{name}.json" for name in ("one", "machine", "scale"))
    results(row()).save(one)
    results(row(), machine={**MACHINE, "cores": 4}).save(machine)
    quick = results(row())
    quick.runs[0]["scale"] = "quick"
    quick.save(scale)
    assert "different machines: a processor, 2 and a processor, 4" in refused("bench", "compare", one, machine)
    assert "different scales: full and quick; --force" in refused("bench", "compare", one, scale)
    code, printed, _ = run("bench", "compare", one, scale, "--force")
    assert code == 0
    assert "old: a processor, 2; full, no commit, 2026-01-01 00:00 UTC" in printed
    assert "new: a processor, 2; quick, no commit, 2026-01-01 00:00 UTC" in printed


# -- reporting ------------------------------------------------------------------------------------------


def test_the_report_says_where_a_rival_is_faster():
    found = results(
        row(seconds=(1.0, 1.0)), row("quick", (0.25, 0.25), check="against Pillow's: equal", note="cheats"),
        row("slow", (4.0, 4.0)), row("close", (0.98, 0.98)), row("gone", (), status="absent", reason="not installed"),
        row("broken", (), status="failed", reason="RuntimeError: boom"),
    )  # fmt: skip
    assert [(d.rival.name, d.verdict) for d in report.duels(found)] == [
        ("quick", "rival"), ("slow", "ours"), ("close", "even"),
    ]  # fmt: skip
    text = report.report(found)
    losses = text.partition("## Where a rival is faster")[2].partition("## ")[0]
    assert "Of 3 comparisons on the same kind of device, rivals are faster in 1, and 1 are even" in losses
    assert "**quick** makes 400 pairs/s, gpufgbg 100 pairs/s: the rival is 4.00 times as fast" in losses
    assert "cheats" in losses
    assert "slow" not in losses
    assert "| gone | cpu | render | not installed |" in text
    assert "- some work: broken (cpu): RuntimeError: boom" in text


def test_rows_of_one_thread_are_compared_with_one_thread():
    found = results(
        row("gpufgbg, 1 thread", (1.0,), ours=True), row("gpufgbg, 2 threads", (0.5,), ours=True),
        row("OpenCV, 1 thread", (0.8,)), row("OpenCV, 2 threads", (0.8,)),
    )  # fmt: skip
    assert [(d.ours.name, d.rival.name) for d in report.duels(found)] == [
        ("gpufgbg, 1 thread", "OpenCV, 1 thread"), ("gpufgbg, 2 threads", "OpenCV, 2 threads"),
    ]  # fmt: skip


def test_threads_are_told_by_the_row_where_it_knows_them():
    found = results(
        row("gpufgbg, 1 thread", (1.0,), ours=True, workers=1),
        row("gpufgbg, 2 threads", (0.5,), ours=True, workers=2),
        row("NumPy", (4.0,), workers=1), row("PyTorch", (2.0,), workers=2),
    )  # fmt: skip
    assert [(d.ours.name, d.rival.name) for d in report.duels(found)] == [
        ("gpufgbg, 1 thread", "NumPy"), ("gpufgbg, 2 threads", "PyTorch"),
    ]  # fmt: skip


def test_whole_jobs_are_compared_at_one_size_only():
    known = {"suite": "pipeline", "work": "a data set"}
    large = dataclasses.replace(row(device="cuda", **known), count=1000)
    rival = dataclasses.replace(row("Pillow", (2.0, 2.0), **known), count=100)
    found = results(large, rival)
    assert report.duels(found) == []
    assert (
        "| a data set | cuda | 1 k pairs/s of 1,000 | Pillow (cpu): 50 pairs/s | not compared: the rival made 100 |"
        in (report.summary_table(found))
    )
    found.add(row("gpufgbg, 100 pairs", (0.25, 0.25), device="cuda", ours=True, **known))
    assert "| Pillow (cpu): 50 pairs/s | 8, with 400 pairs/s of 100 |" in report.summary_table(found)


def test_rows_that_are_set_aside_take_no_part_and_say_why():
    found = results(
        row("this machine", (1.0,), suite="limits", work="fast"), row(needs={"fast": 50.0}),
        row("gpufgbg, cheating", (0.1,), ours=True, needs={"fast": 50.0}, aside="does less"),
        row("cold", (9.0,), aside="timed while it started"), row("warm", (2.0, 2.0)),
    )  # fmt: skip
    assert [(d.ours.name, d.rival.name) for d in report.duels(found)] == [("gpufgbg", "warm")]
    assert "| some work | cpu | 100 pairs/s | warm: 50 pairs/s | 2 | 50 % of fast |" in report.summary_table(found)
    text = report.report(found)
    assert "2 rows are set aside and not counted" in text
    assert "**set aside: does less**" in text
    assert "**set aside: timed while it started**" in text


def test_the_summary_takes_the_best_of_all_rivals():
    found = results(
        row(device="cuda", seconds=(0.01, 0.01)), row("nvImageCodec", (1.0, 1.0), device="cuda"),
        row("OpenCV", (0.1, 0.1)),
        row("gpufgbg", (), work="depth", device="cuda", status="absent", reason="no engine"),
        row("PyTorch", device="cuda", work="depth"),
    )  # fmt: skip
    table = report.summary_table(found)
    assert "| some work | cuda | 10 k pairs/s | OpenCV (cpu): 1 k pairs/s | 10 |" in table
    assert "| depth | cuda | not measured in this run: no engine | PyTorch: 100 pairs/s |" in table


def test_a_share_of_more_than_the_limit_is_marked():
    found = results(row("this machine", (1.0,), suite="limits", work="fast"), row(needs={"fast": 150.0}))
    table = report.summary_table(found)
    assert "150 % of fast (over)" in table
    assert "the limit as measured was too low" in table


def test_every_published_loss_has_a_reason():
    for path in (BENCH / "results").glob("*.json"):
        losses = [duel for duel in report.duels(Results.load(path)) if duel.verdict == "rival"]
        for duel in losses:
            assert (duel.rival.work, duel.rival.device) in report.REASONS, (path.name, duel.rival.name)
        assert "Why, as far as is known: not known" not in path.with_name(f"{path.stem}_bench.md").read_text()


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (17.72e6, "pairs", "17.7 M pairs/s"), (999.6, "pairs", "1 k pairs/s"), (0.5, "pairs", "0.5 pairs/s"),
        (4.253e12, "B", "4.25 TB/s"), (1.25e15, "flop", "1.25 Pflop/s"), (12.0, "B", "12 B/s"), (318.0, "", "318/s"),
    ],
)  # fmt: skip
def test_rates_have_three_digits(rate, unit, text):
    assert runner.per_second(rate, unit) == text


def test_pages_are_in_step_with_their_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report as writer

    for path in sorted((BENCH / "results").glob("*.json")):
        page = writer.page_of(path)
        pictures = sorted(p.name for p in page.parent.glob(f"{page.stem}_*.png"))
        shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())
        assert sorted(shown) == pictures
        assert page.read_text() == writer.page(path, shown)


# -- the profiler ---------------------------------------------------------------------------------------

_NCU = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes.sum","{issue}","{dram}","{stall}"
"","","","","ns","byte","%","%","inst"
"0","12","composite","(668, 2, 1)","41,000","134000000","35.5","81.25","12.0"
"1","12","jpeg_tables","(668, 1, 1)","9000","n/a","12.0","20.0","7.5"
""".format(
    issue=profile.METRICS["issue_percent"],
    dram=profile.METRICS["dram_percent"],
    stall=profile.METRICS["stall_barrier"],
)


def test_counters_are_read_and_judged():
    first, second = profile.read_csv(_NCU)
    assert (first["kernel"], first["grid"], first["nanoseconds"]) == ("composite", "(668, 2, 1)", 41000.0)
    assert first["bound_by"] == "device memory"
    assert second["dram_bytes"] is None
    assert second["bound_by"] == "latency: warps wait for other warps of its block; busiest: device memory"
    found = results(row())
    found.profile = [first | {"run": 0}, second | {"run": 0}]
    table = report.kernels_table(found)
    assert (
        "| composite | 668x2x1 | 41 us | 3.27 TB/s | 81 % | 36 % | not counted | not counted | device memory |"
        in table
    )


def test_few_blocks_are_named():
    assert profile.bound_by({"dram_percent": 1.0, "waves": 0.01}) == "too few blocks for the card (0.01 waves)"


def test_ncu_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="ncu is not on the PATH"):
        runner.BenchOptions(tmp_path, profile=True)


def test_a_metric_that_ncu_does_not_know_is_left_out(monkeypatch, tmp_path):
    """A stand-in for ncu that knows but the metrics of `_NCU`, and refuses as ncu does."""
    known = re.findall(r"[\w.]+__[\w.]+", _NCU)
    (tmp_path / "ncu").write_text(
        f"#!{sys.executable}\nimport sys\nknown, text = {known!r}, {_NCU!r}\n"
        "given = sys.argv[sys.argv.index('--metrics') + 1].split(',')\n"
        "log = open(sys.argv[sys.argv.index('--log-file') + 1], 'w')\n"
        "unknown = [metric for metric in given if metric not in known]\n"
        "log.write(f'==ERROR== Failed to find metric {unknown[0]}\\n' if unknown else text)\n"
        "sys.exit(1 if unknown else 0)\n"
    )
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told: list[str] = []
    found = profile.profile(["program"], dict(os.environ), tmp_path / "log", told.append)
    assert [entry["kernel"] for entry in found] == ["composite", "jpeg_tables"]
    assert len(told) == len(profile.METRICS) - len(known)


def test_every_kernel_is_profiled():
    wanted = re.compile(profile.KERNELS.removeprefix("regex:"))
    for path in (pages.ROOT / "kernels").glob("*.cu"):
        names = re.findall(r"__launch_bounds__\([^;{]*?\)\s+(\w+)\(const", path.read_text())
        assert names or path.stem == "normalise", path
        assert all(wanted.match(name) for name in names if name != "name"), names


# -- depth's arithmetic ---------------------------------------------------------------------------------


def test_the_arithmetic_of_depth_is_that_of_its_graph(monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(BENCH))
    import densedepth

    from gpufgbg.depth import network
    from gpufgbg.depth.weights import DenseDepthWeights, tensor_shapes

    tensors = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(densedepth.WIDTHS).items()}
    weights = DenseDepthWeights(BENCH, "", tensors, densedepth.WIDTHS[0], densedepth.WIDTHS[1:], True)
    graph = onnx.shape_inference.infer_shapes(network.build(weights, (64, 32))).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    kernels = {constant.name: list(constant.dims) for constant in graph.initializer}
    counted = sum(
        2 * np.prod(kernels[node.input[1]]) * np.prod(shapes[node.output[0]][2:])
        for node in graph.node
        if node.op_type == "Conv"
    )
    assert densedepth.flop((64, 32)) == counted


def test_help_lists_the_suites_that_there_are():
    found = sorted(path.stem.removeprefix("test_") for path in (BENCH / "suites").glob("test_*.py"))
    assert found == sorted(runner.SUITES) == sorted(report.TITLES)
    assert cli.build_parser().parse_args(["bench", "compare", "a", "b"]).run
