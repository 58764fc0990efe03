"""One of two processes of `test_processes.py`: `python -m parity_tests.two_processes PORT PROCESS_ID`."""

import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss

TOKENS, FEATURES, CLASSES = 16, 8, 64


def draw() -> list[np.ndarray]:
    """inputs, linear_weight, linear_bias, weight and targets, the same in every process."""
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,)]
    floating = [rng.normal(size=shape) for shape in shapes] + [rng.uniform(0.5, 2, CLASSES)]
    targets = rng.integers(0, CLASSES, TOKENS)
    targets[3] = -100
    return [*(x.astype(np.float32) for x in floating), targets.astype(np.int32)]


def loss(x, w, b, c, t) -> jax.Array:
    """Every option at once, in slabs."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "memory_budget": 4 * 2 * 4 * CLASSES}
    return jaxloss.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, **options)


def assert_shards_equal(found: jax.Array, expected: jax.Array) -> None:
    """What this process holds of a global array."""
    assert not found.is_fully_addressable or found.is_fully_replicated
    for shard in found.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(expected)[shard.index], rtol=2e-5, atol=1e-6)


def main(port: str, process: str) -> None:
    """The loss and its gradients over both processes' devices, against this process alone."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    arrays = draw()
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    expected = step(*arrays)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        for shape in ((2, 2), (1, 4), (4, 1)):
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)
            specs = (P("data"), P("model"), P("model"), P("model"), P("data"))
            with jax.set_mesh(mesh):
                placed = [
                    jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), partial(np.ndarray.__getitem__, x))
                    for x, spec in zip(arrays, specs, strict=True)
                ]
                found = step(*placed)
            jax.tree.map(assert_shards_equal, found, expected)
            print(f"process {process}: {axis_type.name} {shape} equal", flush=True)
    assert jnp.isfinite(expected[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
