"""The losses as XLA compiles them for an H100 and a TPU v5e, of which neither has to be there: nothing runs.

Of a GPU's program it tells the kernels and the bytes that they read and write, of a TPU's the cycles that XLA estimates
for it. Needs `pip install 'jax[cuda12-local,tpu]'`, best in an environment of its own, where no JAX runs beside it.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.table import Table

from benchmarks.hlo import traffic
from benchmarks.losses import BOTH, KINDS, OURS, SHAPES, VALUE, Case, Kind, jitted
from benchmarks.processes import answer
from benchmarks.timing import LEFT_OUT

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


class Target(NamedTuple):
    """What to compile for."""

    name: str
    package: str  # with the compiler
    module: str  # of that package
    topology: dict[str, str]
    environment: dict[str, str]  # in which it needs no device


TARGETS = {
    "cuda": Target(
        "H100",
        "jax-cuda12-plugin",
        "jax_cuda12_plugin",
        {"target_config": H100, "topology": "1x1x1"},
        # As for a machine with a GPU, but for products, which are timed on one to choose their kernels.
        {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    ),
    "tpu": Target(
        "TPU v5e",
        "libtpu",
        "libtpu",
        {"topology_name": "v5e:2x2"},
        {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    ),
}
LEFT_OUT |= {
    target.name: f"needs {target.package}: pip install 'jax[cuda12-local,tpu]'"
    for target in TARGETS.values()
    if find_spec(target.module) is None
}
MEASURES = {"kernels": "kernels", "bytes": "arrays of the logits' size", "cycles": "thousand cycles"}


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each target, loss, quantity, dtype and shape, from a process for each target; nothing takes turns."""
    for platform, target in TARGETS.items():
        if target.name not in LEFT_OUT:
            yield from answer("benchmarks.compiled", platform, int(quick), JAX_PLATFORMS="cpu", **target.environment)


def cases(*, quick: bool) -> Iterator[Case]:
    """Every kind whose program is its own."""
    if quick:
        yield "cross_entropy", BOTH, "float32", (1024, 1000)
        return
    for name, kind in KINDS.items():
        if not kind.confident:
            for quantity in (BOTH, VALUE):
                for dtype in kind.dtypes:
                    yield from ((name, quantity, dtype, shape) for shape in kind.shapes)


def compiled(platform: str, quick: str) -> list[dict[str, Any]]:
    """The rows of one target, in a process that is ready for it."""
    target = TARGETS[platform]
    device = topologies.get_topology_desc(platform=platform, **target.topology).devices[0]
    row = {"device": target.name, "compiler": f"{target.package} {version(target.package)}"}
    rows = []
    with jax.default_device(device):  # what tells the losses which device they are compiled for
        for name, quantity, dtype, shape in cases(quick=bool(int(quick))):
            programs = {
                each: jitted(loss, quantity).lower(*arguments(KINDS[name], dtype, shape, device)).compile()
                for each, loss in KINDS[name].jax.items()
            }
            case = {"loss": name, "of": quantity, "dtype": dtype, "shape": shape}
            rows.append(row | case | measured(platform, programs))
    return rows


def arguments(kind: Kind, dtype: str, shape: tuple[int, ...], device: jax.Device) -> list[jax.ShapeDtypeStruct]:
    """Logits, targets and the gradient's factors: their shapes, on the device."""
    on_device = jax.sharding.SingleDeviceSharding(device)
    logits = jax.ShapeDtypeStruct(shape, dtype, sharding=on_device)
    if kind.targets == "probabilities":
        return [logits] * 3
    rows = list(shape)
    del rows[kind.axis]
    return [logits, jax.ShapeDtypeStruct(tuple(rows), jnp.int32, sharding=on_device), logits]


def measured(platform: str, programs: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What is told of each program."""
    found = {"temporaries": {name: each.memory_analysis().temp_size_in_bytes for name, each in programs.items()}}
    if platform == "tpu":
        return found | {"cycles": {name: cycles(each.as_text()) for name, each in programs.items()}}
    both = {name: traffic(each.as_text()) for name, each in programs.items()}
    return found | {measure: {name: each[measure] for name, each in both.items()} for measure in ("kernels", "bytes")}


def cycles(text: str) -> int:
    """Those of a TPU's program by the compiler's own estimate, which it writes down for every operation."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY") :])))


def order(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row of the table belongs."""
    shapes = (*SHAPES, *KINDS[row["loss"]].shapes)
    targets = [target.name for target in TARGETS.values()]
    of = (BOTH, VALUE).index(row["of"])
    return targets.index(row["device"]), list(KINDS).index(row["loss"]), of, shapes.index(tuple(row["shape"]))


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """For each device: what is told of our program, and the ratio to that of each peer."""
    found = []
    for device in dict.fromkeys(row["device"] for row in rows):
        some = [row for row in rows if row["device"] == device]
        names = [name for name in MEASURES if name in some[0]]
        peers = [name for name in dict.fromkeys(each for row in some for each in row["temporaries"]) if name != OURS]
        table = Table(
            device, "of", "dtype", "logits", *(f"{MEASURES[name]} (/ {', / '.join(peers)})" for name in names)
        )
        for row in some:
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(row["loss"], row["of"], row["dtype"], shape, *(told(row, name, peers) for name in names))
        found.append(table)
    return found


def told(row: dict[str, Any], measure: str, peers: list[str]) -> str:
    """For a table: ours, and its ratio to each peer's."""
    size = math.prod(row["shape"]) * jnp.dtype(row["dtype"]).itemsize
    unit = {"kernels": 1, "bytes": size, "cycles": 1000}[measure]
    ours = row[measure][OURS]
    ratios = (f"{ours / row[measure][peer]:.2f}" if peer in row[measure] else "" for peer in peers)
    return f"{ours / unit:.3g} ({', '.join(ratios)})"


if __name__ == "__main__":
    print(json.dumps(compiled(*sys.argv[1:])))
