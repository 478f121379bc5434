"""Scale-out: one card against all cards of a host, and what the bookkeeping of very large data sets costs.

    python bench/bench_scale.py --only cards [--input DIR] [--depth nyu.h5] [--samples N] [--depth-samples N]
    python bench/bench_scale.py --only books,ray

``cards`` makes the same samples on card 0 alone and on all cards, each in a process of its own, without depth and,
with --depth, with it; checks that both have the same shards; and prints where the time goes and what bounds it.
``books`` measures on the CPU what docs/scale.md computes with: shards that a driver hands out and records a second,
bytes of a record, time to read the records, rows of labels a second. ``ray`` measures the first through Ray actors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from datetime import date
from pathlib import Path

import numpy as np

from gpufgbg import Moments, Plan, Recipe
from gpufgbg.labels import write_labels
from gpufgbg.manifest import Manifest, ShardRecord
from gpufgbg.recipe import Shard
from gpufgbg.sample_assets import write_sample_assets
from gpufgbg.scaleout.driver import Driver, Member
from gpufgbg.segments import SEGMENT_SHARDS, CompactingRecorder, pack_segments

ROWS: list[tuple[str, str, str]] = []


def row(what: str, figure: str, remark: str = "") -> None:
    """Print a row of the table as it is found."""
    ROWS.append((what, figure, remark))
    print(f"{what:<72} {figure:>20}  {remark}", flush=True)


# -- cards ----------------------------------------------------------------------------------------------


def generate(
    folders: list[str], out: Path, device: str, samples: int, depth: str | None
) -> tuple[dict, float, float]:
    """What a run of the command line reports as JSON, its wall seconds and its processor seconds."""
    command = [sys.executable, "-m", "gpufgbg", "generate", *folders, f"--out={out}", f"--device={device}", "--json"]
    command += ["--sink=tar", f"--samples=0:{samples}", *([f"--depth={depth}"] if depth else [])]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(result.stdout), wall, used


def bound(report: dict, cores_used: float, cores: int) -> str:
    """What the run waited for, from its timeline."""
    timeline = report["timeline"]
    total = timeline["samples"]
    parts: dict[str, list[float]] = {}
    for phase, seconds in timeline.items():
        if phase.startswith("samples: "):
            parts.setdefault(phase.partition(" (")[0].removeprefix("samples: "), []).append(seconds)
    shares = {phase: max(seconds) / total for phase, seconds in parts.items()}
    card = sum(
        shares.get(name, 0)
        for name in (
            "render and encode on the card",
            "queue the inferences",  # the card's queue being full, this waits for it too
            "wait for depth maps and encode them",
        )
    )
    waits = sum(shares.get(name, 0) for name in ("wait for a slot", "wait for a writer", "last writers"))
    commits = shares.get("last commits", 0)
    named = {"the cards": card, "processes that write": waits, "the disk's last sync": commits}
    first = max(named, key=lambda name: named[name])
    shown = ", ".join(f"{name} {share:.0%}" for name, share in named.items())
    return f"most of the time goes to {first} ({shown} of the samples' time; {cores_used:.1f} of {cores} cores busy)"


def cards(arguments: argparse.Namespace, folder: Path) -> None:
    """One card against all."""
    from gpufgbg.backends.cuda import count_devices

    count = count_devices()
    if count < 2:
        row("one card against several", "absent", f"this host has {count}")
        return
    if arguments.input:
        folders = [f"--{name}={arguments.input}/{short}" for name, short in
                   (("backgrounds", "bg"), ("foregrounds", "fg"), ("masks", "fg_mask"))]  # fmt: skip
    else:
        backgrounds, foregrounds = write_sample_assets(folder / "assets")
        folders = [f"--backgrounds={backgrounds}", f"--foregrounds={foregrounds}"]
    folders.append(f"--per-pair={arguments.per_pair}")
    kinds = [("without depth", None, arguments.samples)]
    if arguments.depth:
        kinds.append(("with depth", arguments.depth, arguments.depth_samples))
    cores = len(os.sched_getaffinity(0))
    for name, depth, samples in kinds:
        found = {}
        if depth:  # the engine is built once, outside the measurement
            generate(folders, folder / "warm", "cuda:0", 64, depth)
            shutil.rmtree(folder / "warm")
        for device in ("cuda:0", "cuda:all"):
            out = folder / device.replace(":", "-")
            report, wall, used = generate(folders, out, device, samples, depth)
            made = report["samples"]
            seconds = report["timeline"]["samples"]
            row(
                f"{name}: {made:,} samples on {device}",
                f"{wall:.1f} s",
                f"{made / wall:,.0f}/s; {made / seconds:,.0f}/s while samples are made",
            )
            moved = sum(report["transferred"].values())
            files = sum(report["bytes"].get(kind, 0) for kind in ("composite", "composite_mask", "depth"))
            remark = f"{files / 1e9:.3f} GB of JPEG files; {100 * (moved - files) / files:.3f} % more"
            row(f"{name}, {device}: from the cards to the host", f"{moved / 1e9:.3f} GB", remark)
            for phase, took in report["timeline"].items():
                row(f"{name}, {device}: {phase}", f"{took:.2f} s")
            row(f"{name}, {device}: what bounds it", "", bound(report, used / wall, cores))
            shards = json.loads((out / "dataset.json").read_text())["shards"]
            found[device] = (wall, seconds, shards)
            shutil.rmtree(out)
        one, several = found["cuda:0"], found["cuda:all"]
        row(f"{name}: {count} cards against one, whole process", f"{one[0] / several[0]:.2f} times")
        row(f"{name}: {count} cards against one, while samples are made", f"{one[1] / several[1]:.2f} times")
        row(f"{name}: shards' checksums", "the same" if one[2] == several[2] else "DIFFERENT")


# -- books ----------------------------------------------------------------------------------------------

#: 100 backgrounds and foregrounds: 20,000 million samples in 4.9 million shards
LARGE = Plan(Recipe(per_pair=1_000_000), 100, [80] * 100, [105] * 100)


def record_of(shard: Shard, rng: np.random.Generator) -> ShardRecord:
    """A record as a shard of 224x224 has it."""
    images, pixels = len(shard), len(shard) * 224 * 224

    def sums(channels: int) -> Moments:
        mean = rng.uniform(100, 150, channels)
        total, squares = (mean * pixels).astype(np.int64), (mean**2 * 1.3 * pixels).astype(np.int64)
        return Moments(images, pixels, tuple(total.tolist()), tuple(squares.tolist()))

    size = {"composite": images * 13_862 + int(rng.integers(10**6)), "composite_mask": images * 1_898}
    return ShardRecord(shard, rng.bytes(32).hex(), size, {"composite": sums(3), "composite_mask": sums(1)})


class Nobody:
    """Workers that make their shards at once, inside the driver's process."""

    def __init__(self, count: int) -> None:
        self._rng = np.random.default_rng(0)
        self._members = [Member(f"nobody {n}", None) for n in range(count)]
        self._messages: deque = deque((member, ("ready", member.name, None)) for member in self._members)

    def start(self) -> list[Member]:
        return list(self._members)

    def wait(self, timeout_s: float) -> list:
        found = list(self._messages)
        self._messages.clear()
        return found

    def send(self, member: Member, message) -> None:
        if isinstance(message, Shard):
            self._messages.append((member, ("made", len(message))))
            self._messages.append((member, ("closed", record_of(message, self._rng))))
        self._messages.append((member, ("done", {}, {}, {}) if message is None else ("next",)))

    def drop(self, member: Member) -> None:
        pass

    def replace(self, member: Member) -> None:
        pass

    def close(self) -> None:
        pass


