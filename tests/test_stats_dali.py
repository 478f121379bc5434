"""Decoding by DALI against Pillow: DALI's CPU decoder where it is installed, and a card where there is one.

DALI's CPU decoder must give Pillow's own pixels, so sums are equal. A card's differ by a grey level here and there:
mean and std within 0.0005. Where no DALI is, what every machine can tell about JPEG files is still tested.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from conftest import smooth
from PIL import Image
from test_helpers import ready_helpers

from gpufgbg import DatasetError, GpufgbgWarning, Moments, Recipe, decoding, decoding_dali, generate, mean_std
from gpufgbg.backends import cuda
from gpufgbg.decoding import CpuDecoder
from gpufgbg.decoding_dali import DaliDecoder
from gpufgbg.plain_jpeg import plain_jpegs
from gpufgbg.readers import StoredPicture
from gpufgbg.statistics import statistics
from gpufgbg.verify import verify

CARD_TOLERANCE = 5e-4
RECIPE = Recipe(size=(64, 48), foreground_height=20, per_pair=2)


def jpeg(width: int = 64, height: int = 48, channels: int = 3, seed: int = 0, **options) -> bytes:
    pixels = smooth(np.random.default_rng(seed), width, height, channels)
    file = io.BytesIO()
    Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(file, "JPEG", **options)
    return file.getvalue()


# -- which files are plain ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "shape"),
    {
        "420": (jpeg(), (64, 48, 3)),
        "422": (jpeg(subsampling="4:2:2"), (64, 48, 3)),
        "444, best": (jpeg(subsampling="4:4:4", quality=100, optimize=True), (64, 48, 3)),
        "grey": (jpeg(33, 70, 1), (33, 70, 1)),
        "restart markers": (jpeg(restart_marker_blocks=2), (64, 48, 3)),
        "a comment that looks like markers": (jpeg(comment=b"\xff\xda\0\4\xff\xc0Adobe\xff\xd9"), (64, 48, 3)),
        "progressive": (jpeg(progressive=True), None),
        "an Adobe segment": (jpeg()[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1" + jpeg()[2:], None),
        "RGB": (bytes(imagecodecs.jpeg8_encode(np.zeros((8, 8, 3), np.uint8), outcolorspace="RGB")), None),
        "something behind it": (jpeg() + b"\0", None),
        "no end": (jpeg()[:-2], None),
        "half": (jpeg()[: len(jpeg()) // 2], None),
        "cut off, with an end": (jpeg()[:-100] + b"\xff\xd9", (64, 48, 3)),
        "a marker in the scan": (jpeg()[:-40] + b"\xff\x13" + jpeg()[-38:], None),
        "two files": (jpeg() + jpeg(), None),
        "nothing": (b"", None),
        "a start": (b"\xff\xd8", None),
        "start and end": (b"\xff\xd8\xff\xd9", None),
        "text": (b"hello, world", None),
    }.values(),
)  # fmt: skip
def test_plain_files(data, shape):
    assert plain_jpegs([data]) == [shape]
    assert plain_jpegs([jpeg(8, 9), data, jpeg(8, 9, 1)]) == [(8, 9, 3), shape, (8, 9, 1)]


def test_files_cut_anywhere_are_not_plain_and_nothing_is_read_behind_them():
    data = jpeg(40, 30)
    for length in range(len(data)):
        assert plain_jpegs([data[:length], data]) == [None, (40, 30, 3)], length
    assert plain_jpegs([]) == []


def test_damaged_headers_never_give_another_shape_than_pillow():
    rng = np.random.default_rng(0)
    data = jpeg(40, 30)
    compared = 0
    for _ in range(1000):
        changed = bytearray(data)
        changed[int(rng.integers(0, data.index(b"\xff\xda")))] = int(rng.integers(0, 256))
        (shape,) = plain_jpegs([bytes(changed)])
        try:
            with Image.open(io.BytesIO(changed)) as image:
                found = (*image.size, len(image.getbands()))
        except (OSError, SyntaxError):
            continue
        compared += shape is not None
        assert shape in (None, found)
    assert compared > 500


def test_pictures_too_large_to_decode_safely_are_not_plain():
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert plain_jpegs([bytes(data)]) == [None]


# -- decoders -------------------------------------------------------------------------------------------


def made(where: str) -> DaliDecoder:
    pytest.importorskip("nvidia.dali")
    if where == "dali":
        return DaliDecoder(None, 2)
    if cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    return DaliDecoder(0, 4)


@pytest.fixture(scope="module", params=["dali", "cuda"])
def dali(request) -> DaliDecoder:
    """DALI on the CPU, and on a card."""
    return made(request.param)


@pytest.fixture
def used(dali, monkeypatch) -> DaliDecoder:
    """DALI's decoder in place of whatever this machine would take."""
    monkeypatch.setattr(decoding, "select", lambda device, workers: dali)
    return dali


