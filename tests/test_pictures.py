"""Reading: every kind of picture that people have, against its pixels as the test wrote them."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import smooth
from oracle import jpeg
from PIL import Image

from gpufgbg import InputError, Recipe, prepare
from gpufgbg.pictures import PictureError, _start_of_frame, has_end, list_pictures, quiet_decoding, read_picture

WIDTH, HEIGHT = 9, 6
_RNG = np.random.default_rng(11)
COLOUR = smooth(_RNG, WIDTH, HEIGHT, 3)
GREY = COLOUR[..., 0]
ALPHA = np.linspace(0, 255, WIDTH * HEIGHT).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
CUTOUT = np.dstack([COLOUR, ALPHA])
WIDE = _RNG.integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(np.uint16)
WIDE[0, 1] = WIDE[0, 0] ^ 1  # differs from the key in the lower bytes alone


def encoded(pixels: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """A file as Pillow writes it."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(depth: int, colour_type: int, samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, because Pillow writes few of the kinds that exist. ``samples``: (height, width[, channels])."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        lines = [np.packbits(row).tobytes() for row in bits.reshape(height, -1).astype(np.uint8)]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
        + chunk(b"IEND", b"")
    )


def tiff(samples: np.ndarray, photometric: int, extra: int | None = None, order: str = "<") -> bytes:
    """An uncompressed TIFF by hand. ``samples``: (height, width, channels) of 8 or 16 bits."""
    height, width, channels = samples.shape
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = [8 * samples.itemsize] * channels
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [channels],
        278: [height], 279: [len(pixels)],
    }  # fmt: skip
    if extra is not None:
        tags[338] = [extra]
    end = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [end + 2 * channels]
    entries = b""
    for tag, values in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}H", *values)
        where = struct.pack(f"{order}I", end) if len(data) > 4 else data.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + where
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + b"\0\0\0\0"
    return head + struct.pack(f"{order}{channels}H", *bits) + pixels