class Nowhere:
    """Records nothing."""

    out = Path()

    def record(self, records) -> None:
        list(records)


def claims(name: str, crew, recorder, shards: int, folder: Path) -> None:
    """A driver's shards a second."""
    gap = Shard(0, LARGE.cell_at(shards).start)
    driver = Driver(crew, LARGE, recorder, False)
    folder.mkdir(parents=True, exist_ok=True)
    driver.start()
    begun = time.perf_counter()
    driver.run([gap], folder, lambda count: None, None)
    took = time.perf_counter() - begun
    driver.close()
    row(f"a driver: shards handed out and recorded, {name}", f"{shards / took:,.0f}/s", f"{shards:,} in {took:.1f} s")


def books(folder: Path) -> None:
    """Claims, records, labels."""
    claims("64 workers, recording nothing", Nobody(64), Nowhere(), 20_000, folder / "nothing")
    manifest = Manifest(folder / "disk")
    with manifest.locked():
        pass
    recorder = CompactingRecorder(manifest, LARGE)
    claims("64 workers, records on the disk", Nobody(64), recorder, 20_000, folder / "run")
    rng = np.random.default_rng(0)
    manifest = Manifest(folder / "segment")
    shards = list(LARGE.shards(Shard(0, LARGE.cell_at(SEGMENT_SHARDS).start)))
    records = [record_of(shard, rng) for shard in shards]
    with manifest.locked():
        begun = time.perf_counter()
        manifest.record(records)
        row("4,096 records written at once", f"{time.perf_counter() - begun:.2f} s")
        single = sum(path.stat().st_size for path in (manifest.state / "shards").iterdir()) / len(records)
        begun = time.perf_counter()
        found = manifest.records()
        row("4,096 records read", f"{time.perf_counter() - begun:.2f} s", f"{single:,.0f} bytes each")
        begun = time.perf_counter()
        pack_segments(manifest, LARGE, found)
        row("4,096 records packed into a segment", f"{time.perf_counter() - begun:.2f} s")
    (listed,) = (manifest.state / "segments").iterdir()
    (summary,) = (manifest.state / "shards").iterdir()
    row("a segment of 4,096 shards: its record", f"{summary.stat().st_size:,} bytes")
    row(
        "a segment of 4,096 shards: its list",
        f"{listed.stat().st_size:,} bytes",
        f"{listed.stat().st_size / SEGMENT_SHARDS:.0f} a shard",
    )
    many = Manifest(folder / "many")
    length = len(found) * len(shards[0])
    count = 40_000_000_000 // (SEGMENT_SHARDS * len(shards[0]))
    with many.locked():
        summaries = Manifest(folder / "segment").records()[0]
        many.record(
            ShardRecord(Shard(n * length, (n + 1) * length), summaries.checksum, summaries.size_bytes,
                        summaries.moments, shards=SEGMENT_SHARDS)
            for n in range(count)
        )  # fmt: skip
    begun = time.perf_counter()
    read = many.records()
    total = Moments.total(record.moments["composite"] for record in read)
    row(
        f"records of 40,000 million samples read and added up ({count:,} segments)",
        f"{time.perf_counter() - begun:.2f} s",
        f"{total.images:,} composites",
    )
    samples = 2_000_000
    begun = time.perf_counter()
    write_labels(folder / "labels", LARGE, np.zeros(100, np.int32), [Shard(0, samples)])
    took = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in (folder / "labels").rglob("*") if path.is_file())
    row("label files", f"{samples / took:,.0f} rows/s", f"one process; {size / samples:.0f} bytes a sample")


