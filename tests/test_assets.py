"""Preparation: what a data set keeps, that it is what gets composited, and how pictures are paired."""

from __future__ import annotations

import io
import unicodedata
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import cutout, smooth
from oracle import jpeg, tree_of
from PIL import Image
from test_pictures import decoded, encoded, turned, write

from gpufgbg import Assets, GpufgbgWarning, InputError, Recipe, prepare
from gpufgbg.assets import find_sources
from gpufgbg.layout import Layout
from gpufgbg.recipe import Plan

RECIPE = Recipe(size=(64, 48), foreground_height=20)
RNG = np.random.default_rng(8)
SCENE = smooth(RNG, 64, 48, 3)
FIGURE = cutout(RNG, 30, 40)
SMALL = cutout(RNG, 15, 20)
LANCZOS = Image.Resampling.LANCZOS


def saved(pixels: np.ndarray | Image.Image) -> bytes:
    """How backgrounds and masks are kept that can't be kept as they came."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    return jpeg(image, quality=95, subsampling="444", optimize=False)


class Input:
    """Folders that a test fills, and what preparation makes of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.backgrounds = write(root / "backgrounds", **{"scene.jpg": encoded(SCENE, "JPEG")})
        self.foregrounds = write(root / "foregrounds", **{"figure.png": encoded(FIGURE, "PNG")})
        self.masks: Path | None = None

    def replace(self, kind: str, **files: bytes) -> None:
        folder = self.root / kind
        if folder.is_dir():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        setattr(self, kind, write(folder, **files))

    def prepare(self, recipe: Recipe = RECIPE, workers: int = 1) -> Assets:
        return prepare(self.backgrounds, self.foregrounds, self.masks, recipe, workers)

    def file(self, kind: str, recipe: Recipe = RECIPE) -> bytes:
        """The one file of a kind that is kept."""
        (only,) = self.prepare(recipe).files[kind]
        return only.data


@pytest.fixture
def given(tmp_path: Path) -> Input:
    return Input(tmp_path)


# -- backgrounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": 5}, {"quality": 100, "subsampling": "4:4:4"}, {"optimize": True}, {"icc_profile": b"x" * 300},
     {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"}, {"comment": b"hello"}],
    ids=lambda options: next(iter(options), "plain"),
)  # fmt: skip
def test_baseline_rgb_jpeg_of_the_right_size_is_copied(given: Input, options: dict) -> None:
    data = encoded(SCENE, "JPEG", **options)
    given.replace("backgrounds", **{"a.jpg": data})
    assert given.file("background") == data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("progressive.jpg", encoded(SCENE, "JPEG", progressive=True)),
        ("grey.jpg", encoded(SCENE[..., 0], "JPEG")),
        ("cmyk.jpg", encoded(Image.fromarray(SCENE).convert("CMYK"), "JPEG")),
        ("camera.jpg", encoded(SCENE, "MPO", save_all=True, append_images=[Image.fromarray(SCENE)])),
        ("scene.png", encoded(SCENE, "PNG", icc_profile=b"x" * 300)),
        ("grey.png", encoded(SCENE[..., 0], "PNG")),
        ("palette.png", encoded(Image.fromarray(SCENE).convert("P"), "PNG")),
        ("scene.webp", encoded(SCENE, "WEBP")),
        ("smaller.jpg", encoded(SCENE[:-1], "JPEG")),
        ("large.png", encoded(smooth(RNG, 131, 57, 3), "PNG")),
        ("dot.png", encoded(SCENE[:1, :1], "PNG")),
    ],
)
def test_other_backgrounds_are_resized_and_saved_as_444(given: Input, name: str, data: bytes) -> None:
    given.replace("backgrounds", **{name: data})
    image = Image.open(io.BytesIO(data)).convert("RGB")
    found = given.file("background")
    assert found == saved(image if image.size == (64, 48) else image.resize((64, 48), LANCZOS))
    kept = Image.open(io.BytesIO(found))
    assert (kept.format, kept.mode, kept.size) == ("JPEG", "RGB", (64, 48))
    assert {layer[1:3] for layer in kept.layer} == {(1, 1)}
    assert set(kept.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_transparency_of_a_background_is_told(given: Input) -> None:
    given.replace("backgrounds", **{"a.png": encoded(np.dstack([SCENE, SCENE[..., :1]]), "PNG")})
    with pytest.warns(GpufgbgWarning, match=r"a\.png: a background's transparency is not used, only its colours"):
        assert given.file("background") == saved(SCENE)
    given.replace("backgrounds", **{"a.png": encoded(np.dstack([SCENE, np.full((48, 64), 255, np.uint8)]), "PNG")})
    assert given.file("background") == saved(SCENE)  # opaque: nothing to tell, and warnings are errors


# -- foregrounds and masks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(30, 40), (15, 20), (1, 1), (1, 300), (31, 40), (29, 40), (2, 80), (3, 2), (64, 20)], ids=str
)
def test_foregrounds_are_scaled_in_proportion(given: Input, size: tuple[int, int]) -> None:
    width, height = size
    figure = cutout(RNG, width, height)
    figure[..., 3] |= 128
    figure[0, 0, 3] = 128
    given.replace("foregrounds", **{"f.png": encoded(figure, "PNG")})
    half_up = max(1, (Fraction(width * 20, height) + Fraction(1, 2)).__floor__())
    assets = given.prepare()
    assert (assets.widths.tolist(), assets.heights.tolist()) == ([half_up], [20])
    image = Image.fromarray(figure)
    expected = image if size == (half_up, 20) else image.resize((half_up, 20), LANCZOS)
    np.testing.assert_array_equal(assets.foreground(0), np.asarray(expected))
    alpha = image.getchannel("A")
    alpha = alpha if size == (half_up, 20) else alpha.resize((half_up, 20), LANCZOS)
    assert assets.files["foreground_mask"][0].data == saved(alpha)