def assert_near(found: Moments, expected: Moments, decoder: DaliDecoder) -> None:
    if decoder.name == "cpu":
        assert found == expected
        return
    assert (found.images, found.pixels) == (expected.images, expected.pixels)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=CARD_TOLERANCE)
    np.testing.assert_allclose(found.std, expected.std, rtol=0, atol=CARD_TOLERANCE)


def by_pillow(files: list[bytes], mode: str) -> Moments:
    """Of 16 bits, which `convert` cuts off at 255, the upper byte."""
    images = [Image.open(io.BytesIO(file)) for file in files]
    images = [Image.fromarray((np.asarray(i) >> 8).astype(np.uint8)) if i.mode == "I;16" else i for i in images]
    return Moments.total(Moments.of(np.asarray(image.convert(mode))[None]) for image in images)


def stored(files: list[bytes], kind: str = "composite") -> list[StoredPicture]:
    return [StoredPicture(kind, "", f"fg_bg/{i:03d}.jpg", lambda f=file: f) for i, file in enumerate(files)]


def decoded(decoder, pictures: list[StoredPicture]) -> tuple[Moments, dict[str, object], list[str]]:
    """Sums, forms by path, faults."""
    batches = list(decoder.decode(pictures))
    forms = {p.path: f for batch in batches for p, f in zip(batch.pictures, batch.forms, strict=True)}
    assert sorted(forms) == [picture.path for picture in pictures]
    assert all(sum(form is None for form in b.forms) == len(b.faults) for b in batches)
    return (
        Moments.total(batch.moments for batch in batches),
        forms,
        sorted(fault for batch in batches for fault in batch.faults),
    )


@pytest.mark.parametrize(("sink", "helped"), [("tree", False), ("tree", True), ("zip", False), ("tar", True)])
def test_data_sets_of_ours(folders, tmp_path, used, sink, helped, monkeypatch):
    if helped:
        monkeypatch.setattr(decoding_dali, "ONE_LOCK", 1)
        monkeypatch.setattr(decoding_dali, "Helpers", ready_helpers)
    generate(tmp_path / "set", **folders, recipe=RECIPE, sink=sink, device="cpu")
    found = statistics(tmp_path / "set", 2)
    exact = reference(tmp_path / "set")
    assert list(found) == list(exact)
    for kind, part in found.items():
        assert (part.images, part.size_bytes, part.forms) == (
            exact[kind].images, exact[kind].size_bytes, exact[kind].forms,
        )  # fmt: skip
        assert_near(part.moments, exact[kind].moments, used)
    report = verify(tmp_path / "set", decode=True)
    assert (report.decoded, report.files, report.faults) == (96, 96, [])
    assert_near(mean_std(tmp_path / "set", "composite"), exact["composite"].moments, used)


