"""Build backend: scikit-build-core, with NVIDIA's compiler as a build dependency where none is installed.

A machine without a CUDA toolkit builds the kernels too: the package nvidia-cuda-nvcc is asked for then, and only
then, so that nobody who has nvcc downloads it again. Set GPUFGBG_CPU_ONLY=1 to build without kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.build import get_requires_for_build_editable as _requires_editable
from scikit_build_core.build import get_requires_for_build_wheel as _requires_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_NVCC = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "nvvm")]


def _compiler() -> list[str]:
    wanted = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    installed = "CUDACXX" in os.environ or shutil.which("nvcc") or (toolkit / "bin" / "nvcc").exists()
    skipped = os.environ.get("GPUFGBG_CPU_ONLY", "") not in ("", "0")
    return _NVCC if wanted and not installed and not skipped else []


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*_requires_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*_requires_editable(config_settings), *_compiler()]