def bmp_with_alpha(pixels: np.ndarray) -> bytes:
    """A 32-bit BMP whose header (version 4) gives the alpha's place."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    size = (108, pixels.shape[1], -pixels.shape[0], 1, 32, 3, pixels.size, 0, 0, 0, 0)
    head = struct.pack("<IiiHHIIiiII", *size) + masks + bytes(52)
    data = pixels[..., [2, 1, 0, 3]].tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data


def decoded(data: bytes, mode: str) -> np.ndarray:
    """What plain Pillow makes of a file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def keyed(colours: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """RGBA of ``colours``, transparent where ``samples`` equal the first of them."""
    flat = samples.reshape(HEIGHT, WIDTH, -1)
    alpha = np.where((flat == flat[0, 0]).all(axis=-1), 0, 255).astype(np.uint8)
    return np.dstack([colours if colours.ndim == 3 else np.dstack([colours] * 3), alpha])


def key(samples: np.ndarray) -> tuple[bytes, bytes]:
    """The tRNS chunk that names the first of ``samples``."""
    return b"tRNS", b"".join(struct.pack(">H", int(v)) for v in samples.reshape(HEIGHT, WIDTH, -1)[0, 0])


def kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name -> (file, its pixels: grey, RGB or RGBA)."""
    made: dict[str, tuple[bytes, np.ndarray]] = {}
    options = {"baseline": {}, "444": {"subsampling": "4:4:4"}, "progressive": {"progressive": True}}
    for name, more in options.items():
        data = encoded(COLOUR, "JPEG", **more)
        made[f"{name}.jpg"] = data, decoded(data, "RGB")
    data = encoded(GREY, "JPEG")
    made["grey.jpg"] = data, decoded(data, "L")
    data = encoded(cmyk(), "JPEG")
    made["cmyk.jpg"] = data, decoded(data, "RGB")
    data = encoded(COLOUR, "MPO", save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    made["camera.jpg"] = data, decoded(data, "RGB")

    palette = _RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    alphas = np.array([0, 1, 127, 128, 254], np.uint8)  # the rest is opaque
    index = (np.arange(WIDTH * HEIGHT) % 16).reshape(HEIGHT, WIDTH)
    table = np.column_stack([palette, np.append(alphas, [255] * 11)]).astype(np.uint8)
    one = np.column_stack([palette, np.where(np.arange(16) == 3, 0, 255)]).astype(np.uint8)
    plte = b"PLTE", palette.tobytes()
    for depth in (4, 8):
        made[f"palette{depth}.png"] = png(depth, 3, index, plte), palette[index]
        made[f"palette{depth}_alphas.png"] = png(depth, 3, index, plte, (b"tRNS", alphas.tobytes())), table[index]
        made[f"palette{depth}_index.png"] = png(depth, 3, index, plte, (b"tRNS", b"\xff\xff\xff\0")), one[index]
    made["palette1_alphas.png"] = (
        png(1, 3, index % 2, plte, (b"tRNS", b"\x07")),
        np.vstack([[*palette[0], 7], [*palette[1], 255]]).astype(np.uint8)[index % 2],
    )

    for depth in (1, 2, 4, 8):
        samples = GREY.astype(int) >> (8 - depth)
        grey = (samples * (255 // (2**depth - 1))).astype(np.uint8)
        made[f"grey{depth}.png"] = png(depth, 0, samples), grey
        made[f"grey{depth}_key.png"] = png(depth, 0, samples, key(samples)), keyed(grey, samples)
    high = (WIDE >> 8).astype(np.uint8)
    made["grey16.png"] = png(16, 0, WIDE[..., 0]), high[..., 0]
    made["grey16_key.png"] = png(16, 0, WIDE[..., 0], key(WIDE[..., 0])), keyed(high[..., 0], WIDE[..., 0])
    made["rgb8.png"] = png(8, 2, COLOUR), COLOUR
    made["rgb8_key.png"] = png(8, 2, COLOUR, key(COLOUR)), keyed(COLOUR, COLOUR)
    made["rgb16.png"] = png(16, 2, WIDE[..., :3]), high[..., :3]
    made["rgb16_key.png"] = png(16, 2, WIDE[..., :3], key(WIDE[..., :3])), keyed(high[..., :3], WIDE[..., :3])
    made["grey_alpha8.png"] = png(8, 4, CUTOUT[..., 2:]), CUTOUT[..., [2, 2, 2, 3]]
    made["grey_alpha16.png"] = png(16, 4, WIDE[..., 2:]), high[..., [2, 2, 2, 3]]
    made["rgba8.png"] = png(8, 6, CUTOUT), CUTOUT
    made["rgba16.png"] = png(16, 6, WIDE), high

    lossless = {"lossless": True, "exact": True}
    made["rgb.webp"] = encoded(COLOUR, "WEBP", **lossless), COLOUR
    made["rgba.webp"] = encoded(CUTOUT, "WEBP", **lossless), CUTOUT
    data = encoded(COLOUR, "WEBP", quality=80)
    made["lossy.webp"] = data, decoded(data, "RGB")

    made["24.bmp"] = encoded(COLOUR, "BMP"), COLOUR
    made["32.bmp"] = encoded(CUTOUT, "BMP"), COLOUR  # without a mask for it, the fourth byte means nothing
    made["32_alpha.bmp"] = bmp_with_alpha(CUTOUT), CUTOUT
    made["grey.bmp"] = encoded(GREY, "BMP"), GREY

    made["rgb.tif"] = encoded(COLOUR, "TIFF"), COLOUR
    made["lzw.tiff"] = encoded(CUTOUT, "TIFF", compression="tiff_lzw"), CUTOUT
    made["deflate.tif"] = encoded(GREY, "TIFF", compression="tiff_adobe_deflate"), GREY
    made["grey16.tif"] = tiff(WIDE[..., :1], 1), high[..., 0]
    made["grey16_big_endian.tif"] = tiff(WIDE[..., :1], 1, order=">"), high[..., 0]
    made["rgb16.tif"] = tiff(WIDE[..., :3], 2), high[..., :3]
    made["rgba16.tif"] = tiff(WIDE, 2, extra=2, order=">"), high
    made["grey_white_is_zero.tif"] = tiff(GREY[..., None], 0), 255 - GREY
    made["two_tone.tif"] = (
        encoded(Image.fromarray(GREY).convert("1", dither=0), "TIFF"),
        np.where(GREY > 127, 255, 0).astype(np.uint8),
    )
    data = encoded(cmyk(), "TIFF")
    made["cmyk.tif"] = data, decoded(data, "RGB")
    made["grey_alpha.tif"] = (
        encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "TIFF"),
        np.dstack([GREY, GREY, GREY, ALPHA]),
    )
    return made


def cmyk() -> Image.Image:
    """Inks of all amounts."""
    return Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(255 - CUTOUT, -1, 0)])


KINDS = kinds()
every_kind = pytest.mark.parametrize("name", KINDS)


def write(folder: Path, **files: bytes) -> Path:
    """A new folder with these files."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path, name: str, data: bytes):
    path = folder / name
    path.write_bytes(data)
    with quiet_decoding:
        return read_picture(path)


def rgb(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels[..., :3]


RECIPE = Recipe(size=(WIDTH, HEIGHT), foreground_height=HEIGHT)
A_BACKGROUND = encoded(COLOUR, "JPEG")
A_CUTOUT = encoded(CUTOUT, "PNG")
A_MASK = encoded(ALPHA, "PNG")


# -- every kind, in every role --------------------------------------------------------------------------


@every_kind
def test_pixels_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    data, expected = KINDS[name]
    picture = read(tmp_path, name, data)
    np.testing.assert_array_equal(np.asarray(picture.image), expected)
    assert picture.has_alpha == (expected.ndim == 3 and expected.shape[2] == 4)
    assert picture.data == data
    assert picture.notes == ()
    assert picture.image.info == {}


@every_kind
@pytest.mark.filterwarnings("ignore:.*transparency is not used:gpufgbg.GpufgbgWarning")
def test_as_background(name: str, tmp_path: Path) -> None:
    data, expected = KINDS[name]
    assets = prepare(
        write(tmp_path / "b", **{name: data}), write(tmp_path / "f", **{"f.png": A_CUTOUT}), recipe=RECIPE
    )
    saved = jpeg(Image.fromarray(rgb(expected)), quality=95, subsampling="444", optimize=False)
    if name in ("baseline.jpg", "444.jpg"):  # has the right size already
        saved = data
    assert assets.files["background"][0].data == saved
    np.testing.assert_array_equal(assets.backgrounds[0], decoded(saved, "RGB"))


@every_kind
@pytest.mark.filterwarnings("ignore:.*opaque everywhere:gpufgbg.GpufgbgWarning")
def test_as_foreground(name: str, tmp_path: Path) -> None:
    data, expected = KINDS[name]
    cut = expected.ndim == 3 and expected.shape[2] == 4
    folders = [write(tmp_path / "b", **{"b.jpg": A_BACKGROUND}), write(tmp_path / "f", **{name: data})]
    if not cut:
        with pytest.raises(InputError, match=f"{name}: no alpha and no mask"):
            prepare(*folders, recipe=RECIPE)
        folders.append(write(tmp_path / "m", **{f"{Path(name).stem}.png": A_MASK}))
        expected = np.dstack([rgb(expected), ALPHA])
    assets = prepare(*folders, recipe=RECIPE)
    np.testing.assert_array_equal(assets.foreground(0), expected)
    np.testing.assert_array_equal(decoded(assets.files["foreground"][0].data, "RGBA"), expected)
    matte = jpeg(Image.fromarray(np.ascontiguousarray(expected[..., 3])), quality=95, optimize=False)
    assert assets.files["foreground_mask"][0].data == matte


@every_kind
def test_as_mask(name: str, tmp_path: Path) -> None:
    data, expected = KINDS[name]
    assets = prepare(
        write(tmp_path / "b", **{"b.jpg": A_BACKGROUND}),
        write(tmp_path / "f", **{f"{Path(name).stem}.png": A_CUTOUT}),
        write(tmp_path / "m", **{name: data}),
        RECIPE,
    )
    grey = expected if expected.ndim == 2 else np.array(Image.fromarray(rgb(expected)).convert("L"))
    if expected.ndim == 3 and expected.shape[2] == 4:
        grey[expected[..., 3] == 0] = 0
    saved = data if name == "grey.jpg" else jpeg(Image.fromarray(grey), quality=95, optimize=False)
    assert assets.files["foreground_mask"][0].data == saved
    np.testing.assert_array_equal(assets.mask(0), decoded(saved, "L"))
    np.testing.assert_array_equal(assets.foreground(0), CUTOUT)  # the mask does not touch a true alpha


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_are_not_inverted(form: str, tmp_path: Path) -> None:
    """Adobe's CMYK JPEGs hold the complement of the ink, TIFFs the ink."""
    inks = {(0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255)}
    for ink, colour in inks.items():
        data = encoded(Image.new("CMYK", (16, 16), ink), form)
        assert (b"Adobe" in data) == (form == "JPEG")
        found = np.asarray(read(tmp_path, f"a.{form.lower()}", data).image).astype(int)
        assert np.abs(found - colour).max() <= 2


# -- orientation ----------------------------------------------------------------------------------------

#: orientation -> the pixels as they lie in the file, from the upright ones (EXIF 2.3, tag 274: where row 0 and
#: column 0 belong)
STORED = {
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda p: p[::-1].swapaxes(0, 1),  # left, bottom
}


def turned(pixels: np.ndarray, form: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(np.ascontiguousarray(STORED[orientation](pixels)), form, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True, "exact": True})],
    ids=["png", "tiff", "webp"],
)
def test_orientation(name: str, options: dict, orientation: int, tmp_path: Path) -> None:
    form = {"a.png": "PNG", "a.tif": "TIFF", "a.webp": "WEBP"}[name]
    cutout = turned(CUTOUT, form, orientation, **options)
    colour = turned(COLOUR, form, orientation, **options)
    mask = turned(np.dstack([GREY] * 3) if form == "WEBP" else GREY, form, orientation, **options)
    assets = prepare(
        write(tmp_path / "b", **{name: colour}),
        write(tmp_path / "f", **{name: cutout}),
        write(tmp_path / "m", **{name: mask}),
        RECIPE,
    )
    np.testing.assert_array_equal(assets.foreground(0), CUTOUT)
    assert assets.files["background"][0].data == jpeg(Image.fromarray(COLOUR), 95, "444", optimize=False)
    assert assets.files["foreground_mask"][0].data == jpeg(Image.fromarray(GREY), 95, optimize=False)


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_jpeg(orientation: int, tmp_path: Path) -> None:
    """Only one that lies upright is kept as it is."""
    background, mask = turned(COLOUR, "JPEG", orientation), turned(ALPHA, "JPEG", orientation)
    assets = prepare(
        write(tmp_path / "b", **{"a.jpg": background}),
        write(tmp_path / "f", **{"a.png": A_CUTOUT}),
        write(tmp_path / "m", **{"a.jpg": mask}),
        RECIPE,
    )
    for kind, mode, data in (("background", "RGB", background), ("foreground_mask", "L", mask)):
        saved = assets.files[kind][0].data
        if orientation == 1:
            assert saved == data
            continue
        inverse = {6: 8, 8: 6}.get(orientation, orientation)
        lies = np.ascontiguousarray(STORED[inverse](decoded(data, mode)))
        assert saved == jpeg(Image.fromarray(lies), 95, "444", optimize=False)
        assert Image.open(io.BytesIO(saved)).size == (WIDTH, HEIGHT)
        assert not Image.open(io.BytesIO(saved)).getexif()


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage, garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",  # orientation as text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",  # orientation 9
    ],
)
def test_odd_exif_is_no_damage(exif: bytes, tmp_path: Path) -> None:
    picture = read(tmp_path, "a.jpg", encoded(COLOUR, "JPEG", exif=exif))
    np.testing.assert_array_equal(np.asarray(picture.image), decoded(encoded(COLOUR, "JPEG"), "RGB"))
    assert picture.as_is


