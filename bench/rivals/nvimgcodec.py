"""nvImageCodec: NVIDIA's own encoder, which is nvJPEG underneath."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import SYNCHRONISED, Contender, Job, Offer
from work import RECIPE, EncodeWork, Mismatch

__all__ = ["RIVAL"]


def encode(work: EncodeWork, device: str, workers: int) -> Job:
    """The same quality, subsampling and optimal tables; a list of pictures a call."""
    from nvidia import nvimgcodec as codec

    if work.kind == "RGB":
        form = {"chroma_subsampling": codec.ChromaSubsampling.CSS_420}
    else:
        form = {"chroma_subsampling": codec.ChromaSubsampling.CSS_GRAY, "color_spec": codec.ColorSpec.GRAY}
    parameters = codec.EncodeParams(
        quality_type=codec.QualityType.QUALITY, quality_value=RECIPE.quality,
        jpeg_encode_params=codec.JpegEncodeParams(optimized_huffman=True), **form,
    )  # fmt: skip
    encoder = codec.Encoder()
    batches = [list(b if b.ndim == 4 else b[..., None]) for b in work.batches]
    images = [codec.as_images(batch) for batch in batches]

    def files(given: list[Any]) -> list[Any]:
        made = encoder.encode(given, "jpeg", params=parameters)
        if any(file is None for file in made):
            raise Mismatch(f"{sum(file is None for file in made)} of {len(made)} pictures were not encoded")
        return made

    def output(turn: int, picks: np.ndarray) -> list[bytes]:
        return [bytes(file) for file in files(codec.as_images([batches[turn][int(pick)] for pick in picks]))]

    return Job(
        lambda turn: files(images[turn]), output, SYNCHRONISED, "its files come to the host, ours stay on the card"
    )


RIVAL = Contender(
    "nvImageCodec", ("cupy", "nvidia.nvimgcodec"), "nvidia-nvimgcodec-cu13 nvidia-nvjpeg",
    {"encode": (Offer(encode, ("cuda",)),)},
)  # fmt: skip
