"""Writes README's tables of measured figures from bench/results/, and a page and pictures for each JSON file there.

    python bench/report.py

The JSON files are those of ``gpufgbg bench`` (results.json), named after their machine; ``h200.json`` is README's.
Tests keep README and the pages in step with them.
"""

from __future__ import annotations

import re
from pathlib import Path

from gpufgbg.benchmarks.plots import draw
from gpufgbg.benchmarks.report import report, summary_table, verdict
from gpufgbg.benchmarks.results import Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
#: rows of h200.md that README shows, by their beginnings
SHOWN = (
    "render: composite",
    "encode: RGB",
    "encode: grey",
    "rival: nvImageCodec encode, RGB",
    "rival: nvImageCodec encode, grey",
    "rival: the Pillow recipe",
    "process start to first batch",
    "main job: 392,040 pairs to tree",
    "main job: 392,040 pairs to tar",
    "cost: 1,000,000",
    "cost: 4,000,000",
)


#: rows of h200_depth.md that README shows
DEPTH_SHOWN = (
    "engine alone",
    "fp16 against ONNX Runtime fp32, grey",
    "reconstruct",
    "main job: 392,040",
    "main job: bytes",
)


#: rows of h200_stream.md and h200_stats.md that README shows
LIBRARY_SHOWN = (
    "feed: uint8 NHWC, shuffled, new arrays",
    "feed: float16 NCHW",
    "U-Net",
    "blend",
    "stats",
    "composite: greatest",
)


def cpu_table(text: str) -> str:
    """The table of ratios in cpu.md."""
    return re.search(r"^\| gpufgbg against.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0]


def gpu_table(text: str, shown: tuple[str, ...]) -> str:
    """The rows of a result that README shows."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    chosen = [row for row in rows[1:] if row[2:].startswith(shown)]
    return "\n".join([rows[0], "|---|---|---|", *chosen])


def library_table() -> str:
    """What the library and ``stats`` do on a card."""
    stream, stats = (gpu_table((RESULTS / f"h200_{n}.md").read_text(), LIBRARY_SHOWN) for n in ("stream", "stats"))
    return "\n".join([stream, *stats.splitlines()[2:]])


def marked(name: str, table: str) -> str:
    """A table between the comments that the next run looks for."""
    return f"<!-- {name} -->\n{table}\n<!-- end -->"


def bench_table(path: Path) -> str:
    """README's share of a file of ``gpufgbg bench``."""
    results = Results.load(path)
    page = f"bench/results/{page_of(path).name}"
    return f"{summary_table(results)}\n\n{verdict(results)} [The report]({page}) names them."


def page_of(path: Path) -> Path:
    """The page of a JSON file."""
    return path.with_name(f"{path.stem}_bench.md")


def page(path: Path, pictures: list[str]) -> str:
    """The text of it."""
    return report(Results.load(path), pictures, f"gpufgbg bench: {path.stem}")


def updated(readme: str) -> str:
    """README with the tables as they are in bench/results/."""
    tables = [
        ("cpu", cpu_table((RESULTS / "cpu.md").read_text())),
        ("h200", gpu_table((RESULTS / "h200.md").read_text(), SHOWN)),
        ("depth", gpu_table((RESULTS / "h200_depth.md").read_text(), DEPTH_SHOWN)),
        ("library", library_table()),
    ]
    if (RESULTS / "h200.json").is_file():
        tables.append(("bench", bench_table(RESULTS / "h200.json")))
    for name, table in tables:
        readme = re.sub(
            rf"<!-- {name} -->.*?<!-- end -->", lambda _, n=name, t=table: marked(n, t), readme, flags=re.DOTALL
        )
    return readme


if __name__ == "__main__":
    for found in sorted(RESULTS.glob("*.json")):
        drawn = draw(Results.load(found), RESULTS, page_of(found).stem)
        page_of(found).write_text(page(found, drawn))
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
