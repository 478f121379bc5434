"""The package as installed: public names, quick import, kernels in it, types."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import gpufgbg

KERNELS = Path(__file__).parents[1] / "kernels"


def test_public_names_are_there():
    assert gpufgbg.__all__ == sorted(gpufgbg.__all__)
    for name in gpufgbg.__all__:
        assert getattr(gpufgbg, name) is not None
        if name != "__version__":
            assert getattr(gpufgbg, name).__doc__
    assert set(gpufgbg.__all__) <= set(dir(gpufgbg))
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = gpufgbg.nothing_of_ours


def test_every_module_imports_and_lists_names_that_exist():
    for info in pkgutil.walk_packages(gpufgbg.__path__, "gpufgbg."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            assert module.__doc__, info.name
            for name in module.__all__:
                assert hasattr(module, name) or module is gpufgbg, f"{info.name}.{name}"


def test_import_is_light():
    heavy = "{'numba', 'cupy', 'pyarrow', 'imagecodecs'}"
    code = f"import gpufgbg, gpufgbg.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_kernels_are_in_the_wheel():
    """Where nvcc is, the wheel that is installed carries a fatbin for each kernel file."""
    try:
        files = metadata.files("gpufgbg") or []
    except metadata.PackageNotFoundError:
        pytest.skip("gpufgbg is not installed")
    fatbins = {Path(f).stem: Path(f.locate()) for f in files if str(f).endswith(".fatbin")}
    if not fatbins and not shutil.which("nvcc"):
        pytest.skip("this build has no kernels: no nvcc on this machine")
    assert sorted(fatbins) == sorted(path.stem for path in KERNELS.glob("*.cu"))
    for path in fatbins.values():
        data = path.read_bytes()
        assert data[:4] == b"\x50\xed\x55\xba"  # a fat binary's magic number
        assert len(data) > 10_000
