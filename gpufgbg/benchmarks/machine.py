"""What a run says about where it ran: the machine, the interpreter, the versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from gpufgbg._version import __version__
from gpufgbg.backends import cuda
from gpufgbg.compositor import default_workers

__all__ = ["describe", "describe_run", "versions"]

#: whose versions are kept, where they are installed: what gpufgbg stands on, and its rivals
_PACKAGES = (
    "numpy", "numba", "pillow", "imagecodecs", "cupy-cuda12x", "cupy-cuda13x", "onnx", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "torch", "torchvision", "triton", "opencv-python", "opencv-python-headless",
    "albumentations", "kornia", "cvcuda-cu12", "cvcuda-cu13", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13", "pytest", "pytest-benchmark",
)  # fmt: skip


def describe(device: str = "auto") -> dict[str, Any]:
    """The machine: cpu, cores, memory_gb, system; gpu and what belongs to it, None where there is none."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": default_workers(),
        "memory_gb": None if memory is None else round(memory / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": None,
    }
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and cuda.why_not(index) is None:
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(index)
        found |= {
            "gpu": properties["name"].decode(),
            "gpu_memory_gb": round(properties["totalGlobalMem"] / 2**30),
            "gpu_multiprocessors": int(properties["multiProcessorCount"]),
            "gpu_l2_mb": round(properties["l2CacheSize"] / 2**20),
            "gpu_driver": _driver(index),
        }
    return found


def _cpu_name() -> str:
    with suppress(OSError):  # not Linux: the platform may know a name
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver(index: int) -> str | None:
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_run(scale: str, pictures: str, device: str) -> dict[str, Any]:
    """A run: date, command, interpreter, versions, scale, input, device."""
    command = shlex.join(["gpufgbg", *sys.argv[1:]]) if Path(sys.argv[0]).name != "pytest" else "pytest"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "gpufgbg": __version__,
        "commit": _commit(),
        "versions": versions(),
        "scale": scale,
        "input": pictures,
        "device": device,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that have a say in the figures."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")
