"""Slabs on the shards of an explicit mesh: `shard_map` where the arrays' types already say how they are split."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxloss._slabs import Arrays, Settings


def on_shards(
    function: Callable[[Settings, Arrays], Any], settings: Settings, arrays: Arrays, *, by_token: bool
) -> Any:
    """`function(settings, arrays)`, on each device's tokens and classes if the arrays live on an explicit mesh.

    Tokens are split as `inputs` has them, classes as `linear_weight` has them; a mesh axis that splits both keeps the
    tokens, and features are gathered. What comes back is by token, or the same everywhere.
    """
    mesh = _explicit_mesh(x for x in arrays if isinstance(x, Array))
    if mesh is None:
        return function(settings, arrays)
    tokens = jax.typeof(arrays.inputs).sharding.spec[:-1]
    token_axes = tuple(_names(tokens))
    class_axes = tuple(n for n in _names(jax.typeof(arrays.linear_weight).sharding.spec[:1]) if n not in token_axes)
    classes, inner = class_axes or None, [None] * len(arrays.inner)
    specs = {
        "inputs": P(*tokens, None),
        "targets": P(*tokens, *([classes] if arrays.soft else []), *inner),
        "linear_weight": P(classes, *inner, None),
        "linear_bias": P(classes, *inner),
        "weight": P(classes),
    }
    given = {name: jnp.asarray(x) for name, x in arrays._asdict().items() if x is not None}
    specs = {name: specs.get(name, P()) for name in given}
    # Inside a `shard_map` over other axes the classes may be split already.
    class_axis_name = (*settings.axis.mesh_axes, *class_axes) or None
    settings = settings._replace(class_axis_name=class_axis_name, token_axis_names=token_axes)
    return jax.shard_map(
        lambda shards: function(settings, Arrays(**shards)),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(*tokens, *inner) if by_token else P(),
        axis_names=_explicit(mesh),
    )({name: jax.sharding.reshard(x, NamedSharding(mesh, specs[name])) for name, x in given.items()})


def _explicit_mesh(arrays: Iterable[Array]) -> AbstractMesh | None:
    return next((mesh for mesh in (jax.typeof(x).sharding.mesh for x in arrays) if _explicit(mesh)), None)


def _explicit(mesh: AbstractMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind is AxisType.Explicit}


def _names(entries: Iterable[str | tuple[str, ...] | None]) -> Iterable[str]:
    for entry in entries:
        yield from (entry,) if isinstance(entry, str) else entry or ()
