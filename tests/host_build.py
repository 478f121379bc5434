"""Compiles a C++ file of tests/host/ with the system's compiler and loads it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HOST = Path(__file__).parent / "host"


def load(stem: str, folder: Path) -> ctypes.CDLL:
    """The host build of ``tests/host/<stem>.cpp``, or a skip where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler on this machine")
    library = folder / f"{stem}.so"
    command = [compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(HOST / f"{stem}.cpp")], check=True)
    return ctypes.CDLL(str(library))
