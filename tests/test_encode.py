"""The CPU backend's JPEG files equal Pillow's, byte for byte, and so do the pixels it gets back from them."""

from __future__ import annotations

import io
import itertools
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import oracle
import pytest
from conftest import smooth
from PIL import Image
from test_placed import ByDlpack, Card, cupy, on_card  # noqa: F401

from gpufgbg import InputError, JpegEncoder, OptionError
from gpufgbg.backends import cuda
from gpufgbg.backends.cpu import encode_jpeg, reconstruct_jpeg


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)
    board = np.where(np.indices((40, 40)).sum(axis=0)[..., None] % 2, 255, 0).astype(np.uint8).repeat(3, axis=2)
    flat = np.full((17, 16, 3), 200, np.uint8)
    return [smooth(rng, 64, 48, 3), noise, board, flat]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_all_qualities(pictures, subsampling, optimize):
    for quality in range(1, 101):
        for picture in pictures:
            for pixels in (picture, np.ascontiguousarray(picture[..., 0])):
                (found,) = encode_jpeg(pixels[None], quality, subsampling, optimize)
                assert found == oracle.jpeg(Image.fromarray(pixels), quality, subsampling, optimize), quality
                (seen,) = reconstruct_jpeg(pixels[None], quality, subsampling)
                np.testing.assert_array_equal(seen, Image.open(io.BytesIO(found)), err_msg=str(quality))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_all_remainders_of_the_block_size(subsampling):
    rng = np.random.default_rng(1)
    sizes = [(w, 1 + w * 7 % 19) for w in range(1, 35)] + [(1, 1), (16, 16), (15, 17)]
    for width, height in sizes:
        pixels = smooth(rng, width, height + 6, 3)[:height]
        (found,) = encode_jpeg(np.ascontiguousarray(pixels)[None], 65, subsampling, True)
        assert found == oracle.jpeg(Image.fromarray(pixels), 65, subsampling), (width, height)
        (seen,) = reconstruct_jpeg(np.ascontiguousarray(pixels)[None], 65, subsampling)
        np.testing.assert_array_equal(seen, Image.open(io.BytesIO(found)), err_msg=f"{width}x{height}")


def test_the_encoder_reconstructs_a_batch_and_leaves_it_alone(pictures):
    encoder = JpegEncoder(30, "422", True, "cpu")
    batch = np.stack([pictures[0], pictures[0][::-1]])
    before = batch.copy()
    for given in (batch, batch[..., 1], batch[:, ::2, ::3], batch[:0], batch[:0, ..., 0]):
        found = encoder.reconstruct(given)
        assert found.shape == given.shape and found.dtype == np.uint8
        files = encoder.encode(given)
        for seen, file in zip(found, files, strict=True):
            np.testing.assert_array_equal(seen, Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(batch, before)


# What `JpegEncoder` takes, by one body wherever it works


CARD = cuda.count_devices() > 0


class AsCudaJpeg:
    """`cuda.CudaJpeg` on NumPy's arrays, encoded by the CPU backend."""

    batches: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, *options) -> None:
        self.options = options

    def encode(self, pictures):
        cuda._checked(pictures)
        assert isinstance(pictures, Card)
        self.batches.append(pictures.shape)
        files = encode_jpeg(pictures.get(), *self.options)
        return on_card(np.frombuffer(b"".join(files), np.uint8)), on_card(np.cumsum([0, *map(len, files)]))

    def reconstruct(self, pictures):
        cuda._checked(pictures)
        return on_card(reconstruct_jpeg(pictures.get(), *self.options[:2]))


@pytest.fixture
def as_card(cupy, monkeypatch) -> MagicMock:  # noqa: F811
    """CuPy on NumPy's arrays, with an encoder for them."""
    monkeypatch.setattr(cuda, "CudaJpeg", AsCudaJpeg)
    monkeypatch.setattr(cuda, "why_not", lambda index=0: None)
    monkeypatch.setattr(AsCudaJpeg, "batches", [])
    return cupy


@pytest.fixture(params=["cpu", "as a card", "card"])
def encoder(request) -> JpegEncoder:
    if request.param == "card" and not CARD:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    if request.param == "as a card":
        request.getfixturevalue("as_card")
    return JpegEncoder(60, "422", True, "cpu" if request.param == "cpu" else "cuda")


def by_pillow(picture: np.ndarray) -> bytes:
    return oracle.jpeg(Image.fromarray(np.ascontiguousarray(picture)), 60, "422")


def on_host(array) -> np.ndarray:
    return array.get() if cuda.is_on_card(array) else array


