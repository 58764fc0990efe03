"""Measurements that need a process of their own: cold starts, peak memory, fake devices."""

import json
import os
import subprocess
import sys
from typing import Any


def answer(module: str, *arguments: object, **environment: str) -> Any:
    """What `python -m module arguments...` prints last, read as JSON; a failure raises `CalledProcessError`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])
