"""Workers as processes of this machine, one a device."""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from gpufgbg.children import Child
from gpufgbg.scaleout.driver import Member
from gpufgbg.scaleout.worker import Job

__all__ = ["ProcessCrew"]

#: what runs a worker
COMMAND = (sys.executable, "-m", "gpufgbg.scaleout.worker")
_TAKE = "take the job"


class _Link(Child):
    def __init__(self, device: str, job: int) -> None:
        self.device = device
        super().__init__(COMMAND, [job, device], [job])


class ProcessCrew:
    """A process for each of ``devices``; one that is lost is replaced.

    The processes start at once and load what they need for any job, while the caller prepares theirs.

    Parameters
    ----------
    devices : sequence of str
        Such as ``cuda:0``; one may be named several times.

    Raises
    ------
    OSError
        The system refuses another process.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._job = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        self._open: dict[Connection, Member] = {}
        try:
            self._early = [self._start(device) for device in devices]
        except BaseException:
            self.close()
            raise

    def take(self, job: Job) -> None:
        """What is to be done; kept in a file without a name that all processes read. Before `start`."""
        pickle.dump(job, self._job)
        self._job.flush()

    def start(self) -> list[Member]:
        """Set all processes to the job."""
        for member in self._early:
            self.send(member, _TAKE)
        return self._early

    def _start(self, device: str) -> Member:
        link = _Link(device, self._job.fileno())
        member = self._open[link.connection] = Member(device, link)
        return member

    def wait(self, timeout_s: float) -> list[tuple[Member, tuple[Any, ...]]]:
        """One message of each process that has any."""
        found: list[tuple[Member, tuple[Any, ...]]] = []
        for connection in wait(list(self._open), timeout_s):
            assert isinstance(connection, Connection)
            member = self._open[connection]
            try:
                found.append((member, connection.recv()))
            except (EOFError, OSError):
                found.append((member, ("lost", f"ended with code {member.link.process.wait()}")))
                del self._open[connection]
        return found

    def send(self, member: Member, message: Any) -> None:
        """Send a message."""
        with suppress(OSError):
            member.link.connection.send(message)

    def drop(self, member: Member) -> None:
        """Kill the process and wait for its end."""
        self._open.pop(member.link.connection, None)
        member.link.end()  # also where it is stopped

    def replace(self, member: Member) -> Member:
        """Start another process on the device."""
        other = self._start(member.link.device)
        self.send(other, _TAKE)
        return other

    def close(self) -> None:
        """Kill all processes."""
        for member in list(self._open.values()):
            self.drop(member)
        self._job.close()