def reference(path: Path):
    """The CPU's statistics, whatever `decoding.select` is replaced by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "select", lambda device, workers: CpuDecoder(2))
        return statistics(path, 2)


def save(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def oddities() -> dict[str, bytes]:
    """A data set of another origin, with nearly everything that a file called picture may be."""
    rng = np.random.default_rng(3)
    colour = Image.fromarray(smooth(rng, 61, 47, 3))
    grey = Image.fromarray(smooth(rng, 61, 47, 1)[..., 0])
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))
    soft = colour.copy()
    soft.putalpha(grey)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "bg/bg_00.png": save(colour.quantize(16), "PNG"),
        "bg/bg_01.jpg": save(colour, "JPEG"),
        "bg/bg_02.png": save(soft, "PNG"),
        "fg/fg_00.png": save(soft, "PNG"),
        "fg_bg/bg_00/a.jpg": jpeg(61, 47, 3, 1),
        "fg_bg/bg_00/b.jpg": jpeg(200, 20, 3, 2, subsampling="4:4:4", quality=95),
        "fg_bg/bg_00/c.jpg": jpeg(1, 1, 3, 3),
        "fg_bg/bg_00/d.jpg": jpeg(61, 47, 3, 4, progressive=True),
        "fg_bg/bg_00/e.jpg": save(colour.convert("CMYK"), "JPEG"),
        "fg_bg/bg_00/f.jpg": save(grey, "JPEG"),
        "fg_bg/bg_00/g.jpg": save(colour, "JPEG", exif=rotated),
        "fg_bg/bg_00/h.webp": save(colour, "WEBP", lossless=True),
        "fg_bg/bg_00/i.jpg": jpeg(17, 3, 3, 5, restart_marker_blocks=1) + b"\0\0\0",
        "fg_bg/bg_00/j.jpg": jpeg(90, 90, 3, 6, subsampling="4:2:2"),
        "fg_bg_masks/bg_00/a.jpg": save(colour, "JPEG"),
        "fg_bg_masks/bg_00/b.png": save(grey.convert("LA"), "PNG"),
        "fg_bg_masks/bg_00/c.png": save(grey.convert("1"), "PNG"),
        "fg_bg_masks/bg_00/d.png": save(deep, "PNG"),
        "fg_bg_masks/bg_00/e.jpg": save(grey, "JPEG"),
        "fg_bg_depth/bg_00/a.bmp": save(grey, "BMP"),
        "fg_bg_depth/bg_00/b.tif": save(grey, "TIFF"),
        "fg_bg_depth/bg_00/c.jpg": save(grey, "JPEG", quality=30),
    }


@pytest.mark.parametrize("form", ["tree", "stored", "deflated", "tar"])
def test_a_data_set_of_another_origin(tmp_path, used, oddities, form):
    root = tmp_path / "download"
    for name, data in oddities.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    path = root
    if form == "tar":
        path = tmp_path / "set.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(root, "x")
    elif form != "tree":
        path = tmp_path / "set.zip"
        method = zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in oddities.items():
                archive.writestr(f"x/{name}", data)
    found, exact = statistics(path, 2), reference(path)
    for kind, folder, mode in (
        ("background", "bg", "RGB"),
        ("composite", "fg_bg", "RGB"),
        ("composite_mask", "fg_bg_masks", "L"),
        ("depth", "fg_bg_depth", "L"),
    ):
        files = [data for name, data in oddities.items() if name.startswith(f"{folder}/")]
        assert found[kind].forms == exact[kind].forms
        assert (found[kind].images, found[kind].size_bytes) == (len(files), sum(map(len, files)))
        assert exact[kind].moments == by_pillow(files, mode)
        assert_near(found[kind].moments, exact[kind].moments, used)


def test_many_batches_of_changing_sizes(dali):
    """More batches than are under way at a time, of both kinds, in turns as a tar file has them."""
    composites = [jpeg(16 + 7 * (i % 9), 8 + 5 * (i % 11), 3, i) for i in range(600)]
    masks = [jpeg(30, 20 + i % 3, 1, i) for i in range(600)]
    mixed = [p for pair in zip(stored(composites), stored(masks, "composite_mask"), strict=True) for p in pair]
    batches = list(dali.decode(iter(mixed)))
    for kind, files, mode in (("composite", composites, "RGB"), ("composite_mask", masks, "L")):
        found = Moments.total(batch.moments for batch in batches if batch.kind == kind)
        assert_near(found, by_pillow(files, mode), dali)


def test_pictures_larger_than_a_batch_may_be(dali, monkeypatch):
    monkeypatch.setattr("gpufgbg.decoding_dali._DECODED_BYTES", 100_000)
    monkeypatch.setattr("gpufgbg.decoding_dali._ENCODED_BYTES", 5_000)
    files = [jpeg(200, 180, 3, i) for i in range(12)]
    found, _, faults = decoded(dali, stored(files))
    assert faults == []
    assert_near(found, by_pillow(files, "RGB"), dali)


def test_a_batch_that_lies_in_pieces_is_counted_all_the_same():
    decoder = made("dali")
    from nvidia.dali.tensors import TensorListCPU

    class InPieces:
        def __init__(self, pipeline):
            self.feed_input, self.schedule_run, self._outputs = (
                pipeline.feed_input, pipeline.schedule_run, pipeline.outputs,
            )  # fmt: skip

        def outputs(self, stream):
            (batch,) = self._outputs(stream)
            return (TensorListCPU([batch[i] for i in range(len(batch))], contiguous=False),)

    for channels, kind, mode in ((3, "composite", "RGB"), (1, "depth", "L")):
        pipeline = decoder.pipeline(channels)
        pipeline._pipeline = InPieces(pipeline._pipeline)
        files = [jpeg(30, 20 + i % 3, channels, i) for i in range(20)]
        assert decoded(decoder, stored(files, kind))[0] == by_pillow(files, mode)
        assert pipeline.failure is None


def without_tables(data: bytes) -> bytes:
    """A JPEG file that looks whole and can't be decoded: its quantisation tables are gone."""
    while (at := data.find(b"\xff\xdb")) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return data


