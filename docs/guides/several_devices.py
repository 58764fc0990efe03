from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxloss

hidden, kernel = jax.random.normal(jax.random.key(0), (64, 16)), jax.random.normal(jax.random.key(1), (16, 1000))
labels = jnp.arange(64)

mesh = jax.make_mesh((2, 2), ("data", "model"))
with jax.set_mesh(mesh):
    tokens, aims = jax.device_put(hidden, P("data")), jax.device_put(labels, P("data"))
    columns = jax.device_put(kernel, P(None, "model"))

    @jax.jit
    def loss_fn(columns, tokens, aims):
        return jaxloss.linear_cross_entropy(tokens, columns.T, aims)

    print("one device      ", jaxloss.linear_cross_entropy(hidden, kernel.T, labels))
    print("four, under jit ", loss_fn(columns, tokens, aims))

    @jax.jit
    @partial(jax.shard_map, in_specs=(P(None, "model"), P("data"), P("data")), out_specs=P())
    def in_shard_map(columns, tokens, aims):
        total = jaxloss.linear_cross_entropy(tokens, columns.T, aims, reduction="sum", class_axis_name="model")
        return lax.psum(total, "data") / lax.psum(jnp.sum(aims != -100), "data")

    print("four, shard_map ", in_shard_map(columns, tokens, aims))