SIZES = [(48, 64), (17, 16), (48, 64), (5, 9), (17, 16), (48, 64), (2, 2)]


@pytest.fixture
def mixed() -> list[np.ndarray]:
    """RGB and grey pictures of several sizes, in no order."""
    rng = np.random.default_rng(4)
    return [
        rng.integers(0, 256, (*size, 3) if i % 3 else size, dtype=np.uint8)
        for i, size in enumerate(SIZES * 2)
    ]  # fmt: skip


def chw(picture: np.ndarray) -> np.ndarray:
    return picture.transpose(2, 0, 1) if picture.ndim == 3 else picture[None]


@pytest.mark.parametrize("form", ["as they are", "CHW", "contiguous CHW", "HWC", "tuple"])
def test_a_list_of_pictures_of_any_sizes(encoder, mixed, form):
    given = {
        "as they are": mixed,
        "CHW": [chw(picture) for picture in mixed],
        "contiguous CHW": [np.ascontiguousarray(chw(picture)) for picture in mixed],
        "HWC": [picture if picture.ndim == 3 else picture[..., None] for picture in mixed],
        "tuple": tuple(mixed),
    }[form]
    before = [picture.copy() for picture in given]
    files, expected = encoder.encode(given), [by_pillow(picture) for picture in mixed]
    assert list(files) == expected and len(files) == len(mixed)
    assert files.sizes == [len(file) for file in expected]
    ends = on_host(files.offsets).tolist()
    assert on_host(files.buffer)[ends[3] : ends[4]].tobytes() == expected[3] and ends[-1] == len(files.buffer)
    seen = encoder.reconstruct(given)
    assert isinstance(seen, list)
    for found, picture, file in zip(seen, given, expected, strict=True):
        assert found.shape == picture.shape and found.dtype == np.uint8 and found.flags.c_contiguous
        decoded = np.asarray(Image.open(io.BytesIO(file)))
        np.testing.assert_array_equal(on_host(found), chw(decoded) if "CHW" in form else decoded.reshape(found.shape))
    for picture, same in zip(given, before, strict=True):
        np.testing.assert_array_equal(picture, same)


def test_pictures_of_one_size_are_one_batch_on_a_card(mixed, as_card):
    JpegEncoder(device="cuda").encode(mixed)
    assert len(AsCudaJpeg.batches) == len({picture.shape for picture in mixed})
    assert sum(shape[0] for shape in AsCudaJpeg.batches) == len(mixed)


@pytest.mark.parametrize("layout", ["auto", "by name"])
def test_a_batch_in_every_layout(encoder, pictures, layout):
    batch = np.stack([pictures[0], pictures[0][::-1]])
    grey = batch[..., 0]
    forms = {
        "HWC": [batch, batch[:1], grey[..., None]],
        "CHW": [batch.transpose(0, 3, 1, 2), grey[:, None]],
        "HW": [grey],
    }
    for name, arrays in forms.items():
        for given in arrays:
            option = {} if layout == "auto" else {"layout": name}
            colour = given.ndim == 4 and 3 in (given.shape[1], given.shape[3])
            expected = [by_pillow(picture) for picture in (batch if colour else grey)[: len(given)]]
            assert list(encoder.encode(given, **option)) == expected
            seen = encoder.reconstruct(given, **option)
            assert seen.shape == given.shape and seen.flags.c_contiguous
            for found, file in zip(on_host(seen), expected, strict=True):
                decoded = np.asarray(Image.open(io.BytesIO(file)))
                decoded = chw(decoded) if name == "CHW" else decoded.reshape(found.shape)
                np.testing.assert_array_equal(found, decoded)


def test_one_picture_by_its_layout(encoder, pictures):
    picture = pictures[1]
    forms = {"HWC": picture, "CHW": picture.transpose(2, 0, 1), "HW": picture[..., 0]}
    for layout, given in forms.items():
        (file,) = encoder.encode(given, layout)
        assert file == by_pillow(given if layout == "HW" else picture)
        assert encoder.reconstruct(given, layout).shape == given.shape
    assert list(encoder.encode(picture, "HW")) == [by_pillow(row) for row in picture]
    assert encoder.encode(picture[:1, :1, :1])[0] == by_pillow(picture[:1, :1, 0])  # either way


def test_nothing_at_all(encoder):
    for given in ([], (), np.empty((0, 8, 9, 3), np.uint8), np.empty((0, 8, 9), np.uint8)):
        files = encoder.encode(given)
        assert len(files) == 0 and list(files) == files[:] == files.sizes == []
        assert len(files.buffer) == 0 and on_host(files.offsets).tolist() == [0]
        assert len(encoder.reconstruct(given)) == 0


