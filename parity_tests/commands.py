"""Commands in processes of their own, as a user has them: one device, no data folder."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
HIDDEN = ("XLA_FLAGS", "JAXLOSS_DATA_DIR")


def start_python(
    *arguments: str | Path, cwd: Path = ROOT, cache: Path | None = None, limit: str = ""
) -> subprocess.Popen[str]:
    """Python with these arguments, in a folder, with a cache folder for its user, and a shell's limits."""
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN} | {"PYTHONPATH": str(ROOT)}
    if cache:
        environment["XDG_CACHE_HOME"] = str(cache)
    command = ["bash", "-c", f'{limit} exec "$@"', "bash", sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=pipe, stderr=pipe)


start_training = partial(start_python, "-m", "train")
