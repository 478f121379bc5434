"""What the machine itself can do at most: memory, PCIe, disk, matrix products. Every row is set against these."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contenders import EVENTS, Contender, Job, Offer, in_threads, started_processes
from rivals.pytorch import torch_missing
from settings import Settings

from gpufgbg.compositor import default_workers
from gpufgbg.files import sync_file_system

__all__ = ["LIMITS", "LimitWork"]

FILE_BYTES = 13_900, 1_900  # JPEG files of a composite and of its mask, in turns
_SIDE = 8192  # of matrices: much smaller ones don't keep many cores busy


class LimitWork:
    """How much of what a call does; nothing is judged but that it was done."""

    turns = 1

    def __init__(self, settings: Settings, kind: str) -> None:
        self.settings = settings
        self.kind = kind

    @property
    def size(self) -> int:
        """Bytes, files or floating-point operations of a call."""
        given = self.settings.scale.limit_bytes
        if self.kind == "disk, small files":
            return max(default_workers(), (given >> 17) // default_workers() * default_workers())
        if "matrix" in self.kind:
            return 2 * self.side**3
        return given

    @property
    def side(self) -> int:
        """Of the matrices."""
        given = self.settings.scale.limit_bytes
        if "host" in self.kind and given < 1 << 30:
            return _SIDE // (4 if given >= 64 << 20 else 32)
        return _SIDE // (8 if given < 64 << 20 else 1)

    def needs(self, device: str) -> dict[str, float]:
        """A limit needs itself."""
        return {}

    def check(self, job: Job, turn: int) -> str:
        """Let the job see to it that its work was done."""
        return str(job.output(turn))


def _unjudged(turn: int) -> str:
    return ""


def host_write(work: LimitWork, device: str, workers: int) -> Job:
    """All cores fill an array."""
    memory = np.empty(work.size, np.uint8)

    def run(turn: int) -> None:
        in_threads(lambda start, stop: memory[start:stop].fill(turn + 1), work.size, 8 << 20, default_workers())

    return Job(run, _unjudged)


def host_copy(work: LimitWork, device: str, workers: int) -> Job:
    """All cores copy one half of an array to the other; bytes read and bytes written count."""
    half = work.size // 2
    memory = np.ones(2 * half, np.uint8)

    def part(start: int, stop: int) -> None:
        memory[half + start : half + stop] = memory[start:stop]

    return Job(lambda turn: in_threads(part, half, 8 << 20, default_workers()), _unjudged)


def device_write(work: LimitWork, device: str, workers: int) -> Job:
    """cudaMemset."""
    import cupy

    memory = cupy.empty(work.size, np.uint8)
    stream = cupy.cuda.get_current_stream().ptr
    return Job(
        lambda turn: cupy.cuda.runtime.memsetAsync(memory.data.ptr, 7, memory.nbytes, stream), _unjudged, EVENTS
    )


def _copied(work: LimitWork, to: int, source: int, size: int, kind: int, *held: Any) -> Job:
    import cupy

    stream = cupy.cuda.get_current_stream().ptr

    def run(turn: int, held: tuple[Any, ...] = held) -> None:
        cupy.cuda.runtime.memcpyAsync(to, source, size, kind, stream)

    return Job(run, _unjudged, EVENTS)


def device_copy(work: LimitWork, device: str, workers: int) -> Job:
    """Device to device; bytes read and bytes written count."""
    import cupy

    half = work.size // 2
    memory = cupy.empty(2 * half, np.uint8)
    return _copied(
        work, memory.data.ptr, memory.data.ptr + half, half, cupy.cuda.runtime.memcpyDeviceToDevice, memory
    )


def to_host(work: LimitWork, device: str, workers: int) -> Job:
    """Into pinned memory."""
    import cupy

    pinned, memory = cupy.cuda.alloc_pinned_memory(work.size), cupy.empty(work.size, np.uint8)
    kind = cupy.cuda.runtime.memcpyDeviceToHost
    return _copied(work, pinned.ptr, memory.data.ptr, work.size, kind, pinned, memory)


def to_card(work: LimitWork, device: str, workers: int) -> Job:
    """From pinned memory."""
    import cupy

    pinned, memory = cupy.cuda.alloc_pinned_memory(work.size), cupy.empty(work.size, np.uint8)
    kind = cupy.cuda.runtime.memcpyHostToDevice
    return _copied(work, memory.data.ptr, pinned.ptr, work.size, kind, pinned, memory)


def disk_write(work: LimitWork, device: str, workers: int) -> Job:
    """One file, to its fsync."""
    path = work.settings.work / "limit.bin"
    block = np.random.default_rng(0).integers(0, 256, min(work.size, 32 << 20), np.uint8).tobytes()

    def run(turn: int) -> None:
        with path.open("wb", buffering=0) as file:
            left = work.size
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())

    def written(turn: int) -> str:
        run(turn)
        assert path.stat().st_size == work.size
        return f"{work.size / 1e6:,.0f} MB written"

    return Job(run, written, close=lambda: path.unlink(missing_ok=True))


def _write_files(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    data = [np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes() for size in FILE_BYTES]
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(data[number % len(data)])


def small_files(work: LimitWork, device: str, workers: int) -> Job:
    """New files of a composite's and a mask's size in turns, one process and folder a core, to the sync."""
    root, workers = work.settings.work / "limit-files", default_workers()
    pool = started_processes(workers)
    made = iter(range(10**6))

    def run(turn: int) -> None:
        folder = root / str(next(made))
        for future in [pool.submit(_write_files, folder / str(k), work.size // workers) for k in range(workers)]:
            future.result()
        sync_file_system(folder)

    def written(turn: int) -> str:
        run(turn)
        assert sum(1 for _ in root.rglob("*.jpg")) == work.size
        return f"{work.size:,} files of {' and '.join(f'{size:,}' for size in FILE_BYTES)} bytes in turns"

    def close() -> None:
        pool.shutdown()
        shutil.rmtree(root)

    return Job(run, written, close=close)


def host_matrix(work: LimitWork, device: str, workers: int) -> Job:
    """NumPy's BLAS."""
    one, two = np.random.default_rng(0).random((2, work.side, work.side), np.float32)
    return Job(lambda turn: one @ two, _unjudged)


