"""README keeps its word: its Python session runs and prints what it says, its commands parse, its links exist."""

from __future__ import annotations

import re
import shlex
import sys

import pages
import pytest

from gpufgbg.cli import build_parser

TEXT = pages.README.read_text()


def test_the_python_session_prints_what_it_says(tmp_path):
    assert len(pages.sessions(TEXT)) == 1
    pages.check_sessions(TEXT, tmp_path)


@pytest.mark.parametrize("command", [c for c in pages.commands(TEXT) if c.startswith("gpufgbg")])
def test_commands_parse(command):
    assert build_parser().parse_args(shlex.split(command)[1:]).run


def test_ci_runs_the_test_command_as_it_stands():
    blocks = re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (command,) = [line for block in blocks for line in block.splitlines() if "pytest" in line]
    assert command in (pages.ROOT / ".ci" / "run").read_text().splitlines()


def test_links_exist():
    pages.check_links(pages.README)


def test_figures_are_those_of_the_results():
    sys.path.insert(0, str(pages.ROOT / "bench"))
    try:
        import report
    finally:
        sys.path.pop(0)
    assert report.updated(TEXT) == TEXT
