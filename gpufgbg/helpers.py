"""Helper processes that run functions for the threads of this one.

One interpreter has one lock: from some four threads on, what Python itself does between reading and decoding small
files is the limit, whatever the cores. A helper has a lock of its own. It gets a function by its name and an
argument, and sends back what the function returns or raises.

On Linux one process (``python -m gpufgbg.helpers``) imports what is needed, once, and forks the helpers: they end
with it, and it ends with this process. Elsewhere each helper is such a process, which imports everything again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from gpufgbg.children import Child, end_with, parent_of

__all__ = ["Helpers"]

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

_COMMAND = (sys.executable, "-m", "gpufgbg.helpers")
_FORKS = sys.platform == "linux"
_PATIENCE_S = 10.0  # until what was asked to end its forks is killed


class Helpers:
    """Processes that take calls from any thread; where none is ready, the thread does it itself.

    Nothing is started before the first ``after`` items were asked for: a process takes some tenths of a second to
    begin. A helper that dies is not missed: its call is done here, and others take those that come after it.

    Parameters
    ----------
    count : int
        Processes, and threads that call; with 0 or 1 none is started.
    after : int
        Items, as `call` counts them, that are worth no process.
    """

    def __init__(self, count: int, after: int = 8192) -> None:
        self._count = count if count > 1 and os.name == "posix" else 0
        self._after = after
        self._asked = 0
        self._lock = threading.Lock()
        self._children: list[Child] = []  # with forks, what makes them
        self._forked = False
        self._all: list[Connection] = []  # one a helper
        self._welcoming: list[threading.Thread] = []
        self._ready: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._closed = False

    def call(self, function: Callable[[_Argument], _Result], argument: _Argument, items: int = 1) -> _Result:
        """``function(argument)``, in a helper if one is ready; raises what the function raises.

        The function is a module's own, of this package; argument and result can be pickled.
        """
        self._begin(items)
        try:
            helper = self._ready.get_nowait()
        except queue.Empty:
            return function(argument)
        try:
            helper.send((function, argument))
            good, result = helper.recv()
        except (EOFError, OSError):  # it is gone
            return function(argument)
        self._ready.put(helper)
        if not good:
            raise result
        found: _Result = result
        return found

    def _begin(self, items: int) -> None:
        """Start the processes when it is time."""
        with self._lock:
            self._asked += items
            if self._all or not self._count or self._closed or self._asked <= self._after:
                return
            try:  # too many processes, or files: what there are must do
                if _FORKS:
                    self._start_forks()
                else:
                    for _ in range(self._count):
                        self._start(Child(_COMMAND))
            except OSError:
                self._count = len(self._all)

    def _start_forks(self) -> None:
        ours: list[Connection] = []
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as unused:
            descriptors = []
            for _ in range(self._count):
                here, there = socket.socketpair()
                descriptors.append(theirs.enter_context(there).fileno())
                ours.append(unused.enter_context(Connection(here.detach())))
            child = Child(_COMMAND, descriptors, descriptors)
            unused.pop_all()
        self._start(child, ours)

    def _start(self, child: Child, helpers: Sequence[Connection] = ()) -> None:
        self._children.append(child)
        self._all.extend(helpers or [child.connection])
        self._welcoming.append(threading.Thread(target=self._welcome, args=(child, helpers), daemon=True))
        self._welcoming[-1].start()

    def _welcome(self, child: Child, forks: Sequence[Connection]) -> None:
        with contextlib.suppress(EOFError, OSError):
            child.connection.recv()  # it has imported everything
            if not forks:
                self._ready.put(child.connection)
                return
            with self._lock:
                if self._closed:  # and can be killed: it has no forks yet
                    return
                self._forked = True
                child.connection.send("fork")
        for helper in forks:
            with contextlib.suppress(EOFError, OSError):
                helper.recv()
                self._ready.put(helper)

    def close(self) -> None:
        """End the processes; no call may be under way."""
        with self._lock:
            self._closed = True
        for child in self._children:
            if self._forked:  # its forks are its own to wait for
                with contextlib.suppress(EOFError, OSError):
                    child.connection.send("end")
                    child.connection.poll(_PATIENCE_S)
            child.process.kill()
        for thread in self._welcoming:
            thread.join()
        for child in self._children:
            child.end()
        for helper in self._all:
            helper.close()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(arguments: list[str]) -> int:
    """Serve one parent: `children.parent_of`'s arguments, and with forks the number of each one's socket."""
    connection = parent_of(*arguments[:2])
    for library in ("OPENBLAS", "OMP", "MKL"):  # no threads that a fork would lack; there is nothing for them here
        os.environ[f"{library}_NUM_THREADS"] = "1"
    # Numba looks whether SciPy has BLAS, by importing a part of it that takes as long as Numba itself.
    sys.modules["scipy.linalg.cython_blas"] = None  # type: ignore[assignment]
    gc.disable()
    _warm_up()
    gc.freeze()  # what is there stays, and forks share it as long as it is left alone
    gc.enable()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        connection.send("ready")
        if len(arguments) == 2:
            _serve(connection)
        else:
            _fork(connection, [int(descriptor) for descriptor in arguments[2:]])
    return 0


def _warm_up() -> None:
    """Import and load all that helpers are asked for, before the first call waits for it."""
    import imagecodecs
    import numpy as np

    import gpufgbg.decoding_dali  # noqa: F401
    from gpufgbg.backends.cpu import Counter
    from gpufgbg.plain_jpeg import plain_jpegs

    pixels = np.zeros((16, 16, 3), np.uint8)
    file = bytes(imagecodecs.jpeg8_encode(pixels))
    Counter(3).add(imagecodecs.jpeg8_decode(file))
    plain_jpegs([file])


def _fork(connection: Connection, descriptors: list[int]) -> None:
    """Fork a helper for each socket when told to; end them when told to, or when the parent is gone."""
    connection.recv()
    maker, forks = os.getpid(), []
    while descriptors:
        try:
            fork = os.fork()
        except OSError:  # too many processes: what there are must do
            break
        if not fork:
            end_with(maker)
            connection.close()
            for other in descriptors[1:]:  # the end of who else holds a socket is not told to its other side
                os.close(other)
            helper = Connection(descriptors[0])
            helper.send("ready")
            _serve(helper)
            return
        forks.append(fork)
        os.close(descriptors.pop(0))
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    for fork in forks:  # not waited for until now, so the numbers are theirs
        os.kill(fork, signal.SIGKILL)
    for fork in forks:
        os.waitpid(fork, 0)


def _serve(connection: Connection) -> None:
    """Do what is asked for."""
    while True:
        function, argument = connection.recv()
        try:
            answer = pickle.dumps((True, function(argument)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((False, error))
        connection.send_bytes(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
