"""The pages of docs/ and README keep their word: commands run, Python prints what it says, links and options exist.

All runs on the CPU; commands with one repetition and few pictures, in a folder that has them under the names that the
pages use. Two things that can't be had everywhere are replaced: DenseDepth's weights by the built-in network, and
building a TensorRT engine, which needs a card, by reading its command line.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pages
import pytest
from PIL import Image

from gpufgbg import cli
from gpufgbg.sample_assets import draw_figure, draw_street

SHOWN = [pages.README, *pages.PAGES]
SAMPLES = 400_000  # of the data sets that the pages speak of
COUNT = 3  # pictures of a kind here


def test_figures_of_the_stream_are_those_of_its_table():
    table = (pages.ROOT / "bench" / "results" / "h200_stream.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| ([^|]+?) \|", table, re.MULTILINE))
    rate = {
        what: [
            f"{int(rows[f'feed: {what}, batch {batch}'].split()[0].replace(',', '')) / 1e6:.1f}"
            for batch in ("512", "4,096")
        ]
        for what in ("uint8 NHWC, shuffled, new arrays", "float16 NCHW, normalised, shuffled")
    }
    training, blend = ((pages.ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "blend"))
    assert "{} to {} million shuffled uint8 samples".format(*rate["uint8 NHWC, shuffled, new arrays"]) in training
    assert "{} to {} million as\nnormalised float16".format(*rate["float16 NCHW, normalised, shuffled"]) in training
    assert f"spends {rows['U-Net: waiting and rendering, of the time of a step']} of its time" in training
    times = [re.search(rf"blend: {name}, .*\| ([\d.]+) times", table)[1] for name in ("feather", "multiply")]
    assert "a feathered edge and a multiply take {} and {} times".format(*times) in blend


def test_figures_of_engines_are_those_of_their_table():
    table = (pages.ROOT / "bench" / "results" / "h200_depth.md").read_text()
    count, mean, most = re.search(
        r"^\| fp16 against ONNX Runtime fp32, grey levels of (\d+) composites \| mean ([\d.]+) \| .*?greatest (\d+);",
        table, re.MULTILINE,
    ).groups()  # fmt: skip
    page, readme = (" ".join(path.read_text().split()) for path in (pages.ROOT / "docs" / "depth.md", pages.README))
    assert f"on {count} composites: grey levels differ by {mean} on average and by {most} at most" in page
    assert f"differ by {mean} on average, {most} at most, on {count} composites" in readme


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, cutouts/, masks/, original/ and model.onnx."""
    root = tmp_path_factory.mktemp("prepared")
    for name in ("photos", "cutouts", "masks", "original/fg_bg/bg_00"):
        (root / name).mkdir(parents=True)
    for i in range(COUNT):
        street, figure = Image.fromarray(draw_street(i)[0]), draw_figure(i)
        street.save(root / "photos" / f"street_{i}.jpg")
        street.resize((224, 224)).save(root / "original" / "fg_bg" / "bg_00" / f"bg_00_fg_00_T_{i:06d}.jpg")
        Image.fromarray(figure).save(root / "cutouts" / f"figure_{i}.png")
        Image.fromarray(np.ascontiguousarray(figure[..., 3])).save(root / "masks" / f"mask_figure_{i}.png")
    shutil.copy(Path(cli.__file__).parent / "depth" / "demo.onnx", root / "model.onnx")
    return root


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


def smaller(command: str) -> list[str]:
    """A command's arguments, for the CPU and few samples."""
    words = shlex.split(command)[1:]
    name = words[0]
    words = ["demo" if word in ("nyu.h5", "kitti.h5") else word for word in words]
    if "--per-pair" in words:
        words[words.index("--per-pair") + 1] = "1"
    elif name == "generate":
        words += ["--per-pair", "1"]
    if "--samples" in words:
        at = words.index("--samples") + 1
        here = COUNT * COUNT * 2
        words[at] = re.sub(r"\d+", lambda number: str(int(number[0]) * here // SAMPLES), words[at])
    if name in ("generate", "demo", "depth"):
        words += ["--device", "cpu", "--workers", "2"]
    return words


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_commands_and_python_run(page, workspace, run):
    text = page.read_text()
    for command in pages.commands(text):
        program = command.split()[0]
        assert program in ("gpufgbg", "pip", "pytest"), command
        if program != "gpufgbg":
            continue
        assert cli.build_parser().parse_args(shlex.split(command)[1:]).run
        if not command.startswith("gpufgbg depth build"):
            code, _, error = run(*smaller(command))
            assert code == 0, f"{command}: {error}"
    if page != pages.README:  # test_readme.py runs that
        missing = pages.missing_packages(text)
        if missing:
            pytest.skip(f"not installed: {', '.join(sorted(missing))}")
        pages.check_sessions(text, workspace, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_links_and_options_exist(page):
    pages.check_links(page)
    (commands,) = [a for a in cli.build_parser()._actions if hasattr(a, "choices") and a.dest == "command"]
    known = {option for parser in commands.choices.values() for a in parser._actions for option in a.option_strings}
    for option in re.findall(r"`(--[a-z-]+)", page.read_text()):
        assert option in known | {"--version"}, f"{page.name} says {option}"


def test_readme_links_to_every_page():
    text = pages.README.read_text()
    for page in pages.PAGES:
        assert f"(docs/{page.name}" in text, page.name
