"""Claims: of all processes that want one fit, on any number of machines, exactly one has it.

    claims/0001.json  {"host": ..., "space": ..., "pids": [[pid, started], ...], "released": false}

A claim is a numbered file made with O_EXCL. The newest one counts, and none is ever removed: whoever finds the newest
released or abandoned makes the next number, and again O_EXCL lets one process succeed. (Removing a dead process's file
and making it anew would let two processes do so in turn.) Needed of the file system: O_EXCL and rename are atomic.

A claim is alive while one of its processes is: on this machine by process id and start time. On another machine, or in
another container, by the file's time, which the owner renews; there it is abandoned after `SILENT_S`.
"""

import os
import re
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from medinr.cohorts.state import read_json, write_json

FOLDER = "claims"
SILENT_S = 300.0
"""Seconds without a sign of life after which a process of another machine counts as dead."""
BEAT_S = 20.0
"""Seconds between two signs of life."""
UNWRITTEN_S = 10.0
"""Seconds that a claim may be without content: its owner is about to write it, or died before it could."""


def machine() -> dict[str, str]:
    """Where process ids mean the same: a host, and on Linux a container's own numbering in it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {"host": socket.gethostname(), "space": space}


def started(pid: int) -> str | None:
    """When a process began, as its system counts; "" where the system does not tell, None without such a process."""
    if Path("/proc/self/stat").exists():
        try:
            # pid (command) state ppid ...: the command may hold spaces and brackets
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / FOLDER).glob("*.json") if re.fullmatch(r"\d+", p.stem))


def count(folder: Path) -> int:
    """How often a fit was begun or gone on with."""
    return len(_files(folder))


def _age(path: Path) -> float:
    """Seconds since a file was renewed, by the clock of the file server, which is not this machine's."""
    probe = path.with_name(f".{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink()


def _alive(path: Path) -> bool:
    record = read_json(path)
    if not record:
        return _age(path) < UNWRITTEN_S
    if record.get("released"):
        return False
    here = machine()
    if os.name == "posix" and all(record.get(key) == value for key, value in here.items()):
        return any(started(pid) == begin for pid, begin in record["pids"])
    return _age(path) < SILENT_S


def holder(folder: Path) -> dict[str, Any] | None:
    """The claim of a living process on a fit, None where there is none."""
    files = _files(folder)
    return read_json(files[-1]) if files and _alive(files[-1]) else None


class Claim:
    """This process's claim on a fit; see `take`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {**machine(), "pids": [[os.getpid(), started(os.getpid())]], "released": False}

    def add(self, pid: int) -> None:
        """Name a process that works for the claim: it holds it alone if this one is killed."""
        self.record["pids"].append([pid, started(pid)])
        self._write()

    def renew(self) -> bool:
        """Give a sign of life. False: another machine took this process for dead, and has the fit now."""
        with suppress(OSError):
            os.utime(self.path)
        return _files(self.path.parents[1])[-1] == self.path

    def release(self) -> None:
        self.record["released"] = True
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.record)


class Several:
    """The claims on a batch and its fits, held as one; see `Claim`."""

    def __init__(self, each: Sequence[Claim]) -> None:
        self.each = list(each)

    def add(self, pid: int) -> None:
        for claim in self.each:
            claim.add(pid)

    def renew(self) -> bool:
        held = [claim.renew() for claim in self.each]  # every one of them, also after one that is lost
        return all(held)

    def release(self) -> None:
        for claim in self.each:
            claim.release()


def take(folder: Path) -> Claim | None:
    """Claim a fit; None if a living process has it, or another one was quicker."""
    files = _files(folder)
    if files and _alive(files[-1]):
        return None
    number = int(files[-1].stem) + 1 if files else 1
    path = folder / FOLDER / f"{number:04d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return None
    claim = Claim(path)
    claim._write()
    return claim