def test_rgba_png_and_grey_baseline_jpeg_of_the_right_size_are_copied(given: Input) -> None:
    figure, matte = encoded(SMALL, "PNG", compress_level=1), encoded(SMALL[..., 3], "JPEG", quality=50)
    given.replace("foregrounds", **{"f.png": figure})
    given.replace("masks", **{"f.jpg": matte})
    assert (given.file("foreground"), given.file("foreground_mask")) == (figure, matte)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_pixels_of_the_right_size_are_not_touched(given: Input, form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    given.replace("foregrounds", **{f"f.{form.lower()}": encoded(SMALL, form, **options)})
    np.testing.assert_array_equal(decoded(given.file("foreground"), "RGBA"), SMALL)


def test_turned_pictures_of_the_right_size_are_not_copied(given: Input) -> None:
    given.replace("foregrounds", **{"f.png": turned(SMALL, "PNG", 8)})
    given.replace("masks", **{"f.jpg": turned(SMALL[..., 3], "JPEG", 3)})
    assets = given.prepare()
    np.testing.assert_array_equal(decoded(assets.files["foreground"][0].data, "RGBA"), SMALL)
    upright = decoded(encoded(SMALL[::-1, ::-1, 3], "JPEG"), "L")[::-1, ::-1]
    assert assets.files["foreground_mask"][0].data == saved(upright)


def test_a_mask_cuts_out_a_foreground_without_alpha(given: Input) -> None:
    colour, matte = SMALL[..., :3], SMALL[..., 3]
    given.replace("foregrounds", **{"f.bmp": encoded(colour, "BMP"), "g.png": encoded(SMALL, "PNG")})
    given.replace("masks", **{"f.png": encoded(matte, "PNG"), "g.png": encoded(255 - matte, "PNG")})
    assets = given.prepare()
    np.testing.assert_array_equal(assets.foreground(0), SMALL)
    np.testing.assert_array_equal(assets.foreground(1), SMALL)  # has its own alpha, which its mask does not replace
    np.testing.assert_array_equal(assets.mask(1), decoded(saved(255 - matte), "L"))


def test_opaque_foreground_is_told(given: Input) -> None:
    figure = SMALL.copy()
    figure[..., 3] = 255
    given.replace("foregrounds", **{"f.png": encoded(figure, "PNG")})
    with pytest.warns(GpufgbgWarning, match=r"f\.png: opaque everywhere: it is pasted as a rectangle"):
        np.testing.assert_array_equal(given.prepare().foreground(0), figure)


_LUMA = np.array(Image.fromarray(SMALL[..., :3]).convert("L"))
_SHAPE = SMALL[..., 3]
_WHITE = np.full((20, 15, 3), 255, np.uint8)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (_SHAPE, _SHAPE),
        (np.dstack([_SHAPE] * 3), _SHAPE),
        (SMALL[..., :3].copy(), _LUMA),
        (np.dstack([_WHITE, _SHAPE]), _SHAPE),  # one colour: the shape is in the alpha
        (np.dstack([0 * _WHITE, _SHAPE]), _SHAPE),  # whichever colour
        (np.dstack([_SHAPE, _SHAPE, _SHAPE, _WHITE[..., 0]]), _SHAPE),  # opaque: the shape is in the grey
        (SMALL, np.where(_SHAPE > 0, _LUMA, 0).astype(np.uint8)),  # both: unseen grey does not count
    ],
    ids=["grey", "grey_as_rgb", "colour", "white_with_alpha", "black_with_alpha", "opaque_rgba", "colour_with_alpha"],
)
def test_what_a_mask_is_read_as(given: Input, mask: np.ndarray, expected: np.ndarray) -> None:
    given.replace("foregrounds", **{"f.png": encoded(SMALL, "PNG")})
    given.replace("masks", **{"f.png": encoded(mask, "PNG")})
    assert given.file("foreground_mask") == saved(expected)


