"""Small, untidy input made afresh for each test session, and the real input where it is there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpufgbg import cli


def smooth(rng: np.random.Generator, width: int, height: int, channels: int) -> np.ndarray:
    """A picture with both soft and hard parts, (height, width, channels) uint8."""
    small = rng.integers(0, 256, (5, 5, channels), dtype=np.uint8)
    planes = [
        np.asarray(Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC))
        for c in range(channels)
    ]
    picture = np.stack(planes, axis=-1).astype(np.int16)
    picture[height // 3 : height // 2] += rng.integers(-60, 60, (height // 2 - height // 3, width, channels))
    return picture.clip(0, 255).astype(np.uint8)


def cutout(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """An ellipse with a soft edge on transparent ground, (height, width, 4) uint8."""
    y, x = np.mgrid[:height, :width]
    distance = ((x - width / 2 + 0.5) / (width / 2)) ** 2 + ((y - height / 2 + 0.5) / (height / 2)) ** 2
    alpha = (255 * np.clip(4 * (1.1 - distance), 0, 1)).astype(np.uint8)
    return np.dstack([smooth(rng, width, height, 3), alpha])


@pytest.fixture
def luck() -> random.Random:
    """Chance that differs from run to run; a failure shows its seed, which GPUFGBG_TEST_SEED sets again."""
    seed = int(os.environ.get("GPUFGBG_TEST_SEED", os.getpid()))
    print(f"GPUFGBG_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of 3 backgrounds and 4 foregrounds with masks, for frames of 64x48 and foregrounds 20 high."""
    root = tmp_path_factory.mktemp("input")
    rng = np.random.default_rng(5)
    made = {name: root / name for name in ("backgrounds", "foregrounds", "masks")}
    for folder in made.values():
        folder.mkdir()
    Image.fromarray(smooth(rng, 64, 48, 3)).save(made["backgrounds"] / "a.jpg", quality=90)
    Image.fromarray(smooth(rng, 120, 80, 3)).save(made["backgrounds"] / "b.PNG")
    Image.fromarray(smooth(rng, 50, 70, 3)).save(made["backgrounds"] / "c.jpeg", progressive=True)
    for name, (width, height) in {"p": (30, 40), "q": (11, 20), "r": (64, 20), "s": (90, 61)}.items():
        figure = cutout(rng, width, height)
        Image.fromarray(figure).save(made["foregrounds"] / f"{name}.png")
        Image.fromarray(figure[..., 3]).save(made["masks"] / f"mask_{name}.png")
    return made


@pytest.fixture(scope="session")
def people() -> Path:
    """The real input, where this checkout stands beside it."""
    path = Path(os.environ.get("GPUFGBG_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "people_in_places"
    if not path.is_dir():
        pytest.skip(f"no real input at {path}")
    return path


@pytest.fixture
def arguments(folders: dict[str, Path], tmp_path: Path) -> list[str]:
    """Arguments of a small ``generate`` on the CPU into ``tmp_path / 'out'``."""
    return [
        "generate",
        *(f"--{name}={folder}" for name, folder in folders.items()),
        f"--out={tmp_path / 'out'}",
        "--size=64x48",
        "--foreground-height=20",
        "--per-pair=2",
        "--workers=2",
        "--device=cpu",
    ]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def refused(run, tmp_path: Path):
    """Runs the command line and expects one line of error, exit code 2, and nothing written to ``out``."""

    def call(*arguments: object, out: Path | None = None) -> str:
        out = out or tmp_path / "out"
        before = sorted(out.rglob("*")) if out.is_dir() else out.exists()
        code, printed, error = run(*arguments)
        errors = [line for line in error.splitlines() if not line.startswith("gpufgbg: warning: ")]
        assert code == 2, error
        assert printed == ""
        assert len(errors) == 1, error
        assert errors[0].startswith("gpufgbg: error: ")
        assert (sorted(out.rglob("*")) if out.is_dir() else out.exists()) == before
        return errors[0]

    return call


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpufgbg", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