@pytest.mark.parametrize(
    ("given", "layout", "message"),
    [
        ((16, 24, 3), "auto", "(16, 24, 3), which fits both (N, H, W) and (H, W, C): say which by layout="),
        ((9, 8, 1), "auto", "(9, 8, 1), which fits both (N, H, W) and (H, W, C): say which by layout='HW' or 'HWC'"),
        ((2, 3, 9, 3), "auto", "(2, 3, 9, 3), which fits both (N, H, W, C) and (N, C, H, W): say which by layout="),
        ([(8, 9, 3), (3, 9, 3)], "auto", "(3, 9, 3) as picture 1, which fits both (H, W, C) and (C, H, W): say"),
        ([(1, 9, 3)], "auto", "(1, 9, 3) as picture 0, which fits both (H, W, C) and (C, H, W): say which by"),
        ((5, 8, 9, 3), "CHW", "(5, 8, 9, 3), expected uint8 (N, 3, H, W) or (3, H, W) with layout 'CHW'"),
        ((5, 8, 9, 3), "HW", "(5, 8, 9, 3), expected uint8 (N, H, W) or (H, W) with layout 'HW'"),
        ([(8, 9), (3, 8, 9)], "HWC", "(3, 8, 9) as picture 1, expected uint8 (H, W, 3) or (H, W) with layout 'HWC'"),
        ([(8, 9), (2, 8, 9, 3)], "auto", "(2, 8, 9, 3) as picture 1, expected uint8 (H, W, 3) or (3, H, W) or"),
        ([(8, 9), (9,)], "auto", "(9,) as picture 1, expected uint8"),
        ((2, 3, 4, 5, 3), "auto", "(2, 3, 4, 5, 3), expected uint8 (N, H, W, 3) or (N, H, W) or (N, 3, H, W), or"),
        ((7,), "auto", "(7,), expected uint8 (N, H, W, 3)"),
        ((), "auto", "(), expected uint8 (N, H, W, 3)"),
    ],
)  # fmt: skip
def test_shapes_that_are_refused(encoder, given, layout, message):
    arrays = [np.zeros(shape, np.uint8) for shape in given] if isinstance(given, list) else np.zeros(given, np.uint8)
    for call in (encoder.encode, encoder.reconstruct):
        with pytest.raises(InputError) as refused:
            call(arrays, layout)
        assert str(refused.value).startswith(f"images: got uint8 {message}") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 0, 0, 3), np.uint8), "got 0x0, expected 1 to 65,500 pixels a side"),
        (
            [np.zeros((3, 4), np.uint8), np.zeros((0, 4), np.uint8)],
            "got 4x0 as picture 1, expected 1 to 65,500 pixels",
        ),
        (np.zeros((1, 65501, 1), np.uint8)[..., None], "got 1x65501, expected 1 to 65,500 pixels a side"),
        (
            [np.zeros((8, 9, 3))],
            "got float64 (8, 9, 3) as picture 0, expected uint8 (H, W, 3) or (3, H, W) or (H, W)",
        ),
        ([["a"]], "got <U1 (1,) as picture 0, expected uint8 (H, W, 3)"),
        ([[[1], [2, 3]]], "got list as picture 0, expected uint8 (H, W, 3) or (3, H, W) or (H, W): setting an array"),
        (None, "got object (), expected uint8 (N, H, W, 3)"),
        ("photos", "got <U6 (), expected uint8 (N, H, W, 3)"),
        ({"a": 1}, "got object (), expected uint8 (N, H, W, 3)"),
    ],
)
def test_what_is_no_picture_is_refused(encoder, given, message):
    for call in (encoder.encode, encoder.reconstruct):
        with pytest.raises(InputError) as refused:
            call(given)
        assert str(refused.value).startswith(f"images: {message}") and "\n" not in str(refused.value)


def test_layouts_that_there_are_not(encoder):
    for layout in ("NHWC", "hwc", "", None, 3):
        with pytest.raises(OptionError, match=r"^layout: got .*, expected auto, HWC, CHW, HW$"):
            encoder.encode(np.zeros((1, 8, 8), np.uint8), layout)


