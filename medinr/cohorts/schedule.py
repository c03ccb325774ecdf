"""Runs the fits of a cohort until each is done or has failed twice."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medinr.cohorts import claims
from medinr.cohorts.launchers import Handle, Launcher
from medinr.cohorts.state import is_done, read_state, write_state

ATTEMPTS = 2
"""Of a fit in one call."""
POLL_S, LOOK_S = 0.2, 1.0
"""Seconds between two looks at this call's workers, and at those of others."""
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """What became of the fits: names."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Schedule:
    """The fits that one call is for. Its only memory that counts is on the disk; another call goes on from there.

    Args:
        folders: name -> folder of each fit.
        launcher: starts their workers.
        tell: is given one line for each fit that ends.
    """

    def __init__(self, folders: Mapping[str, Path], launcher: Launcher, tell: Tell = print) -> None:
        self.folders, self.launcher, self.tell = dict(folders), launcher, tell
        self.outcome = Outcome([name for name, folder in self.folders.items() if is_done(folder)])
        left = [name for name in self.folders if name not in self.outcome.done]
        self._elsewhere: dict[str, bool] = {}  # name -> whether its worker is on this machine
        for name in left:
            self._is_elsewhere(name)
        self._open = deque(name for name in left if name not in self._elsewhere)
        self._looked = 0.0
        self._running: dict[str, tuple[Handle, int]] = {}
        self._attempts = dict.fromkeys(left, 0)

    def run(self) -> Outcome:
        """Return when all fits have ended; KeyboardInterrupt passes after the workers were asked to stop."""
        while self._open or self._running or self._elsewhere:
            self._start()
            time.sleep(POLL_S)
            self._collect()
            self._look_elsewhere()
        return self.outcome

    def stop(self, seconds: float = 120.0) -> None:
        """Ask all workers to keep their states and to end; those that have not after so long are ended."""
        for handle, _ in self._running.values():
            handle.stop()
        end = time.monotonic() + seconds
        while any(not handle.finished() for handle, _ in self._running.values()) and time.monotonic() < end:
            time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        """End all workers at once; what their fits kept at the last epoch remains."""
        for handle, _ in self._running.values():
            if not handle.finished():
                handle.kill()

    # ------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        capacity = self.launcher.capacity
        if capacity is not None:
            # Workers that outlived a killed scheduler count where they share this machine.
            capacity -= len(self._running) + (sum(self._elsewhere.values()) if self.launcher.local else 0)
        chosen: list[str] = []
        while self._open and (capacity is None or len(chosen) < capacity):
            name = self._open.popleft()
            if not self._is_elsewhere(name):
                chosen.append(name)
        if not chosen:
            return
        handles = self.launcher.start([self.folders[name] for name in chosen])
        for name, handle in zip(chosen, handles, strict=True):
            self._running[name] = (handle, read_state(self.folders[name])["failures"])

    def _collect(self) -> None:
        for name, (handle, failures) in list(self._running.items()):
            if not handle.finished():
                continue
            del self._running[name]
            folder = self.folders[name]
            if not self._is_done(name):
                state = read_state(folder)
                if state["failures"] > failures:
                    self._failed(name, state["error"])
                elif (claim := claims.take(folder)) is None:
                    # Another scheduler was quicker, or the fit outlived its worker.
                    if not self._is_elsewhere(name):
                        self._open.appendleft(name)
                else:
                    write_state(folder, "failed", 0.0, handle.reason())
                    claim.release()
                    self._failed(name, handle.reason())

    def _look_elsewhere(self) -> None:
        """Fits that another scheduler's worker has: done, still under way, or free to be gone on with."""
        if time.monotonic() < self._looked + LOOK_S:
            return
        self._looked = time.monotonic()
        for name in sorted(self._elsewhere):
            if claims.holder(self.folders[name]) is None:
                del self._elsewhere[name]
                if not self._is_done(name):
                    self._open.appendleft(name)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether a worker that is not this call's has the fit; if so it is waited for."""
        holder = claims.holder(self.folders[name])
        if holder is not None:
            self._elsewhere[name] = holder.get("host") == claims.machine()["host"]
        return holder is not None

    def _is_done(self, name: str) -> bool:
        state = read_state(self.folders[name])
        if state["state"] != "done":
            return False
        self.outcome.done.append(name)
        self._say(f"{name}: done in {state['seconds']:.0f} s")
        return True

    def _failed(self, name: str, error: str) -> None:
        self._attempts[name] += 1
        if self._attempts[name] < ATTEMPTS:
            self._open.append(name)
            self.tell(f"{name}: {error}; once more")
        else:
            self.outcome.failed[name] = error
            self._say(f"{name}: failed: {error}")

    def _say(self, line: str) -> None:
        ended = len(self.outcome.done) + len(self.outcome.failed)
        self.tell(f"[{ended}/{len(self.folders)}] {line}")
