"""Helper processes that don't outlive the process that started them, however it ends."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Have this process killed as soon as its parent is gone, even where that is killed.

    A helper that goes on with what it was given would write where the parent's successor writes by then. On Linux the
    kernel sees to it, when the thread ends that started this process; elsewhere a helper ends with its next message.

    Parameters
    ----------
    parent : int
        The parent's process number, told by itself: it may be gone already.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