def test_what_vanishes_when_scaled_is_refused(given: Input) -> None:
    faint = np.zeros((400, 300, 4), np.uint8)
    faint[7, 7] = 255, 255, 255, 3
    given.replace("foregrounds", **{"faint.png": encoded(faint, "PNG"), "f.png": encoded(FIGURE, "PNG")})
    with pytest.raises(InputError, match=r"faint\.png: fully transparent when scaled: .*; remove it$"):
        given.prepare()
    given.replace("foregrounds", **{"f.png": encoded(cutout(RNG, 300, 400), "PNG")})
    given.replace("masks", **{"f.png": encoded(faint[..., 3], "PNG")})
    with pytest.raises(InputError, match=r"masks/f\.png: black everywhere when scaled: a mask needs some white$"):
        given.prepare()


# -- what is composited is what is kept -----------------------------------------------------------------


def keep(assets: Assets, recipe: Recipe, root: Path) -> list[Path]:
    """The files as a data set keeps them: the folders for another preparation."""
    layout = Layout.of(Plan(recipe, assets.n_backgrounds, assets.widths, assets.heights))
    for kind, path_of in (
        ("background", layout.background_file),
        ("foreground", layout.foreground_file),
        ("foreground_mask", layout.mask_file),
    ):
        for i, file in enumerate(assets.files[kind]):
            path = root / path_of(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
    return [root / "bg", root / "fg", root / "fg_mask"]


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "alpha"])
def test_kept_files_decode_to_what_is_composited(folders: dict[str, Path], masks: bool, tmp_path: Path) -> None:
    assets = prepare(folders["backgrounds"], folders["foregrounds"], folders["masks"] if masks else None, RECIPE)
    again = keep(assets, RECIPE, tmp_path)
    kinds = zip(again, (lambda i: assets.backgrounds[i], assets.foreground, assets.mask), strict=True)
    for (folder, pixels), form in zip(kinds, [("JPEG", "RGB"), ("PNG", "RGBA"), ("JPEG", "L")], strict=True):
        for i, path in enumerate(sorted(folder.iterdir())):
            with Image.open(path) as image:
                assert (image.format, image.mode) == form
                np.testing.assert_array_equal(pixels(i), np.asarray(image))

    second = prepare(*again, RECIPE)
    assert second.fingerprint() == assets.fingerprint()
    for kind, files in assets.files.items():
        assert [file.data for file in second.files[kind]] == [file.data for file in files]


def test_a_data_set_can_be_made_again_from_itself(arguments: list[str], run, tmp_path: Path) -> None:
    assert run(*arguments)[0] == 0
    first, second = tmp_path / "out", tmp_path / "again"
    others = [a for a in arguments if not a.startswith(("--backgrounds", "--foregrounds", "--masks", "--out"))]
    folders = (f"--backgrounds={first / 'bg'}", f"--foregrounds={first / 'fg'}", f"--masks={first / 'fg_mask'}")
    assert run(*others, *folders, f"--out={second}")[0] == 0
    pictures = {k: v for k, v in tree_of(first).items() if k.endswith((".jpg", ".png"))}
    assert len(pictures) == 3 + 4 + 4 + 2 * 48
    assert {k: v for k, v in tree_of(second).items() if k.endswith((".jpg", ".png"))} == pictures
    assert (second / "labels").is_dir()
    assert tree_of(second / "labels") == tree_of(first / "labels")