def test_odd_exif_does_not_hide_the_orientation(tmp_path: Path) -> None:
    """A second entry that can't be written back (GPS pointer as text) once made such a photo 'damaged'."""
    entries = struct.pack("<HHII", 0x112, 3, 1, 6) + struct.pack("<HHI", 0x8825, 2, 4) + b"abcd"
    data = encoded(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0\0\0\0")
    picture = read(tmp_path, "a.jpg", data)
    assert picture.image.size == (HEIGHT, WIDTH)
    assert not picture.as_is


def test_unreadable_exif_is_said(tmp_path: Path) -> None:
    picture = read(tmp_path, "a.png", png(8, 6, CUTOUT, (b"eXIf", b"garbage")))
    np.testing.assert_array_equal(np.asarray(picture.image), CUTOUT)
    assert picture.notes == (f"{tmp_path / 'a.png'}: its EXIF can't be read, it is taken as upright",)


# -- forms of a file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "baseline"),
    [("baseline.jpg", True), ("444.jpg", True), ("grey.jpg", True), ("progressive.jpg", False), ("rgb8.png", False)],
)
def test_baseline(name: str, baseline: bool, tmp_path: Path) -> None:
    picture = read(tmp_path, name, KINDS[name][0])
    assert picture.is_baseline_jpeg == baseline
    assert picture.as_is


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_further_frames_are_told(name: str, tmp_path: Path) -> None:
    form = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}[Path(name).suffix]
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    rest = [Image.fromarray(CUTOUT[::-1].copy()), Image.fromarray(CUTOUT[:, ::-1].copy())]
    picture = read(tmp_path, name, encoded(CUTOUT, form, save_all=True, append_images=rest, **options))
    seen = ALPHA > 0  # an animated WebP has no colour where it is transparent
    np.testing.assert_array_equal(np.asarray(picture.image)[seen], CUTOUT[seen])
    np.testing.assert_array_equal(np.asarray(picture.image)[..., 3], ALPHA)
    assert picture.notes == (f"{tmp_path / name}: 3 frames, only the first is used",)
    assert not picture.as_is


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("A.JPG", "baseline.jpg"), ("A.JPEG", "progressive.jpg"), ("A.Jpe", "baseline.jpg"), ("A.jfif", "grey.jpg"),
        ("A.PNG", "rgba8.png"), ("A.WebP", "rgba.webp"), ("A.BMP", "24.bmp"), ("A.TIF", "rgb.tif"),
        ("A.Tiff", "rgb.tif"),
    ],
)  # fmt: skip
def test_case_of_the_extension(name: str, source: str, tmp_path: Path) -> None:
    data, expected = KINDS[source]
    np.testing.assert_array_equal(np.asarray(read(tmp_path, name, data).image), expected)


