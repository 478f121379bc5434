"""The command, also as ``python -m gpufgbg``: from its first moment on Ctrl-C is a line, not a traceback."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line and return its exit code; see `gpufgbg.cli.main`."""
    try:
        _mend_streams()
        from gpufgbg.cli import main as run  # 0.2 s and more

        return run()
    except KeyboardInterrupt:
        print("gpufgbg: interrupted", file=sys.stderr)
        return 130


def _mend_streams() -> None:
    """Standard streams that take any text: what is closed leads nowhere, what is not ASCII is escaped if need be."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        descriptor = 0
        while descriptor < 3:  # or the first files opened have their numbers, and get what is written to them
            descriptor = os.open(os.devnull, os.O_RDWR)
        os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