def half_matrix(work: LimitWork, device: str, workers: int) -> Job:
    """fp16 by PyTorch, that is cuBLAS, on random values."""
    import torch

    one, two = torch.randn((2, work.side, work.side), dtype=torch.float16, device=device)
    out = torch.empty_like(one)
    return Job(lambda turn: torch.matmul(one, two, out=out), _unjudged, EVENTS)


def eighth_matrix(work: LimitWork, device: str, workers: int) -> Job:
    """fp8 (e4m3) by PyTorch, that is cuBLAS, on random values, to fp16."""
    import torch

    one, two = (torch.randn((work.side, work.side), device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device=device)

    def run(turn: int) -> Any:
        return torch._scaled_mm(one, two.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float16)

    return Job(run, _unjudged, EVENTS)


def _limit(make: Callable[[LimitWork, str, int], Job], device: str, modules: tuple[str, ...] = ()) -> Contender:
    missing = torch_missing if "torch" in modules else lambda _: None
    return Contender(
        "this machine", modules, " ".join(modules), {"limits": (Offer(make, (device,), missing=missing),)}
    )


#: name of the limit -> (unit, contender)
LIMITS: dict[str, tuple[str, Contender]] = {
    "host memory, write": ("B", _limit(host_write, "cpu")),
    "host memory, copy": ("B", _limit(host_copy, "cpu")),
    "host fp32 matrix product": ("flop", _limit(host_matrix, "cpu")),
    "disk, write": ("B", _limit(disk_write, "cpu")),
    "disk, small files": ("files", _limit(small_files, "cpu")),
    "device memory, write": ("B", _limit(device_write, "cuda")),
    "device memory, copy": ("B", _limit(device_copy, "cuda")),
    "PCIe, to the host": ("B", _limit(to_host, "cuda")),
    "PCIe, to the card": ("B", _limit(to_card, "cuda")),
    "fp16 matrix product": ("flop", _limit(half_matrix, "cuda", ("torch",))),
    "fp8 matrix product": ("flop", _limit(eighth_matrix, "cuda", ("torch",))),
}