CUT_OFF = [
    "baseline.jpg", "progressive.jpg", "cmyk.jpg", "rgba8.png", "palette8_alphas.png", "rgba.webp", "lossy.webp",
    "24.bmp", "32_alpha.bmp", "lzw.tiff", "grey16.tif",
]  # fmt: skip


@pytest.mark.parametrize("name", CUT_OFF)
def test_truncated_anywhere(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = KINDS[name][0]
    end = len(data) - (-3 * WIDTH % 4 if name == "24.bmp" else 0)  # the last row's padding is no loss
    for length in {*range(1, end, max(1, end // 40)), *range(end - 12, end)}:
        with pytest.raises(PictureError, match=r"^(damaged|not a picture: expected )"):
            read(tmp_path, name, data[:length])


def test_missing_end_is_seen_in_a_jpeg_with_a_thumbnail(tmp_path: Path) -> None:
    """Pillow takes these pixels as whole, but the file would be kept as it is, and then others complain."""
    data = encoded(cmyk(), "JPEG", exif=b"Exif\0\0" + encoded(GREY, "JPEG"))
    read(tmp_path, "a.jpg", data)
    with pytest.raises(PictureError, match=r"^damaged or truncated JPEG: its end is not there"):
        read(tmp_path, "a.jpg", data[:-2])


def test_an_end_at_the_very_end_counts_as_one_behind_the_frame() -> None:
    """Cut anywhere, also where the end of a thumbnail, in front of the frame, is the last that is left."""
    whole, thumbnail = encoded(COLOUR, "JPEG"), encoded(COLOUR[:2, :2], "JPEG")
    held = b"Exif\0\0" + thumbnail
    files = [
        whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + size) + held + b"\0" * (size - len(held)) + whole[2:]
        for size in (len(held), len(held) + 9)  # nothing, or something behind the thumbnail
    ]
    files += [
        whole,
        b"\xff\xd8\xff\xd9",
        b"\xff\xd9",
        whole + b"behind it",
        whole[:-2] + b"\xff\xff\xd9",
        thumbnail * 2,
    ]
    told = set()
    for file in files:
        for size in range(len(file) + 1):
            data = file[:size]
            end = data.find(b"\xff\xd9", _start_of_frame(data)[1]) >= 0
            assert has_end(data, "JPEG") == end
            told.add((end, data.endswith(b"\xff\xd9"), _start_of_frame(data)[0] is not None))
    assert told == {(False, False, False), (False, False, True), (True, False, False), (True, False, True),
                    (True, True, False), (True, True, True)}  # fmt: skip
    # what is cut right behind its thumbnail has no frame, which decoding tells
    cut = files[0][: files[0].index(thumbnail) + len(thumbnail)]
    assert cut.endswith(b"\xff\xd9") and has_end(cut, "JPEG") and _start_of_frame(cut) == (None, 0)
    with pytest.raises(OSError):
        Image.open(io.BytesIO(cut)).load()


@pytest.mark.parametrize("name", CUT_OFF)
def test_damage_raises_nothing_else(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng, data, refusals = np.random.default_rng(3), KINDS[name][0], 0
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 200), 4):
            damaged[at] = rng.integers(256)
        try:
            read(tmp_path, name, bytes(damaged))
        except PictureError:
            refusals += 1
    assert refusals > 0


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", "zero bytes long"),
        ("a.jpg", b"this is a text", "not a picture: expected JPEG by its name"),
        ("a.jpg", A_CUTOUT, "mislabelled: the name says JPEG, the content is PNG; rename it"),
        ("a.png", encoded(GREY, "GIF"), "mislabelled: the name says PNG, the content is GIF; rename it"),
        ("a.tif", encoded(WIDE[..., 0].astype(np.float32), "TIFF"), "floating-point pixels: expected 8 or 16 bits"),
        ("a.tif", encoded(GREY.astype(np.int32), "TIFF"), "signed 32-bit grey: expected 8 or 16 bits a channel"),
        ("a.tif", tiff(WIDE[..., :1], 0), "16-bit grey with white as zero: expected .* black as zero; convert it"),
        ("a.tif", tiff(WIDE[..., :2], 1, extra=2), "damaged, truncated or unusual TIFF: restore it or convert it"),
    ],
    ids=["empty", "text", "png_as_jpg", "gif_as_png", "float", "int32", "white_is_zero", "grey_alpha16"],
)  # fmt: skip
def test_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=f"^{message}"):
        read(tmp_path, name, data)


