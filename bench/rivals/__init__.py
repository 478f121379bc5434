"""What people would use instead of gpufgbg: one module an integration, each a `Contender` named ``RIVAL``.

Their packages are imported only when a row of theirs is measured.
"""

from rivals import (
    albumentations,
    cvcuda,
    dali,
    kornia,
    loader,
    nvimgcodec,
    opencv,
    pillow,
    plain_numpy,
    pytorch,
    torchvision,
)

__all__ = ["RIVALS"]

RIVALS = (
    pillow.RIVAL,
    opencv.RIVAL,
    albumentations.RIVAL,
    plain_numpy.RIVAL,
    torchvision.RIVAL,
    pytorch.RIVAL,
    kornia.RIVAL,
    cvcuda.RIVAL,
    dali.RIVAL,
    nvimgcodec.RIVAL,
    loader.RIVAL,
)
