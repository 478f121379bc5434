"""Writes README's tables of measured figures from bench/results/; a test keeps them in step.

python bench/report.py
"""

from __future__ import annotations

import re
from pathlib import Path

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


def cpu_table(text: str) -> str:
    """The table of ratios in cpu.md."""
    return re.search(r"^\| gpufgbg against.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0]


def gpu_table(text: str, shown: tuple[str, ...]) -> str:
    """The rows of a result that README shows."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    chosen = [row for row in rows[1:] if row[2:].startswith(shown)]
    return "\n".join([rows[0], "|---|---|---|", *chosen])


def marked(name: str, table: str) -> str:
    """A table between the comments that the next run looks for."""
    return f"<!-- {name} -->\n{table}\n<!-- end -->"


def updated(readme: str) -> str:
    """README with the tables as they are in bench/results/."""
    for name, table in (
        ("cpu", cpu_table((RESULTS / "cpu.md").read_text())),
        ("h200", gpu_table((RESULTS / "h200.md").read_text(), SHOWN)),
        ("depth", gpu_table((RESULTS / "h200_depth.md").read_text(), DEPTH_SHOWN)),
    ):
        readme = re.sub(
            rf"<!-- {name} -->.*?<!-- end -->", lambda _, n=name, t=table: marked(n, t), readme, flags=re.DOTALL
        )
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