def test_vanished(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"^can't be read: No such file"):
        read_picture(tmp_path / "a.png")


# -- folders --------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return [path.name for path in list_pictures(folder, "backgrounds")[0]]


def test_sorted_by_name_however_accents_are_spelled(tmp_path: Path) -> None:
    spelled = ["Zebra.png", "e.png", "é.png", "ê.png", "f.png", "à la carte.png", "日本.png"]
    for form in ("NFC", "NFD"):
        folder = write(tmp_path / form, **{unicodedata.normalize(form, name): A_CUTOUT for name in spelled})
        found = [unicodedata.normalize("NFC", name) for name in names(folder)]
        assert found == sorted(unicodedata.normalize("NFC", name) for name in spelled)


@pytest.mark.skipif(sys.platform != "linux", reason="names that other systems do not allow")
def test_any_name_will_do(tmp_path: Path) -> None:
    odd = [
        b"-rf.png",
        b"--help.png",
        b" a b .png",
        b"a\nb.png",
        b"\xff\xfe.png",
        b"'; rm.png",
        b"%s{}.png",
        b"a.b.png",
    ]
    for name in odd:
        (tmp_path / os.fsdecode(name)).write_bytes(A_CUTOUT)
    paths, notes = list_pictures(tmp_path, "backgrounds")
    assert sorted(os.fsencode(path.name) for path in paths) == sorted(odd)
    assert notes == []
    assert all(read_picture(path).has_alpha for path in paths)


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        **dict.fromkeys(
            [".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini", "README", "readme.md", "LICENSE", "a.png"],
            A_CUTOUT,
        ),
    )
    assert list_pictures(folder, "backgrounds") == ([folder / "a.png"], [])
    for name in ("notes.txt", "b.gif", "c\n.svg", "no_extension"):
        (folder / name).write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "folder.png").mkdir()
    paths, notes = list_pictures(folder, "backgrounds")
    assert paths == [folder / "a.png"]
    assert notes == [
        "backgrounds: subfolders are not read: folder.png, sub",
        "backgrounds: not pictures by their extension, not read: b.gif, c\\n.svg, no_extension, notes.txt",
    ]


