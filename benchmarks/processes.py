"""Scripts in processes of their own, whose peak memory is theirs alone."""

from __future__ import annotations

import subprocess
import sys

# Not `ru_maxrss`: a child starts with its parent's peak there, and this process holds much.
_PEAK = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def run_alone(script: str, *arguments: object) -> tuple[list[float], int]:
    """The numbers that ``script`` prints, and the most memory that its process held, in bytes."""
    command = [sys.executable, "-c", script + _PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    return [float(number) for number in printed[:-1]], 1024 * int(printed[-1])
