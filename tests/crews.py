"""Runs whose shards are short, in workers and drivers of their own processes too."""

from __future__ import annotations

import sys

SHARD = 7  # samples
_SHORT = f"import sys; from gpufgbg import recipe; recipe._SHARD_SAMPLES = {SHARD}; "
#: runs a worker process
WORKER = (sys.executable, "-c", f"{_SHORT}from gpufgbg.scaleout.worker import main; sys.exit(main(sys.argv[1:]))")
#: runs the command line; its worker processes are of that kind
CLI = (
    sys.executable,
    "-c",
    f"{_SHORT}from gpufgbg.scaleout import processes; processes.COMMAND = {WORKER!r}; "
    "from gpufgbg.cli import main; sys.exit(main())",
)
