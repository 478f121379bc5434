"""Which devices ``--device`` names, where it may name several."""

from __future__ import annotations

import re

from gpufgbg.exceptions import DeviceError, OptionError

__all__ = ["several_devices"]

_LISTS = re.compile(r"cuda:(all|\d+(,\d+)+)|cpu(,cpu)+")


def several_devices(device: str) -> tuple[str, ...]:
    """The devices of ``cuda:all`` or of a list, ``cuda:0,2`` or ``cpu,cpu``; none where ``device`` is no such name.

    Raises
    ------
    OptionError
        A card is named twice.
    DeviceError
        A card is not there.
    """
    if not isinstance(device, str) or not _LISTS.fullmatch(device):
        return ()
    if device.startswith("cpu"):
        return tuple(device.split(","))
    from gpufgbg.backends import cuda

    numbers = device.removeprefix("cuda:").split(",")
    if numbers == ["all"]:
        numbers = [str(index) for index in range(max(1, cuda.count_devices()))]
    for number in numbers:
        if numbers.count(number) > 1:
            raise OptionError("device", f"got {device!r}: names card {number} twice")
        reason = cuda.why_not(int(number))
        if reason is not None:
            raise DeviceError(f"device cuda:{number}: {reason}; or use device cpu")
    return tuple(f"cuda:{number}" for number in numbers)
