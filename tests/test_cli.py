"""The command line itself: help, exit codes, JSON, progress, signals."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import oracle
import pytest
from conftest import start

from gpufgbg import Recipe, __version__, backends, generate
from gpufgbg.cli import build_parser
from gpufgbg.manifest import Manifest

README = Path(__file__).parents[1] / "README.md"


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions.choices)


def options() -> list[tuple[str, argparse.Action]]:
    return [(name, action) for name, parser in commands().items() for action in parser._actions]


def test_the_commands():
    assert list(commands()) == ["generate", "demo", "depth", "merge", "stats", "verify", "preview", "bench"]


@pytest.mark.parametrize(("command", "action"), options(), ids=lambda v: getattr(v, "dest", v))
def test_every_option_has_help(command, action):
    assert action.help and action.help != argparse.SUPPRESS


def test_readme_and_options_are_in_step():
    text = README.read_text()
    for command, action in options():
        assert f"gpufgbg {command}" in text
        for name in action.option_strings:
            if name.startswith("--") and name not in ("--help", "--no-optimize"):
                assert f"`{name}" in text, f"README does not say {name} of {command}"
    known = {name for _, action in options() for name in action.option_strings}
    for name in re.findall(r"`(--[a-z-]+)", text):
        assert name in known, f"README says {name}, which is not an option"


@pytest.mark.parametrize("command", [[], *([name] for name in commands())])
def test_help_is_printed(run, command):
    code, printed, error = run(*command, "--help")
    assert (code, error) == (0, "") and printed.startswith("usage: gpufgbg")


def test_version(run):
    assert run("--version") == (0, f"gpufgbg {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["make"], "invalid choice"),
        (["stats"], "DATASET"),
        (["stats", "x", "--nope"], "--nope"),
        (["generate", "--back", "x"], "required"),
    ],
)
def test_bad_usage_is_one_line(run, arguments, message):
    code, printed, error = run(*arguments)
    assert (code, printed) == (2, "") and message in error and error.count("\n") == 1


def test_generate_prints_the_table_and_plain_progress(run, arguments, tmp_path):
    code, printed, error = run(*arguments)
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].split() == ["kind", "folder", "count", "size", "mean", "std"]
    assert lines[4].startswith("composite ") and lines[5].startswith("composite mask")
    assert re.fullmatch(rf"48 samples in [\d.]+ s, [\d,]+/s; {re.escape(str(tmp_path / 'out'))}: complete", lines[-1])
    assert re.search(r"^48 of 48 samples \(100 %\), 0 s left, [\d,]+/s$", error, re.MULTILINE)
    assert "\r" not in error and "\x1b" not in error


def test_generate_as_json(run, arguments, tmp_path):
    code, printed, error = run(*arguments, "--json", "--samples", "0:30")
    report = json.loads(printed)
    assert (code, error) == (0, "")
    assert {k: report[k] for k in ("samples", "done", "total", "complete")} == {
        "samples": 30, "done": 30, "total": 48, "complete": False,
    }  # fmt: skip
    assert len(report["statistics"]["composite"]["mean"]) == 3
    code, printed, _ = run(*arguments)
    assert code == 0 and "18 samples in" in printed and "complete" in printed


def test_progress_is_a_bar_on_a_terminal(arguments):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "gpufgbg", *arguments, "--per-pair=100"], stdout=subprocess.PIPE, stderr=follower
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        process.communicate()
    os.close(leader)
    assert process.returncode == 0
    assert b"\r" in shown and b"samples/s" in shown and b"100%" in shown


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupted_by_a_signal_and_continued(arguments, tmp_path, sent, code):
    big = [*arguments, "--per-pair=1000"]
    with start(*big) as process:
        folder = tmp_path / "out" / ".gpufgbg" / "runs"
        deadline = time.monotonic() + 60
        while not (folder.is_dir() and any(folder.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(sent)
        printed, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert printed == ""
    assert re.fullmatch(
        r"gpufgbg: interrupted: [\d,]+ of 24,000 samples are safe; the same command continues", error.splitlines()[-1]
    )
    assert not any(folder.iterdir())
    with start(*arguments, f"--out={tmp_path / 'other'}") as process:
        assert process.wait(60) == 0


def test_demo(run, tmp_path):
    from PIL import Image

    code, printed, error = run("demo", tmp_path / "demo")
    assert code == 0, error
    dataset = tmp_path / "demo" / "dataset"
    samples = oracle.samples_of(dataset)
    assert len(samples) == 200
    for name, x, y in samples[::9]:
        for path, data in oracle.expected_files(dataset, name, x, y).items():
            assert (dataset / path).read_bytes() == data
    with Image.open(tmp_path / "demo" / "contact_sheet.png") as sheet:
        assert sheet.width > 2000 and sheet.height > 800
    assert str(tmp_path / "demo" / "contact_sheet.png") in printed
    assert run("demo", tmp_path / "demo")[0] == 0  # again: nothing to do
    assert run("verify", dataset, "--rerender", 20)[0] == 0


def test_demo_wants_a_name(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "OUT: got an empty name" in refused("demo", "", out=tmp_path)


def test_demo_keeps_away_from_other_peoples_folders(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    assert "not a demo of ours" in refused("demo", tmp_path / "full", out=tmp_path / "full")


def test_a_demo_that_is_refused_writes_nothing(refused, tmp_path):
    out = tmp_path / "demo"
    for argument in ("--device=cuda:99", "--device=cuda:0,99", "--device=tpu", "--workers=0", "--per-pair=0"):
        refused("demo", out, argument, out=out)


def test_a_demo_that_was_stopped_is_made_again(run, tmp_path):
    backgrounds = tmp_path / "demo" / "assets" / "backgrounds"
    backgrounds.mkdir(parents=True)
    (backgrounds / "street_00.jpg").write_bytes(b"the beginn")
    code, _, error = run("demo", tmp_path / "demo", "--no-depth", "--device=cpu")
    assert code == 0, error
    assert run("verify", tmp_path / "demo" / "dataset")[0] == 0


@pytest.mark.parametrize("name", ["assets/own.png", "assets/backgrounds/own.png", "dataset/own.txt", "dataset"])
def test_demo_keeps_away_from_folders_that_look_like_its_own(refused, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("dear")
    assert "not a demo of ours" in refused("demo", tmp_path / "out", "--device=cpu")


def test_demo_is_not_for_urls(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "OUT: got s3://bucket/demo, expected a folder on this machine" in refused(
        "demo", "s3://bucket/demo", out=tmp_path
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(refused, arguments, device):
    if backends.why_cpu("auto") is None:
        device = "cuda:99"
    error = refused(*arguments, f"--device={device}")
    assert f"device cuda:{device.partition(':')[2] or 0}: " in error and "use device cpu" in error


def test_auto_says_why_it_runs_on_the_cpu(run, arguments):
    reason = backends.why_cpu("auto")
    if reason is None:
        pytest.skip("this machine has a CUDA device")
    code, printed, _ = run(*arguments, "--device=auto")
    assert code == 0 and printed.splitlines()[-1] == f"made on the CPU: {reason}"
    assert "on the CPU" not in run(*arguments)[1]


def test_signals_are_the_callers_again(run):
    before = signal.getsignal(signal.SIGTERM)
    assert run("stats", "nowhere")[0] == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_the_reader_of_the_output_goes_away(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "gpufgbg", "demo", tmp_path / "d", "--no-depth", "--per-pair=1", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def piped(*arguments, stdout=subprocess.PIPE, **environment) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose output is buffered, as it is by default."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    command = [sys.executable, "-m", "gpufgbg", *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory) -> Path:
    """A data set of 24 samples."""
    out = tmp_path_factory.mktemp("small") / "set"
    generate(out, *folders.values(), Recipe(per_pair=1, size=(64, 48), foreground_height=20), device="cpu")
    return out


@pytest.mark.parametrize("arguments", [["stats", "SET"], ["verify", "SET", "--json"], ["--help"]])
@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_the_reader_of_buffered_output_goes_away(small, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = piped(*(small if word == "SET" else word for word in arguments), stdout=writer)
    finally:
        os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize("arguments", [["stats", "SET"], ["verify", "SET", "--json"], ["--version"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_standard_output_is_full(small, arguments):
    with Path("/dev/full").open("w") as full:
        done = piped(*(small if word == "SET" else word for word in arguments), stdout=full)
    assert done.stderr == "gpufgbg: error: standard output: can't be written: No space left on device\n"
    assert done.returncode == 2


def test_standard_output_that_takes_ascii_alone(small, tmp_path):
    (tmp_path / "öut").symlink_to(small)
    done = piped("preview", tmp_path / "öut", PYTHONIOENCODING="ascii")
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == f"{tmp_path}/\\xf6ut/preview.png\n"
    (small / "preview.png").unlink()


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed(small, tmp_path, closed):
    command = f'"{sys.executable}" -m gpufgbg stats "{small}" {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("composite" in done.stdout) == ("1>" not in closed)
    done = subprocess.run(["bash", "-c", command.replace(f'"{small}"', "nowhere")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_folder_where_a_tar_file_should_be(refused, tmp_path):
    (tmp_path / "out" / "shards" / "x.tar").mkdir(parents=True)
    assert "x.tar: can't be read: Is a directory" in refused("stats", tmp_path / "out")


def test_what_the_system_refuses_is_one_line(refused, small, monkeypatch):
    def no(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", no)
    assert f"error: {small / 'dataset.json'}: Permission denied" in refused("verify", small, out=small)


def test_what_may_not_be_read_is_not_said_to_be_written(refused, arguments, tmp_path, monkeypatch):
    def no(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.json").write_text("{}")
    monkeypatch.setattr(Manifest, "read", lambda self: no(self.file))
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)  # root may read everything
    assert f"no permission to read {tmp_path / 'out' / 'dataset.json'}" in refused(*arguments)


@pytest.mark.parametrize("after", [0.001, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6])
def test_interrupted_while_it_starts(tmp_path, after):
    program = "import signal, sys, threading, os; from gpufgbg.__main__ import main; "
    program += f"threading.Timer({after}, os.kill, (os.getpid(), signal.SIGINT)).start(); "
    program += "sys.exit(main())"
    command = [sys.executable, "-c", program, "demo", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("after", [0.2, 0.5, 0.8, 1.1])
def test_interrupted_while_its_processes_start(arguments, after):
    """Ctrl-C goes to all processes of a terminal's group; those that start are silent."""
    with start(*arguments, "--device=cpu,cpu", "--per-pair=2000", start_new_session=True) as process:
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)
        printed, error = process.communicate(timeout=60)
    assert (process.returncode, printed) in ((130, ""), (-signal.SIGINT, "")), error
    if process.returncode == 130:  # not before Python itself had started
        assert "Traceback" not in error and "interrupted" in error.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize("command", ["stats", "verify"])