@pytest.mark.parametrize("where", ["dali", "cuda"])
def test_damaged_pictures_are_named_and_the_others_are_counted(where):
    decoder = made(where)
    good = [jpeg(40, 30, 3, i) for i in range(300)]
    files = list(good)
    files[7], files[150], files[299] = good[7][:-30], b"", without_tables(good[299])
    assert plain_jpegs([files[299]]) == [(40, 30, 3)]
    for _ in range(2):  # the decoder still works after a failure
        found, forms, faults = decoded(decoder, stored(files))
        assert [fault.partition(":")[0] for fault in faults] == [f"fg_bg/{i:03d}.jpg" for i in (7, 150, 299)]
        assert all("\n" not in fault and "DALI" not in fault for fault in faults)
        assert {path for path, form in forms.items() if form is None} == {f"fg_bg/{i:03d}.jpg" for i in (7, 150, 299)}
        assert_near(found, by_pillow([file for file in files if file in good], "RGB"), decoder)


@pytest.mark.parametrize("where", ["dali", "cuda"])
def test_after_too_many_failures_the_cpu_decodes_the_rest(where, monkeypatch):
    monkeypatch.setattr("gpufgbg.decoding_dali._PATIENCE", 2)
    decoder = made(where)
    bad = without_tables(jpeg(40, 30))
    for _ in range(2):
        decoded(decoder, stored([bad]))
    with pytest.warns(GpufgbgWarning, match="DALI has failed 2 times on .*; the CPU decodes the rest"):
        found, _, faults = decoded(decoder, stored([jpeg(40, 30), bad]))
    assert len(faults) == 1 and found == by_pillow([jpeg(40, 30)], "RGB")
    assert decoded(decoder, stored([jpeg(8, 8)]))[0] == by_pillow([jpeg(8, 8)], "RGB")


