"""Run one command and say what it cost: python comparison_launch.py CPU_SECONDS REPORT COMMAND...

A process of its own, because Linux counts the memory of whoever forks into that of the child: this one holds next to
nothing. REPORT gets JSON: exit code, wall seconds, CPU seconds (user and system, with all children that it waited for),
and the largest resident memory of the command or of one of its children. Past the limit the command is killed; it is
one of CPU seconds, because others may use the machine too, with ten times as long by the clock as a last resort.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time


def main() -> None:
    limit, report, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
        os.execvp(command[0], command)
    late = False

    def kill(*_: object) -> None:
        nonlocal late
        late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, 10 * limit)
    _, status, usage = os.wait4(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    found = {
        "exit": os.waitstatus_to_exitcode(status),
        "late": late or usage.ru_utime + usage.ru_stime > 0.95 * limit,
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "memory_mb": round(usage.ru_maxrss / 1024, 1),
    }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
