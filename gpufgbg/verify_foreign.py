"""Is a data set that gpufgbg did not make whole? Its pictures and names alone tell: there is no record of it.

Every picture decodes; composites, masks and depth maps of one name are all there; the pictures of a kind have one
size; and label files, where there are any, name the composites that are there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import PurePosixPath

from gpufgbg.decoding import Decoder
from gpufgbg.layout import KINDS, SAMPLE_KINDS
from gpufgbg.readers import StoredPicture, scan, scan_labels
from gpufgbg.verify_report import NAMED, Faults, VerifyReport

__all__ = ["verify_foreign"]

_CUT_OUTS = ("foreground", "foreground_mask")  # of any size
_Size = tuple[int, int]


def verify_foreign(
    path: str | os.PathLike[str], decoder: Decoder, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check a data set of any origin by what it holds.

    Parameters
    ----------
    path : path
        A folder tree, or zip or tar files, with the original's folder names; see `gpufgbg.readers.scan`.
    decoder : Decoder
    progress : callable, optional
        Called with (composites checked, 0).

    Raises
    ------
    DatasetError
        There is no data set at the path, or an archive is damaged.
    """
    report = VerifyReport()
    samples, sizes = _Samples(report), _Sizes(report)
    undecodable = Faults(report, "pictures can't be decoded")
    with closing(decoder.decode(scan(path))) as batches:
        for batch in batches:
            report.files += len(batch.pictures)
            for fault in batch.faults:
                undecodable.add(fault)
            for picture, form in zip(batch.pictures, batch.forms, strict=True):
                samples.add(picture)
                if form is not None:
                    report.decoded += 1
                    sizes.add(picture, form[:2])
            report.samples = samples.counts["composite"]
            if progress:
                progress(report.samples, 0)
    undecodable.close()
    sizes.check()
    samples.check()
    _check_labels(report, path, samples, sizes.usual("composite"))
    return report


class _Samples:
    """Which pictures each sample has; a number a sample is all that is kept."""

    def __init__(self, report: VerifyReport) -> None:
        self._report = report
        self._found: dict[str, int] = {}  # key -> a bit for each of SAMPLE_KINDS
        self._twice = Faults(report, "pictures of a name that another has")
        self.counts: Counter[str] = Counter()

    def add(self, picture: StoredPicture) -> None:
        """Take note of a picture."""
        if picture.kind not in SAMPLE_KINDS:
            return
        bit, key = 1 << SAMPLE_KINDS.index(picture.kind), picture.key
        had = self._found.get(key, 0)
        if had & bit:
            self._twice.add(f"{picture.name}: another picture has this name but for its ending")
        else:
            self._found[key] = had | bit
            self.counts[picture.kind] += 1

    def composites(self) -> set[str]:
        """Names of the composites, without folder and ending."""
        return {key.rpartition("/")[2] for key, found in self._found.items() if found & 1}

    def check(self) -> None:
        """Each sample has a picture of every kind that any sample has."""
        self._twice.close()
        missing = Faults(self._report, "pictures are missing")
        there = [kind for kind in SAMPLE_KINDS if self.counts[kind]]
        whole = sum(1 << SAMPLE_KINDS.index(kind) for kind in there)
        for key, found in sorted((key, found) for key, found in self._found.items() if found != whole):
            has = [kind for kind in there if found >> SAMPLE_KINDS.index(kind) & 1]
            for kind in there:
                if kind not in has:
                    missing.add(f"{KINDS[kind]}/{key}: missing, {KINDS[has[0]]}/ has it")
        missing.close()


class _Sizes:
    """Sizes of the pictures of each kind, and the first names of each size."""

    def __init__(self, report: VerifyReport) -> None:
        self._report = report
        self._counts: dict[str, Counter[_Size]] = {}
        self._names: dict[tuple[str, _Size], list[str]] = {}

    def add(self, picture: StoredPicture, size: _Size) -> None:
        """Take note of a picture."""
        if picture.kind in _CUT_OUTS:
            return
        self._counts.setdefault(picture.kind, Counter())[size] += 1
        names = self._names.setdefault((picture.kind, size), [])
        if len(names) < NAMED:
            names.append(picture.name)

    def usual(self, kind: str) -> _Size | None:
        """The size of most pictures of a kind."""
        counts = self._counts.get(kind)
        return counts.most_common(1)[0][0] if counts else None

    def check(self) -> None:
        """The pictures of each kind have one size."""
        for kind in KINDS:
            usual = self.usual(kind)
            if usual is None:
                continue
            odd = Faults(self._report, f"pictures in {KINDS[kind]}/ have another size than most")
            for size, count in sorted(self._counts[kind].items()):
                if size == usual:
                    continue
                names = sorted(self._names[kind, size])
                for i, name in enumerate(names):
                    here = count - len(names) + 1 if i == len(names) - 1 else 1
                    odd.add(f"{name}: {size[0]}x{size[1]}, most in {KINDS[kind]}/ are {usual[0]}x{usual[1]}", here)
            odd.close()


def _check_labels(report: VerifyReport, path: str | os.PathLike[str], samples: _Samples, frame: _Size | None) -> None:
    """The lines of label files are of composites that are there, one each, with a corner inside the frame."""
    wrong = Faults(report, "lines of labels are wrong")
    unlabelled: set[str] | None = None
    composites: set[str] = set()
    for name, content in scan_labels(path):
        report.files += 1
        if unlabelled is None:
            composites = samples.composites()
            unlabelled = set(composites)
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            problem, stem = _label_problem(line, frame)
            if problem is None and stem not in unlabelled:
                problem = "labelled twice" if stem in composites else f"no such picture in {KINDS['composite']}/"
                problem = f"{line.split(chr(9))[0]}: {problem}"
            unlabelled.discard(stem)
            if problem is not None:
                wrong.add(f"{name}: line {number}: {problem}")
    wrong.close()
    missing = Faults(report, "composites have no label")
    for stem in sorted(unlabelled or ()):
        missing.add(f"{KINDS['composite']}/: {stem} has no label")
    missing.close()


def _label_problem(line: str, frame: _Size | None) -> tuple[str | None, str]:
    """What is wrong with a line of labels, and the picture's name without its ending."""
    columns = line.split("\t")
    stem = PurePosixPath(columns[0].strip()).stem
    try:
        x, y = (int(column) for column in columns[1:3])
    except ValueError:
        return f"{line[:80]!r}: expected NAME, tab, X, tab, Y", stem
    if frame is not None and not (0 <= x < frame[0] and 0 <= y < frame[1]):
        return f"{columns[0]}: corner {x}, {y} lies outside the frame of {frame[0]}x{frame[1]}", stem
    return None, stem
