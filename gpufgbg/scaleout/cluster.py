"""Workers as Ray actors: one a GPU of the cluster, or one a machine where no machine has any.

Machines that join later get workers too. What the workers need, the prepared pictures and the file of weights, is
put into Ray's object store once. The data set lies in a folder that all machines have under one path, or in a store.
"""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gpufgbg.exceptions import DeviceError, OptionError, printable
from gpufgbg.scaleout.driver import Member
from gpufgbg.scaleout.worker import Job, serve

__all__ = ["RayCrew", "connected"]

_POLL_S = 5.0  # that a worker waits for something to say
_CONNECT_S = 10.0
_SETTINGS = b"\x04"  # a type of frame
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)  # and no settings
_LOOK_S = 5.0  # between two looks for machines that have joined


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at ``address``, or of one of this machine alone for ``local``, inside the block.

    Raises
    ------
    DeviceError
        Ray is not installed, or nobody answers.
    """
    try:
        import ray
    except ImportError:
        raise DeviceError("--ray: Ray is not installed (pip install 'gpufgbg[ray]')") from None
    if not address:
        raise OptionError("ray", "got an empty address, expected local, auto or HOST:PORT")
    if ray.is_initialized():  # the caller's own connection, which stays
        yield
        return
    _check_answers(address)
    # Workers import what this process imports.
    environment = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}} if "PYTHONPATH" in os.environ else None
    try:
        ray.init(
            address=None if address == "local" else address,
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
            runtime_env=environment,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _no_answer(address, reason) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise `DeviceError` where no cluster listens at HOST:PORT: Ray itself would try for minutes.

    Ray speaks gRPC, and so HTTP/2 (RFC 9113, section 3.4): the server's first frame is SETTINGS. Under TLS that would
    need the cluster's certificates, so there a connection will do.
    """
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not match:
        return
    try:
        with socket.create_connection((match[1].strip("[]"), int(match[2])), _CONNECT_S) as link:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                link.sendall(_PREFACE)
                first = link.recv(9, socket.MSG_WAITALL)
                if first[3:4] != _SETTINGS:
                    raise OSError("something else than Ray listens there")
    except TimeoutError:
        raise _no_answer(address, f"no answer within {_CONNECT_S:.0f} s") from None
    except (OSError, OverflowError) as error:
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, reason: str) -> DeviceError:
    return DeviceError(
        f"--ray {printable(address)}: no cluster answers: {printable(reason)}: expected local, auto, or HOST:PORT of "
        "a cluster's head (ray start --head)"
    )


class _Mailbox:
    """The worker's channel inside its actor: `serve` runs in a thread, the actor's methods pass messages."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, message: Any) -> None:
        self.outbox.put(message)

    def recv(self) -> Any:
        return self.inbox.get()


class _Actor:
    """What Ray runs: a worker in a thread, and its two mailboxes."""

    def __init__(self, job: Job, device: str) -> None:
        self._mailbox = _Mailbox()
        threading.Thread(target=serve, args=(self._mailbox, job, device), daemon=True).start()

    def put(self, message: Any) -> None:
        """A message of the driver."""
        self._mailbox.inbox.put(message)

    def poll(self) -> list[Any]:
        """Messages for the driver; waits a while for one."""
        messages: list[Any] = []
        with suppress(queue.Empty):
            messages.append(self._mailbox.outbox.get(timeout=_POLL_S))
            while True:
                messages.append(self._mailbox.outbox.get_nowait())
        return messages


class RayCrew:
    """Workers of a cluster that this process is connected to.

    Parameters
    ----------
    job : Job
        Its ``workers`` are replaced by the processors of each worker's share of a machine.
    """

    def __init__(self, job: Job) -> None:
        import ray

        self._ray = ray
        self._job = job
        self._put: dict[int, Any] = {}  # the job in the object store, by its workers
        self._polls: dict[Any, Member] = {}
        self._machines: set[str] = set()
        self._looked = 0.0

    def start(self) -> list[Member]:
        """Start a worker for each GPU, or for each machine where there are none."""
        members = self._join()
        if not members:
            raise DeviceError("--ray: the cluster has no machine with a free processor")
        return members

    def _join(self) -> list[Member]:
        """Workers on the machines that have none yet."""
        self._looked = time.monotonic()
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        on_cards = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        members = []
        for node in nodes:
            cards = int(node["Resources"].get("GPU", 0))
            if node["NodeID"] in self._machines or (on_cards and not cards):
                continue
            self._machines.add(node["NodeID"])
            share = max(1, int(node["Resources"]["CPU"]) // max(1, cards))
            name = node["NodeManagerAddress"]
            if cards:
                members += [self._start(node["NodeID"], f"cuda on {name}", share, "cuda") for _ in range(cards)]
            else:
                members.append(self._start(node["NodeID"], f"cpu on {name}", share, "cpu"))
        return members

    def _start(self, node: str, name: str, processors: int, device: str) -> Member:
        import dataclasses

        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if processors not in self._put:
            self._put[processors] = self._ray.put(dataclasses.replace(self._job, workers=processors))
        options = {
            "num_cpus": processors,
            "num_gpus": 1 if device == "cuda" else 0,
            "max_concurrency": 4,  # messages to a worker that is asked for its own
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        actor = self._ray.remote(**options)(_Actor).remote(self._put[processors], device)
        member = Member(name, (actor, node, processors, device))
        self._poll(member)
        return member

    def _poll(self, member: Member) -> None:
        self._polls[member.link[0].poll.remote()] = member

    def wait(self, timeout_s: float) -> list[tuple[Member, tuple[Any, ...]]]:
        """Messages of all workers that have some."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._join()  # the driver meets them when they are ready
        if not self._polls:
            time.sleep(timeout_s)
            return []
        found: list[tuple[Member, tuple[Any, ...]]] = []
        done, _ = self._ray.wait(list(self._polls), num_returns=1, timeout=timeout_s)
        more, _ = self._ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        for poll in dict.fromkeys([*done, *more]):
            member = self._polls.pop(poll)
            try:
                messages = self._ray.get(poll)
            except self._ray.exceptions.RayError as error:
                reason = (str(error).strip().splitlines() or [""])[0].rstrip(".:")
                found.append((member, ("lost", reason or type(error).__name__)))
                continue
            found += [(member, message) for message in messages]
            self._poll(member)
        return found

    def send(self, member: Member, message: Any) -> None:
        """Send a message."""
        member.link[0].put.remote(message)

    def drop(self, member: Member) -> None:
        """Kill the actor; where its machine can't be reached, it is left to find its folder gone."""
        for poll in [poll for poll, other in self._polls.items() if other is member]:
            del self._polls[poll]
        self._ray.kill(member.link[0], no_restart=True)

    def replace(self, member: Member) -> Member | None:
        """Start another actor on the machine, where that is still there."""
        _, node, processors, device = member.link
        if not any(other["NodeID"] == node and other["Alive"] for other in self._ray.nodes()):
            return None
        return self._start(node, member.name, processors, device)

    def close(self) -> None:
        """Kill all actors."""
        for member in list(self._polls.values()):
            self.drop(member)
