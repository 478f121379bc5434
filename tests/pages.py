"""What README and the pages of docs/ show: their commands, and their Python with what it prints."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
_NEXT = "\x1e"  # between the outputs of two blocks


def commands(text: str) -> list[str]:
    """Every command of the console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]


def sessions(text: str) -> list[tuple[str, str | None]]:
    """Every Python block, with the text block that follows it at once: what it prints."""
    pattern = r"^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```)?"
    return [(found[1], found[2]) for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)]


def missing_packages(text: str) -> set[str]:
    """The packages that Python blocks import and this machine doesn't have."""
    code = "\n".join(code for code, _ in sessions(text))
    names = re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)
    return {name for name in names if importlib.util.find_spec(name) is None}


def check_sessions(text: str, folder: Path, **environment: str) -> None:
    """Run the Python blocks one after the other, as one program in ``folder``: they print what they say, no more."""
    found = sessions(text)
    if not found:
        return
    code = f"\nprint({_NEXT!r}, end='')\n".join(code for code, _ in found)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=os.environ | environment
    )
    assert (result.stderr, result.returncode) == ("", 0)
    for (code, expected), printed in zip(found, result.stdout.split(_NEXT), strict=True):
        assert printed == (expected or ""), code


def check_links(page: Path) -> None:
    """Files and headings that a page links to are there."""
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = (page.parent / target) if target else page
        assert linked.is_file(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, heading
