"""`python -m benchmarks.resident IMPLEMENTATION TOKENS FEATURES CLASSES`: bytes that a value with gradients takes.

The highest resident memory of the process during a call, less what it had before; of the second call, so that
compiling does not count. The results count: as much as the inputs and the weight take. Needs Linux's /proc, since the
`ru_maxrss` of a child process begins at what its parent had.
"""

import re
import sys
import time
from pathlib import Path

from benchmarks.linear import implementations

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SETTLES = 0.5  # seconds


def resident(kind: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the highest since it was reset."""
    return 1024 * int(re.search(rf"{kind}:\s*(\d+) kB", STATUS.read_text())[1])


def main(name: str, *sizes: int) -> None:
    """Print them."""
    call = implementations(sizes, "float32")[0][name]
    call()
    time.sleep(SETTLES)  # XLA's threads free a program's temporaries a little after its results are ready
    RESET.write_text("5")
    before = resident("VmRSS")
    call()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
