"""Helper processes that run functions for the threads of this one.

One interpreter has one lock: from some four threads on, what Python itself does between reading and decoding small
files is the limit, whatever the cores. A helper (``python -m gpufgbg.helpers``) has a lock of its own. It gets a
function by its name and an argument, and sends back what the function returns or raises.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from gpufgbg.children import Child, parent_of

__all__ = ["Helpers"]

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

_COMMAND = (sys.executable, "-m", "gpufgbg.helpers")


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
        self._all: list[Child] = []
        self._welcoming: list[threading.Thread] = []
        self._ready: queue.SimpleQueue[Child] = queue.SimpleQueue()
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
            helper.connection.send((function, argument))
            good, result = helper.connection.recv()
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
            for _ in range(self._count):
                try:
                    helper = Child(_COMMAND)
                except OSError:  # too many processes, or files: what there are must do
                    self._count = len(self._all)
                    return
                self._all.append(helper)
                self._welcoming.append(threading.Thread(target=self._welcome, args=(helper,), daemon=True))
                self._welcoming[-1].start()

    def _welcome(self, helper: Child) -> None:
        with contextlib.suppress(EOFError, OSError):
            helper.connection.recv()
            self._ready.put(helper)

    def close(self) -> None:
        """End the processes; no call may be under way."""
        with self._lock:
            self._closed = True
        for helper in self._all:
            helper.process.kill()
        for thread in self._welcoming:
            thread.join()
        for helper in self._all:
            helper.end()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(arguments: list[str]) -> int:
    """Serve one parent: `children.parent_of`'s arguments."""
    connection = parent_of(*arguments)
    import gpufgbg.decoding  # noqa: F401  # before the first call waits for it

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        connection.send("ready")
        while True:
            function, argument = connection.recv()
            try:
                answer = pickle.dumps((True, function(argument)), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = pickle.dumps((False, error))
            connection.send_bytes(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