def through_ray(folder: Path) -> None:
    """The driver with Ray actors that make their shards at once."""
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ImportError:
        row("a driver with Ray actors", "absent", "Ray is not installed")
        return
    from gpufgbg.scaleout import cluster
    from gpufgbg.scaleout.worker import Job

    path = str(Path(__file__).parent)

    class Idle(cluster._Actor):  # in a function, so that Ray sends it by value
        def __init__(self, job, device: str) -> None:
            import threading

            self._mailbox = cluster._Mailbox()
            threading.Thread(target=self._serve, daemon=True).start()

        def _serve(self) -> None:
            sys.path.insert(0, path)
            from bench_scale import record_of

            rng = np.random.default_rng(0)
            box = self._mailbox
            box.send(("ready", "idle", None))
            while True:
                message = box.recv()
                if isinstance(message, Shard):
                    box.send(("made", len(message)))
                    box.send(("closed", record_of(message, rng)))
                box.send(("done", {}, {}, {}) if message is None else ("next",))

    machines = 3
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(machines - 1):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    cluster._Actor = Idle  # type: ignore[misc]
    job = Job(None, Recipe(), "tar", folder, 1)  # type: ignore[arg-type]
    try:
        with cluster.connected(found.address):
            crew = cluster.RayCrew(job)
            claims(f"{machines} Ray actors, recording nothing", crew, Nowhere(), 3_000, folder / "ray")
    finally:
        found.shutdown()
        del ray


def main() -> None:
    """Measure what --only names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cards,books,ray", help="of cards, books, ray (default: all)")
    parser.add_argument("--input", metavar="DIR", help="folder with bg/, fg/ and fg_mask/ (default: built-in)")
    parser.add_argument("--depth", metavar="FILE", help="weights: measure with depth too")
    parser.add_argument("--per-pair", type=int, default=20)
    parser.add_argument("--samples", type=int, default=392_040, help="without depth")
    parser.add_argument("--depth-samples", type=int, default=98_010)
    parser.add_argument("--folder", type=Path, help="where data sets are made (default: a temporary one)")
    parser.add_argument("--report", type=Path, metavar="MD", help="write the table here too")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=arguments.folder) as name:
        folder = Path(name)
        if "cards" in only:
            cards(arguments, folder)
        if "books" in only:
            books(folder)
        if "ray" in only:
            through_ray(folder)
    head = (
        f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, {date.today()}: `python {' '.join(sys.argv)}`"
    )
    lines = [head, "", "| what | figure | remark |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in ROWS)]
    text = "\n".join(lines) + "\n"
    if arguments.report:
        arguments.report.write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