def test_nothing_depends_on_workers_and_nothing_is_written(folders: dict[str, Path]) -> None:
    before = {name: tree_of(folder) for name, folder in folders.items()}
    one, four = (prepare(*folders.values(), RECIPE, workers) for workers in (1, 4))
    assert one.fingerprint() == four.fingerprint()
    assert one.files == four.files
    assert {name: tree_of(folder) for name, folder in folders.items()} == before


def test_frames_beyond_pillows_limit(given: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit is for files from elsewhere; up to twice of it, it only warns."""
    given.replace("backgrounds", **{"dot.png": encoded(SCENE[:20, :20], "PNG")})
    given.replace("foregrounds", **{"f.png": encoded(SMALL, "PNG")})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    assert given.prepare().backgrounds.shape == (1, 48, 64, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(InputError, match="size: expected a frame of at most"):
        given.prepare()


# -- pairing --------------------------------------------------------------------------------------------


def pairs(given: Input, foregrounds: list[str], masks: list[str]) -> list[str]:
    given.replace("foregrounds", **dict.fromkeys(foregrounds, b"-"))
    given.replace("masks", **dict.fromkeys(masks, b"-"))
    found = find_sources(given.backgrounds, given.foregrounds, given.masks)
    found.checksums()  # raises what is wrong
    assert [path.name for path in found.foregrounds] == sorted(foregrounds)
    return [path.name for path in found.masks or ()]


@pytest.mark.parametrize(
    ("foregrounds", "masks"),
    [
        (["a.png", "b.png"], ["a.jpg", "b.jpg"]),
        (["a.png", "b.png", "c.webp"], ["mask_a.png", "b_mask.tif", "c.PNG"]),
        (["fg_00.png", "fg_1.png", "fg_10.png"], ["mask_fg_00.jpg", "fg_1.jpg", "fg_10_mask.jpg"]),
        (["a b.png", "-c.png", "été.png"], ["mask_a b.png", "-c_mask.png", "mask_été.png"]),
        (["a.b.png", "a.png"], ["a.b.jpg", "a.jpg"]),
        (["mask.png", "mask_mask.png"], ["mask.jpg", "mask_mask_mask.jpg"]),
    ],
)
def test_masks_pair_by_name(given: Input, foregrounds: list[str], masks: list[str]) -> None:
    expected = [mask for _, mask in sorted(zip(foregrounds, masks, strict=True))]
    assert pairs(given, foregrounds, masks) == expected


def test_masks_pair_however_accents_are_spelled(given: Input) -> None:
    """A Mac's file system spells é in two code points; a zip carries that elsewhere."""
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert pairs(given, [f"{composed}.png"], [f"mask_{decomposed}.png"]) == [f"mask_{decomposed}.png"]
    assert pairs(given, [f"{decomposed}.png"], [f"{composed}_mask.png"]) == [f"{composed}_mask.png"]


def test_two_masks_are_one_too_many(given: Input) -> None:
    with pytest.raises(InputError) as caught:
        pairs(given, ["a.png", "b.png", "c.png"], ["a.png", "mask_a.png", "b.png", "c.png", "c_mask.png"])
    assert caught.value.problems == (
        f"{given.foregrounds / 'a.png'}: two masks: a.png and mask_a.png; remove one",
        f"{given.foregrounds / 'c.png'}: two masks: c.png and c_mask.png; remove one",
    )


def test_notes_name_what_is_not_used(given: Input) -> None:
    (given.backgrounds / "more").mkdir()
    (given.foregrounds / "notes.txt").write_text("x")
    given.replace("masks", **{"figure.png": encoded(FIGURE[..., 3], "PNG"), "lost.png": b"-", "a\nb.png": b"-"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given.prepare()
    assert [(w.category, str(w.message)) for w in caught] == [
        (GpufgbgWarning, "backgrounds: subfolders are not read: more"),
        (GpufgbgWarning, "foregrounds: not pictures by their extension, not read: notes.txt"),
        (GpufgbgWarning, "masks: no foreground for a\\nb.png, lost.png; not used"),
    ]


def test_sources_are_the_files_by_name(given: Input) -> None:
    assets = given.prepare()
    assert {kind: [file.source for file in files] for kind, files in assets.files.items()} == {
        "background": ["scene.jpg"],
        "foreground": ["figure.png"],
        "foreground_mask": ["figure.png"],
    }


def test_all_unreadable_sources_are_named(given: Input) -> None:
    sources = find_sources(given.backgrounds, given.foregrounds)
    given.replace("backgrounds")
    given.replace("foregrounds")
    with pytest.raises(InputError) as caught:
        sources.checksums()
    assert caught.value.problems == tuple(
        f"{path}: can't be read: No such file or directory"
        for path in (given.backgrounds / "scene.jpg", given.foregrounds / "figure.png")
    )


# -- from arrays ----------------------------------------------------------------------------------------


def arrays() -> tuple[np.ndarray, list[np.ndarray]]:
    return np.stack([SCENE, 255 - SCENE]), [SMALL.copy(), FIGURE.copy()]


def test_arrays_are_copied() -> None:
    backgrounds, foregrounds = arrays()
    assets = Assets.from_arrays(backgrounds, foregrounds)
    before = assets.fingerprint()
    backgrounds[:] = 0
    for figure in foregrounds:
        figure[:] = 0
    assert assets.fingerprint() == before
    np.testing.assert_array_equal(assets.backgrounds[1], 255 - SCENE)
    np.testing.assert_array_equal(assets.foreground(1), FIGURE)
    np.testing.assert_array_equal(assets.mask(1), FIGURE[..., 3])
    assert (assets.n_backgrounds, assets.n_foregrounds) == (2, 2)
    assert (assets.widths.tolist(), assets.heights.tolist()) == ([15, 30], [20, 40])
    assert assets.offsets.tolist() == [0, 300, 1500]


def test_fingerprint_tells_all_differences() -> None:
    backgrounds, foregrounds = arrays()
    masks = [figure[..., 3] for figure in foregrounds]
    same = Assets.from_arrays(backgrounds, foregrounds)
    assert Assets.from_arrays(np.asfortranarray(backgrounds), foregrounds, masks).fingerprint() == same.fingerprint()
    dot = backgrounds.copy()
    dot[1, 5, 5, 2] ^= 1
    others = [
        Assets.from_arrays(dot, foregrounds),
        Assets.from_arrays(backgrounds[::-1], foregrounds),
        Assets.from_arrays(backgrounds[:1], foregrounds),
        Assets.from_arrays(backgrounds, foregrounds[::-1]),
        Assets.from_arrays(backgrounds, foregrounds, [masks[0] ^ 1, masks[1]]),
        Assets.from_arrays(backgrounds, [foregrounds[0].reshape(15, 20, 4), foregrounds[1]]),
    ]
    assert len({same.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backgrounds": SCENE}, r"backgrounds: got uint8 \(48, 64, 3\), expected uint8 \(B, H, W, 3\)"),
        ({"backgrounds": SCENE[None].astype(np.float32)}, "backgrounds: got float32 .*, expected uint8"),
        ({"backgrounds": SCENE[None, ..., :1]}, r"backgrounds: got uint8 \(1, 48, 64, 1\)"),
        ({"backgrounds": SCENE[None][:0]}, r"backgrounds: got uint8 \(0, 48, 64, 3\)"),
        ({"backgrounds": SCENE[None, :0]}, r"backgrounds: got uint8 \(1, 0, 64, 3\)"),
        ({"backgrounds": [SCENE, SCENE[1:]]}, "backgrounds: got several sizes, expected uint8"),
        ({"foregrounds": []}, "foregrounds: got none, expected at least one"),
        (
            {"foregrounds": [SMALL, SMALL[..., :3]]},
            r"foreground 1: got uint8 \(20, 15, 3\), expected .*\(h, w, 4\)",
        ),
        ({"foregrounds": [SMALL.astype(int)]}, "foreground 0: got int64"),
        ({"foregrounds": [SMALL[:, :0]]}, r"foreground 0: got uint8 \(20, 0, 4\)"),
        ({"foregrounds": [SMALL[..., 3]]}, r"foreground 0: got uint8 \(20, 15\)"),
        ({"masks": []}, "masks: got 0, expected 1, one a foreground"),
        ({"masks": [_SHAPE, _SHAPE]}, "masks: got 2, expected 1"),
        ({"masks": [_SHAPE.T]}, r"mask 0: got uint8 \(15, 20\), expected uint8 \(20, 15\)"),
        ({"masks": [_SHAPE > 0]}, "mask 0: got bool"),
    ],
)
def test_arrays_of_another_kind_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Assets.from_arrays(**{"backgrounds": SCENE[None], "foregrounds": [SMALL], **changed})
