"""`python -m benchmarks.communication MODEL DEVICES...`: what a training step sends, read off its compiled program.

Fake devices share the machine's cores, so only the volume means anything. $XLA_FLAGS has to provide as many.
"""

import json
import sys
from collections import defaultdict
from typing import Any, cast

import jax
from jax.sharding import AxisType

from benchmarks.hlo import collectives
from benchmarks.train import digits_of, recipe_of
from train.config import ModelName
from train.loop import Learner

BATCH = 100  # another one would send the same


def sent(model: ModelName, devices: int) -> dict[str, Any]:
    """Bytes and operations of each kind in a step on one of the devices, and the bytes of all parameters."""
    mesh = jax.make_mesh((devices,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:devices])
    learner = Learner(model, recipe_of(BATCH), digits_of(BATCH), seed=0, mesh=mesh)
    volume, operations = defaultdict(int), defaultdict(int)
    for found in collectives(learner._step):
        volume[found.kind] += found.bytes
        operations[found.kind] += 1
    return {"devices": devices, "sent": volume, "operations": operations, "parameters": 4 * learner.parameters}


if __name__ == "__main__":
    print(json.dumps([sent(cast(ModelName, sys.argv[1]), int(devices)) for devices in sys.argv[2:]]))
