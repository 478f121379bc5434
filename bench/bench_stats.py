"""`gpufgbg stats`: a whole data set of JPEG files as a process, against the CPU's sums, and DALI alone from memory.

    python bench/bench_stats.py [--dataset DIR] [--device cuda] [--out FILE]

Without --dataset, a folder tree of 99 x 99 x 40 = 392,040 composites and as many masks is made first, of built-in
pictures. The files are in the page cache where memory is large enough: they were written just before. Of a data set
that is there already, the first run may have to wait for the disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from datetime import date
from pathlib import Path

from bench_cuda import Table, device_name

from gpufgbg import Recipe, generate
from gpufgbg.compositor import default_workers
from gpufgbg.layout import KINDS
from gpufgbg.readers import StoredPicture, scan
from gpufgbg.sample_assets import write_sample_assets
from gpufgbg.statistics import statistics


def make(work: Path, pictures: int, per_pair: int) -> Path:
    """A tree of pictures x pictures x per_pair x 2 samples; one that is there already is left as it is."""
    dataset = work / f"stats_{pictures}_{per_pair}"
    folders = write_sample_assets(work / f"stats_assets_{pictures}", pictures, pictures)
    generate(dataset, *folders, recipe=Recipe(per_pair=per_pair))
    return dataset


def bench_process(table: Table, dataset: Path, device: str, repeats: int) -> None:
    """Wall time from process start to exit."""
    command = [sys.executable, "-m", "gpufgbg", "stats", str(dataset), "--device", device, "--json"]
    for run in range(1, repeats + 1):
        start = time.perf_counter()
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        took = time.perf_counter() - start
        counts = {kind: part["images"] for kind, part in found.items() if "statistics" in part}
        read = sum(part["bytes"] for part in found.values())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        table.add(
            f"stats --device {device}, {sum(counts.values()):,} pictures on disk, process start to end, run {run}",
            f"{took:.2f} s",
            f"{sum(counts.values()) / took:,.0f} images/s, {read / 1e9:.2f} GB; host memory {peak:,} MB at most",
        )


def bench_equality(table: Table, dataset: Path, device: str, work: Path, count: int) -> None:
    """Mean and std of some pictures of each kind, evenly spread, against the CPU path on the same files."""
    totals = Counter(picture.kind for picture in scan(dataset))
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for picture in scan(dataset):
            step = max(1, totals[picture.kind] // count)
            if seen[picture.kind] % step == 0:
                path = Path(folder, KINDS[picture.kind], f"{seen[picture.kind]}{Path(picture.path).suffix}")
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(picture.load())
            seen[picture.kind] += 1
        found, exact = statistics(folder, device=device), statistics(folder, device="cpu")
    for kind, part in exact.items():
        if part.moments.images:
            pairs = [(getattr(found[kind].moments, name), getattr(part.moments, name)) for name in ("mean", "std")]
            off = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]
            table.add(
                f"{kind}: greatest difference from the CPU path, {part.moments.images:,} pictures",
                f"{max(off):.1e}",
                f"mean {off[0]:.1e}, std {off[1]:.1e}; equal sums: {found[kind].moments == part.moments}",
            )


def bench_dali(table: Table, dataset: Path, device: str, count: int, forms: list[tuple[int, bool, float]]) -> None:
    """Rates of DALI's decoder alone, and of all but the disk, on files that are in this process's memory."""
    from gpufgbg.decoding_dali import DaliDecoder, why_not

    if reason := why_not():
        table.add("DALI alone", "absent", reason)
        return
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else None
    for kind, channels in (("composite", 3), ("composite_mask", 1)):
        chosen = list(itertools.islice((p for p in scan(dataset) if p.kind == kind), count))
        if not chosen:
            continue
        files = [picture.load() for picture in chosen]
        kept = [StoredPicture(p.kind, p.place, p.path, lambda f=f: f) for p, f in zip(chosen, files, strict=True)]
        for batch, fancy, hardware in forms:
            decoder = DaliDecoder(index, default_workers(), batch, fancy, hardware)
            what = f"{kind}, batch {batch:,}"
            if index is not None:
                what += f", {'' if fancy else 'no '}fancy upsampling, hardware {hardware:.2f}"
            took = min(dali_alone(decoder, channels, files, batch) for _ in range(2))
            table.add(f"DALI alone, from memory: {what}", f"{len(files) / took:,.0f} images/s")
            start = time.perf_counter()
            decoded = sum(len(part.pictures) for part in decoder.decode(kept))
            took = time.perf_counter() - start
            assert decoded == len(kept)
            table.add(f"headers, DALI and sums, from memory: {what}", f"{decoded / took:,.0f} images/s")


def dali_alone(decoder, channels: int, files: list[bytes], batch: int) -> float:
    """Seconds to decode whole batches through the decoder's own pipeline, three under way at a time."""
    from gpufgbg.plain_jpeg import plain_jpegs

    pixels = [width * height for width, height, _ in filter(None, plain_jpegs(files))]
    assert len(pixels) == len(files), "expected baseline JPEG files alone"
    pipeline, pending = decoder.pipeline(channels), deque()
    start = time.perf_counter()
    for at in range(0, len(files), batch):
        pipeline.feed(files[at : at + batch])
        pending.append(sum(pixels[at : at + batch]))
        if len(pending) > 3:
            pipeline.take(pending.popleft())
    while pending:
        pipeline.take(pending.popleft())
    decoder.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a data set of any form that stats reads (default: made here)")
    parser.add_argument("--pictures", type=int, default=99, help="backgrounds, and foregrounds, of the set made here")
    parser.add_argument("--per-pair", type=int, default=20, help="repetitions of the set made here")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--slice", type=int, default=4000, help="pictures of a kind compared with the CPU's")
    parser.add_argument("--in-memory", type=int, default=40_000, help="pictures of a kind for DALI alone")
    parser.add_argument("--sweep", action="store_true", help="DALI alone with other batches and settings too")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    table = Table()
    dataset = given.dataset or make(given.work, given.pictures, given.per_pair)
    bench_process(table, dataset, given.device, given.repeats)
    bench_equality(table, dataset, given.device, given.work, given.slice)
    forms = [(1024, True, 0.65)]
    if given.sweep:
        forms += [(512, True, 0.65), (2048, True, 0.65), (1024, False, 0.65), (1024, True, 0.9), (1024, True, 0.0)]
    bench_dali(table, dataset, given.device, given.in_memory, forms)
    if given.out:
        card = f"{device_name()}, " if given.device.startswith("cuda") else ""
        machine = f"{card}{default_workers()} cores, Linux {platform.release()}, Python {platform.python_version()}"
        given.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python bench/bench_stats.py {' '.join(sys.argv[1:])}".strip()
        given.out.write_text(table.markdown(f"{machine}, {date.today()}: `{command}`"))


if __name__ == "__main__":
    main()