def test_links_are_followed(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", **{"x.data": A_CUTOUT})
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").symlink_to(elsewhere / "x.data")
    (folder / "b.png").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(folder)
    paths, notes = list_pictures(tmp_path / "link", "masks")
    assert [path.name for path in paths] == ["a.png"]
    assert notes == ["masks: subfolders are not read: b.png"]
    np.testing.assert_array_equal(np.asarray(read_picture(paths[0]).image), CUTOUT)


def test_all_that_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", **dict.fromkeys(["a.png", "a.jpg", "é.png", "é.webp", "b.png"], A_CUTOUT))
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError) as caught:
        list_pictures(folder, "backgrounds")
    assert sorted(caught.value.problems) == sorted(
        [
            f"{folder / 'broken.png'}: a symbolic link to nothing that can be read",
            f"{folder / 'loop.png'}: a symbolic link to nothing that can be read",
            f"{folder / 'pipe.png'}: neither a file nor a folder: remove it",
            f"{folder / 'a.jpg'} and a.png share one stem: rename or remove one",
            f"{folder / 'é.png'} and é.webp share one stem: rename or remove one",
        ]
    )


def test_quiet_decoding_in_overlapping_threads(monkeypatch):
    """Filters of warnings belong to the process: whoever leaves last restores them."""
    filters = list(warnings.filters)
    first, second = threading.Event(), threading.Event()

    def stay() -> None:
        with quiet_decoding:
            first.set()
            second.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    first.wait(30)
    with quiet_decoding:
        second.set()
        thread.join()
        with pytest.warns(UserWarning, match="not of Pillow"):
            warnings.warn("not of Pillow", UserWarning, stacklevel=1)
    assert list(warnings.filters) == filters


def test_a_bomb_without_the_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("gpufgbg.pictures.MAX_PIXELS", 100)
    Image.new("L", (11, 10)).save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="too large to decode safely: expected at most 100 pixels"):
        read_picture(tmp_path / "a.png")