def test_stats_names_a_damaged_picture_in_one_line(tmp_path, used, run):
    for i in range(5):
        path = tmp_path / "fg_bg" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(seed=i) if i != 3 else jpeg(seed=i)[:-50])
    code, printed, error = run("stats", tmp_path)
    assert (code, printed) == (2, "") and error.splitlines()[-1].startswith("gpufgbg: error: ")
    assert "3.jpg: can't be decoded: damaged or truncated JPEG" in error
    with pytest.raises(DatasetError, match=r"3\.jpg"):
        mean_std(tmp_path, "composite")


def test_an_iterator_that_is_left_lets_go(dali):
    dali._take = 64
    batches = dali.decode(stored([jpeg(40, 30, 3, i) for i in range(640)]))
    next(batches)
    batches.close()
    files = [jpeg(40, 30, 3, 1000 + i) for i in range(64)]  # as many as the batches that were under way had
    found, _, _ = decoded(dali, stored(files))
    assert_near(found, by_pillow(files, "RGB"), dali)


def test_dali_that_is_missing_is_named_with_its_extra(tmp_path):
    """With a card that is taken for granted."""
    code = """
import sys
sys.modules["nvidia.dali"] = None
from gpufgbg import backends, cli, decoding
from gpufgbg.backends import cuda
cuda.why_not = lambda index=0: None
sys.exit(cli.main(["stats", sys.argv[1], "--device", sys.argv[2]]))
"""
    (tmp_path / "bg").mkdir()
    (tmp_path / "bg" / "a.jpg").write_bytes(jpeg())
    reason = "NVIDIA DALI is not installed (pip install 'gpufgbg[dali]')"
    done = {
        device: subprocess.run([sys.executable, "-c", code, tmp_path, device], capture_output=True, text=True)
        for device in ("cuda:3", "auto")
    }
    assert done["cuda:3"].returncode == 2
    assert done["cuda:3"].stderr == f"gpufgbg: error: device cuda:3: {reason}; or use device cpu\n"
    assert done["auto"].returncode == 0, done["auto"].stderr
    assert done["auto"].stdout.splitlines()[-1] == f"decoded on the CPU: {reason}"


# -- on a card ------------------------------------------------------------------------------------------


@pytest.fixture
def card():
    made("cuda")


def test_auto_takes_the_card(card, folders, tmp_path, run):
    generate(tmp_path / "set", **folders, recipe=RECIPE, device="cpu")
    assert decoding.select().name == "cuda:0" and decoding.why_cpu("auto") is None
    code, printed, _ = run("stats", tmp_path / "set")
    assert code == 0 and "on the CPU" not in printed
    found = json.loads(run("stats", tmp_path / "set", "--device", "cuda", "--json")[1])
    exact = json.loads(run("stats", tmp_path / "set", "--device", "cpu", "--json")[1])
    for kind, part in exact.items():
        for name in ("mean", "std") if "statistics" in part else ():
            np.testing.assert_allclose(
                found[kind]["statistics"][name], part["statistics"][name], rtol=0, atol=CARD_TOLERANCE
            )


def test_verify_renders_and_decodes_on_the_card(card, folders, tmp_path, run):
    generate(tmp_path / "set", **folders, recipe=RECIPE, device="cpu")
    code, printed, _ = run("verify", tmp_path / "set", "--rerender", 48, "--decode", "--device", "cuda")
    assert code == 0 and printed == (
        "48 samples, 96 files read, 48 samples rendered again, 96 pictures decoded: no faults\n"
    )


def test_noise_in_the_chroma_is_upsampled_as_libjpeg_does(card):
    """Without interpolation, the std of such pictures would be off in the second digit."""
    rng = np.random.default_rng(0)
    files = [
        save(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG", quality=95)
        for _ in range(100)
    ]
    decoder = made("cuda")
    found, _, _ = decoded(decoder, stored(files))
    assert_near(found, by_pillow(files, "RGB"), decoder)
