"""README keeps its word: its Python session runs and prints what it says, its commands parse, its links exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpufgbg.cli import build_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_python_session_prints_what_it_says(tmp_path):
    (session,) = blocks("python")
    expected = TEXT.partition(session)[2].partition("```text\n")[2].partition("```")[0]
    found = subprocess.run([sys.executable, "-c", session], capture_output=True, text=True, cwd=tmp_path)
    assert (found.stderr, found.stdout) == ("", expected)


def commands() -> list[str]:
    return [part.strip() for block in blocks("console") for line in block.splitlines() for part in line.split("&&")]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("gpufgbg")])
def test_commands_parse(command):
    assert build_parser().parse_args(shlex.split(command)[1:]).run


def test_ci_runs_the_test_command_as_it_stands():
    (command,) = [line for block in blocks("console") for line in block.splitlines() if "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_figures_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import report
    finally:
        sys.path.pop(0)
    assert report.updated(TEXT) == TEXT