def test_a_pipe_among_pictures(run, tmp_path, command):
    """Nobody waits for who would write to it."""
    (tmp_path / "fg_bg").mkdir()
    os.mkfifo(tmp_path / "fg_bg" / "x.jpg")
    code, printed, error = run(command, tmp_path, "--workers=1", "--device=cpu")
    assert code == (2 if command == "stats" else 1)
    assert f"{tmp_path / 'fg_bg' / 'x.jpg'}: can't be read: neither a file nor a folder: remove it" in printed + error


def test_options_of_depth_without_depth(refused, arguments, tmp_path):
    for option in ("--depth-scale=3", "--depth-input=rendered", "--depth-size=64", "--depth-batch=2"):
        name = option.partition("=")[0]
        assert f"{name}: is for depth maps: give their weights too, with --depth" in refused(*arguments, option)


def test_messages_name_what_the_command_calls_it(refused, small, folders, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("dear")
    picture = folders["backgrounds"] / "a.jpg"
    for arguments, message in (
        (["depth", small, "--weights=nofile.h5"], "error: --weights nofile.h5: can't be read"),
        (["depth", small, "--weights="], "error: --weights: got ''"),
        (["merge", occupied, small], f"error: OUT {occupied}: exists and is not a data set of ours"),
        (["merge", tmp_path / "m", ""], "error: PART: got an empty name"),
        (["stats", "s3://user:word@bucket/x"], "error: DATASET: s3://bucket/..."),
        (["verify", "s3://user:word@bucket/x"], "error: DATASET: s3://bucket/..."),
        (["depth", picture, "--weights=demo"], f"{picture}: not a folder: expected a data set"),
        (["generate", "--backgrounds=no", "--foregrounds=no", "--out=x"], "--backgrounds: no such folder: no"),
        (["stats", ""], "error: DATASET: got an empty name"),
        (["verify", ""], "error: DATASET: got an empty name"),
        (["preview", ""], "error: DATASET: got an empty name"),
        (["stats", small, "--device=cuda:0,1"], "expected auto, cpu, cuda or cuda:N: several cards"),
        (["generate", *(f"--{n}={f}" for n, f in folders.items()), "--out=x", "--device=cuda:0,cuda:1"], "cuda:0,2"),
    ):
        assert message in refused(*arguments, out=small)


def test_many_pictures_that_cannot_be_used_are_counted(refused, arguments, tmp_path):
    (tmp_path / "bg").mkdir()
    for i in range(30):
        (tmp_path / "bg" / f"{i:02}.jpg").write_bytes(b"")
    error = refused(*arguments, f"--backgrounds={tmp_path / 'bg'}")
    assert "error: 30 problems with the input: " in error and error.endswith("; and 10 more")
    assert error.count("zero bytes long") == 20


def test_frames_that_depth_of_a_folder_leaves_out(run, tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "in" / "a.webp", save_all=True, append_images=frames[1:])
    _, _, error = run("depth", tmp_path / "in", "--weights=demo", "--device=cpu", "--workers=1")
    assert "a.webp: 2 frames, only the first is used" in error


def test_one_fault_is_one(run, tmp_path):
    from PIL import Image

    (tmp_path / "fg_bg").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "fg_bg" / "a.jpg")
    (tmp_path / "fg_bg" / "b.jpg").write_bytes(b"no")
    code, printed, error = run("verify", tmp_path, "--workers=1", "--device=cpu")
    assert code == 1 and re.search(r": 1 fault$", printed, re.MULTILINE)
    assert ", 0/s" not in error
