"""Child processes with a socket to each, which don't outlive the process that started them, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from gpufgbg.exceptions import GpufgbgError

__all__ = ["Child", "end_with", "parent_of", "portable_error"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child:
    """A process, and this process's end of the socket to it.

    Parameters
    ----------
    command : sequence of str
        What to run; the numbers of its socket and of this process are added, and then ``arguments``. It calls
        `parent_of` with them.
    arguments : sequence of str or int
    descriptors : sequence of int
        Open files that it inherits under their numbers.

    Attributes
    ----------
    process : Popen
    connection : Connection
        The caller closes it.

    Raises
    ------
    OSError
        The system refuses another process.
    """

    def __init__(
        self, command: Sequence[str], arguments: Sequence[str | int] = (), descriptors: Sequence[int] = ()
    ) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the child knows of `parent_of`
            try:
                self.process = subprocess.Popen(
                    [*command, *map(str, (theirs.fileno(), os.getpid(), *arguments))],
                    pass_fds=(theirs.fileno(), *descriptors),
                    stdin=subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.connection = Connection(ours.detach())

    def end(self) -> None:
        """Kill the process, wait for its end and close the connection; it may have ended, and be called twice."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def parent_of(descriptor: str, parent: str) -> Connection:
    """In a child: its end of the socket. From here on Ctrl-C is the parent's affair, and the child ends with it.

    A child that went on with what it was given would write where its parent's successor writes by then. On Linux the
    kernel kills it when the thread ends that started it, so also when the parent is killed; elsewhere it ends when it
    next reads from the socket.

    Parameters
    ----------
    descriptor, parent : str
        The first two arguments behind the command.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by `Child`; those that came are dropped
    end_with(int(parent))
    return Connection(int(descriptor))


def end_with(parent: int) -> None:
    """Let the kernel kill this process when ``parent``, which started it, ends; on Linux. A fork must ask anew."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


def portable_error(error: BaseException, where: str) -> Exception:
    """An error as another process can be sent it, to raise it there: ours and the system's as they are.

    Of any other, whose class may not be there or not travel, the text of its traceback in a `RuntimeError`; ``where``
    says what failed, such as ``"a worker"``.
    """
    if isinstance(error, GpufgbgError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    return RuntimeError(f"{where} failed:\n{''.join(traceback.format_exception(error))}")
