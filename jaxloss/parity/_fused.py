"""Attention as PyTorch's MultiheadAttention has it: query, key and value in one tensor, float64, and its dropout."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import jax
from flax import linen, nnx
from flax.linen import attention as linen_attention
from flax.nnx.nn import attention as nnx_attention

from jaxloss.parity._joined import Joined, join
from jaxloss.parity._layout import Layout, Shape

OUT = "out_proj"  # PyTorch's name of Flax's `out`
PARTS = ("query", "key", "value")
_FUSED = ("in_proj_weight", "q_proj_weight")  # the second where keys have another size


def fused_paths(
    attentions: Collection[str],
    apart: Collection[tuple[str, str]],
    theirs: Collection[str] | None,
    names: Collection[str],
) -> set[str]:
    """Of Flax's attentions, by their paths, those that PyTorch keeps fused.

    The names that are given for the port tell, then PyTorch's. An attention that has no namesake there is fused if
    another of PyTorch's is, which no other layer of the port stands for: `apart` has paths and attributes of all. If
    PyTorch's names are not known, all are fused.
    """
    kept = {tuple(name.rpartition(".")[::2]) for name in theirs or ()}
    fused = {path for path, kind in kept if kind in _FUSED}
    others = fused - {*attentions} - {path for path, kind in apart if kind in _FUSED}

    def is_fused(path: str) -> bool:
        given = {name.removeprefix(f"{path}.").partition(".")[0] for name in names if name.startswith(path)}
        if given & {*PARTS, *_FUSED}:
            return not given & {*PARTS}
        if theirs is None or path in fused:
            return True
        return bool(others) and (".".join(filter(None, (path, PARTS[0]))), "weight") not in kept

    return set(filter(is_fused, attentions))


def fused(
    layer: nnx.MultiHeadAttention, layout: Callable[[Any, str, Shape, Shape], Layout]
) -> Iterator[tuple[str, Joined]]:
    """What PyTorch has of an attention's query, key and value, by its names; `layout` gives a linear layer's."""
    linears = [getattr(layer, part) for part in PARTS]
    if layer.in_features == layer.in_kv_features:
        yield "in_proj_weight", join("kernel", linears, layout)
    else:
        yield from (
            (f"{part[0]}_proj_weight", join("kernel", [x], layout)) for part, x in zip(PARTS, linears, strict=True)
        )
    if layer.use_bias:
        yield "in_proj_bias", join("bias", linears, layout)


def exact_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Flax's own in float64.

    Without a dropout rate it calls `jax.nn.dot_product_attention`, whose softmax is in float32 (flax 0.12.8,
    nnx/nn/attention.py); with one, it computes the same by itself, and drops nothing if it is deterministic.
    """
    if not options.get("dropout_rate"):
        options |= {"dropout_rate": 0.5, "deterministic": True}
    return nnx.dot_product_attention(query, key, value, **options)


@contextmanager
def dropping(drop: Callable[[jax.Array, float, Shape], jax.Array]) -> Iterator[None]:
    """Has `drop` do the dropout in Flax's attention, however that is called.

    It gets the weights, the rate, and the axes along which there is one mask.
    """
    with ExitStack() as stack:
        for module in (nnx_attention, linen_attention, linen):
            own = module.dot_product_attention_weights
            stack.enter_context(mock.patch.object(module, own.__name__, _dropped(own, drop)))
        yield


def _dropped(
    weights_of: Callable[..., jax.Array], drop: Callable[[jax.Array, float, Shape], jax.Array]
) -> Callable[..., jax.Array]:
    signature = inspect.signature(weights_of)

    @wraps(weights_of)
    def weights(*args: Any, **kwargs: Any) -> jax.Array:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        drops, options["deterministic"] = not options["deterministic"] and options["dropout_rate"], True
        found = weights_of(*given.args, **given.kwargs)
        broadcast = tuple(range(found.ndim - 2)) if options["broadcast_dropout"] else ()
        return drop(found, options["dropout_rate"], broadcast) if drops else found

    return weights
