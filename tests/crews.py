"""Runs whose shards are short, and whose retries are quick, in workers and drivers of their own processes too."""

from __future__ import annotations

import sys

SHARD = 7  # samples
_SHORT = (
    f"import sys; from gpufgbg import recipe; recipe._SHARD_SAMPLES = {SHARD}; "
    "from gpufgbg.remote import store; store._WAIT_S = 0.01; "
)
#: runs a worker process
WORKER = (sys.executable, "-c", f"{_SHORT}from gpufgbg.scaleout.worker import main; sys.exit(main(sys.argv[1:]))")
#: runs the command line; its worker processes are of that kind
CLI = (
    sys.executable,
    "-c",
    f"{_SHORT}from gpufgbg.scaleout import processes; processes.COMMAND = {WORKER!r}; "
    "from gpufgbg.cli import main; sys.exit(main())",
)


def short_actor(folder: str) -> type:
    """What a Ray worker runs, with short shards; leaves its process's number in ``folder``."""
    from gpufgbg.scaleout import cluster

    class Short(cluster._Actor):  # in a function, so that Ray sends it by value
        def __init__(self, job: object, device: str) -> None:
            import os
            from pathlib import Path

            from gpufgbg import recipe

            recipe._SHARD_SAMPLES = 7
            Path(folder, str(os.getpid())).touch()
            cluster._Actor.__init__(self, job, device)

    return Short


def main() -> None:
    """A driver of a Ray cluster on the command line; the first argument is `short_actor`'s folder."""
    from gpufgbg import recipe
    from gpufgbg.cli import main
    from gpufgbg.scaleout import cluster

    recipe._SHARD_SAMPLES = SHARD
    cluster._Actor = short_actor(sys.argv.pop(1))
    sys.exit(main())


if __name__ == "__main__":
    main()