def test_arrays_wherever_they_are(as_card, mixed):
    expected = [by_pillow(picture) for picture in mixed]
    forms = (lambda p: p, on_card, lambda p: ByDlpack(p, 2), lambda p: ByDlpack(p, 1))
    batch = np.stack([mixed[0], mixed[0][::-1]])
    for device in ("cpu", "cuda"):
        encoder = JpegEncoder(60, "422", True, device)
        for form in forms:
            assert list(encoder.encode([form(picture) for picture in mixed])) == expected
            assert list(encoder.encode(form(batch))) == [expected[0], by_pillow(batch[1])]
        everywhere = [form(picture) for picture, form in zip(mixed, itertools.cycle(forms), strict=False)]
        files = encoder.encode(everywhere)
        assert list(files) == expected and isinstance(files.buffer, Card) == (device == "cuda")
        assert {isinstance(seen, Card) for seen in encoder.reconstruct(everywhere)} == {device == "cuda"}


def test_tensors(encoder, mixed):
    torch = pytest.importorskip("torch")
    where = "cuda:0" if type(encoder._cuda).__name__ == "CudaJpeg" else "cpu"
    tensors = [torch.from_numpy(np.ascontiguousarray(chw(picture))).to(where) for picture in mixed]
    files, expected = encoder.encode(tensors), [by_pillow(picture) for picture in mixed]
    assert list(files) == expected
    if encoder.device == where:
        made = torch.from_dlpack(files.buffer).split(files.sizes)  # as torchvision.io.encode_jpeg gives them
        assert [bytes(tensor.cpu().numpy()) for tensor in made] == expected and made[0].dtype == torch.uint8
        assert str(made[0].device) == where


def test_files_by_index_and_slice(encoder, mixed):
    files, expected = encoder.encode(mixed), [by_pillow(picture) for picture in mixed]
    count = len(expected)
    for index in (0, 3, -1, -count, np.int64(2)):
        assert files[index] == expected[index]
    for part in (slice(2, 5), slice(None), slice(None, None, -1), slice(-3, 1, -2), slice(5, 5), slice(9, 999, 3)):
        assert files[part] == expected[part]
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"file {index} of {count}"):
            files[index]
    with pytest.raises(TypeError):
        files[1.0]


def test_files_on_the_host_can_be_written_to_and_shared(pictures):
    files = JpegEncoder(device="cpu").encode(pictures)
    assert files.buffer.flags.writeable
    shared = np.from_dlpack(files.buffer)
    assert np.shares_memory(shared, files.buffer)


def test_jax_takes_files_on_the_host(pictures):
    jax = pytest.importorskip("jax")
    files = JpegEncoder(device="cpu").encode(pictures)
    np.testing.assert_array_equal(jax.dlpack.from_dlpack(files.buffer), files.buffer)


def test_files_on_a_card_are_read_after_the_stream_that_makes_them(mixed, as_card, monkeypatch):
    event, log, get = as_card.cuda.Event.return_value, [], Card.get
    files = JpegEncoder(device="cuda").encode(mixed)
    event.record.assert_called_once_with()
    monkeypatch.setattr(Card, "get", lambda self: log.append("copy") or get(self))
    as_card.cuda.get_current_stream.return_value.wait_event = lambda given: log.append(given)
    assert list(files)[2] == files[2] == files[2:3][0] and len(files.sizes) == len(files)
    assert log == [event, "copy"] * 7  # offsets and bytes thrice, and offsets


def test_tables_for_many_sizes_do_not_pile_up(cupy, monkeypatch):  # noqa: F811
    launched = []
    monkeypatch.setattr(cuda, "kernel", lambda stem, name: lambda grid, block, arguments: launched.append(arguments))
    jpeg = cuda.CudaJpeg(75, "420", False)
    first = jpeg._setup(1, 1, 3)
    for side in range(2, 300):
        jpeg._setup(side, side, 3)
        assert jpeg._setup(1, 1, 3) is first  # used all the time
    assert len(jpeg._setups) == cuda._SETUPS and len(launched) == 299
    jpeg._setup(2, 2, 3)
    assert len(jpeg._setups) == cuda._SETUPS and len(launched) == 300


@pytest.mark.parametrize(
    "shape", [(5,), (), (4, 4), (2, 4, 4, 1), (2, 4, 4, 4), (1, 2, 4, 4, 3), (1, 0, 4), (1, 4, 65501)]
)
def test_the_kernels_get_nothing_else(shape):
    with pytest.raises(InputError, match="pictures: got"):
        cuda._checked(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("given", [np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((1, 8, 8))])
def test_the_encoder_refuses_what_is_no_batch_of_pictures(given):
    encoder = JpegEncoder(device="cpu")
    for call in (encoder.encode, encoder.reconstruct):
        with pytest.raises(InputError, match=r"images: got .*, expected uint8 \(N, H, W, 3\) or \(N, H, W\)"):
            call(given)
