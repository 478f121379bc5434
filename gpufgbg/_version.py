"""Versions of what decides bytes."""

from __future__ import annotations

from importlib import metadata

__all__ = ["__version__", "versions"]

try:
    __version__ = metadata.version("gpufgbg")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def versions() -> dict[str, str]:
    """Versions of gpufgbg and of the libraries whose arithmetic the bytes go through."""
    import imagecodecs
    from PIL import features

    return {
        "gpufgbg": __version__,
        "pillow": metadata.version("pillow"),
        "pillow_libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none",
        "imagecodecs": metadata.version("imagecodecs"),
        "libjpeg_turbo": imagecodecs.jpeg8_version().split()[-1],
    }
