"""The logits of a linear layer in slabs of tokens: what the losses that never hold all of them are made of."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Num, Shaped

from jaxloss._checks import MeshAxes
from jaxloss._class_axis import ClassAxis, has_at_least, on_cpu, undivided
from jaxloss._log_softmax import accumulator_dtype

PIECE, MOST_PIECES = 2**21, 8  # elements of a product made at once, unless that takes more pieces: `add_product`


class Arrays(NamedTuple):
    """Everything that has a gradient. `inputs` and `targets` are split into slabs; the rest is shared by them."""

    inputs: Float[Array, "*tokens features"]
    targets: Float[Array, "..."] | Integer[Array, "..."]
    linear_weight: Float[Array, "classes *inner features"]
    linear_bias: Float[Array, "..."] | None = None
    weight: Num[Array, " classes"] | None = None
    label_smoothing: Float[Array, ""] | float | None = None
    z_loss: Float[Array, ""] | float | None = None
    logit_softcap: Float[Array, ""] | float | None = None
    temperature: Float[Array, ""] | float | None = None
    divisor: Float[Array, ""] | None = None  # of the sum of all losses

    @property
    def soft(self) -> bool:
        """Whether the targets are class probabilities."""
        return jnp.issubdtype(self.targets.dtype, jnp.floating)

    @property
    def inner(self) -> tuple[int, ...]:
        """d1, ..., dK."""
        return self.linear_weight.shape[1:-1]

    def flat(self) -> "Arrays":
        """With a single axis of tokens."""
        leading = self.inputs.ndim - 1
        tokens = math.prod(self.inputs.shape[:leading])
        return self._replace(
            inputs=self.inputs.reshape(tokens, self.inputs.shape[-1]),
            targets=self.targets.reshape(tokens, *self.targets.shape[leading:]),
        )

    def matrix(self) -> Float[Array, "outputs features"]:
        """The weight with a single axis of outputs."""
        *out, features = self.linear_weight.shape
        return self.linear_weight.reshape(math.prod(out), features)


SCALARS = ("label_smoothing", "z_loss", "logit_softcap", "temperature")


class Settings(NamedTuple):
    """What the compiled program depends on."""

    ignore_index: int
    memory_budget: int | None
    class_axis_name: MeshAxes | None
    token_axis_names: tuple[str, ...] = ()

    @property
    def axis(self) -> ClassAxis:
        """Where the classes are in a slab's logits (tokens, classes, d1, ..., dK)."""
        return ClassAxis(1, self.class_axis_name)

    def over_tokens(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sum over the shards of the tokens."""
        return lax.psum(x, self.token_axis_names) if self.token_axis_names else x


def varying_alike(settings: Settings, arrays: Arrays) -> Arrays:
    """Inside `shard_map`, every array varies over the mesh axes that split the tokens.

    Then the gradient to an array that all shards share stays local through the slabs, and is summed once at the end.
    """
    split = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: _vary(x, split.difference(settings.axis.mesh_axes)), arrays)


def _varying(x: Shaped[Array, "..."]) -> frozenset[str]:
    """The manual mesh axes, inside `shard_map`, over which an array's values differ."""
    return jax.typeof(x).manual_axis_type.varying


def _vary(x: Shaped[Array, "..."], axes: frozenset[str]) -> Shaped[Array, "..."]:
    missing = tuple(sorted(axes - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: tuple[Any, ...], inputs: Array, *others: Array) -> Float[Array, "..."]:
    """Zeros in the accumulator's dtype that, inside `shard_map`, vary as these arrays together."""
    axes = frozenset[str]().union(*(_varying(x) for x in (inputs, *others)))
    return _vary(jnp.zeros(shape, accumulator_dtype(inputs)), axes)


def project(arrays: Arrays) -> Float[Array, "..."]:
    """(tokens, classes, d1, ..., dK) logits in the accumulator's dtype: one matrix product and the bias."""
    products = dot(arrays.inputs, arrays.matrix(), ((1,), (1,)))
    logits = products.reshape(arrays.inputs.shape[0], *arrays.linear_weight.shape[:-1])
    return logits if arrays.linear_bias is None else logits + arrays.linear_bias.astype(logits.dtype)[None]


def dot(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Float[Array, "..."]:
    """A matrix product of the operands as they are, accumulated in float32 or better."""
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=accumulator_dtype(a))


def add_product(
    total: Float[Array, "classes features"],
    a: Float[Array, "tokens classes"],
    b: Float[Array, "tokens features"],
    *,
    total_is_zero: bool,
) -> Float[Array, "classes features"]:
    """The sum of `total` and aᵀ b.

    CPU stores a product before it adds it, unless it adds it to zeros: there it is one piece of the classes after the
    other, unless several devices may have split them.
    """
    if total_is_zero or not (on_cpu() and undivided()) or not has_at_least(2 * PIECE, total):
        return total + dot(a, b, ((0,), (0,)))
    classes = total.shape[0]
    pieces = min(total.size // PIECE, MOST_PIECES, classes)
    length, rest = divmod(classes, pieces)

    def add(start: Integer[ArrayLike, ""], length: int, total: Array) -> Array:
        product = dot(lax.dynamic_slice_in_dim(a, start, length, 1), b, ((0,), (0,)))
        before = lax.dynamic_slice_in_dim(total, start, length)
        return lax.dynamic_update_slice_in_dim(total, before + product, start, 0)

    total = lax.fori_loop(0, pieces, lambda piece, total: add(piece * length, length, total), total)
    return add(classes - rest, rest, total) if rest else total


def soft_cap(logits: Float[Array, "..."], cap: Float[Array, ""] | float | None) -> Float[Array, "..."]:
    """The logits z as c · tanh(z / c), or as they are; -inf stays."""
    if cap is None:
        return logits
    cap = jnp.asarray(cap, logits.dtype)
    left_out = logits == -jnp.inf  # which no derivative may multiply by 0
    return jnp.where(left_out, logits, cap * jnp.tanh(jnp.where(left_out, 0, logits) / cap))


def temper(logits: Float[Array, "..."], temperature: Float[Array, ""] | float | None) -> Float[Array, "..."]:
    """The logits z as z / T, or as they are."""
    if temperature is None:
        return logits
    temperature = jnp.asarray(temperature, logits.dtype)
    left_out = logits == -jnp.inf
    return jnp.where(left_out, logits / lax.stop_gradient(temperature), jnp.where(left_out, 0, logits) / temperature)


Step = Callable[[Any, Arrays, Bool[Array, " tokens"]], tuple[Any, Any]]


def scan(settings: Settings, step: Step, start: Any, arrays: Arrays) -> tuple[Any, Any]:
    """`lax.scan` over slabs: `step(carry, the slab's arrays, which tokens are real)` to carry and outputs by token.

    A slab takes every so many-th token, so that each shard of an automatically split token axis has its part in it.
    Where slabs and tokens do not fit, the last slabs are padded with ignored tokens. A symbolic number of tokens is one
    slab.
    """
    tokens = arrays.inputs.shape[0]
    symbolic = not isinstance(tokens, int)  # as in `jax.export`
    size, slabs = (tokens, 1) if symbolic else slab_shape(tokens, _tokens_within(settings.memory_budget, arrays))

    def cut(x: Shaped[Array, "..."], filler: int = 0) -> Shaped[Array, "..."]:
        padding = [(0, size * slabs - tokens), *[(0, 0)] * (x.ndim - 1)]
        return jnp.moveaxis(jnp.pad(x, padding, constant_values=filler).reshape(size, slabs, *x.shape[1:]), 1, 0)

    def join(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return jnp.moveaxis(x, 0, 1).reshape(size * slabs, *x.shape[2:])[:tokens]

    def body(carry: Any, xs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        inputs, targets, slab = xs
        if not arrays.soft:  # NaN in ignored tokens stays out of the weight's gradient, where it meets zeros
            ignored = jnp.all(targets == settings.ignore_index, range(1, targets.ndim))[:, None]
            inputs = jnp.where(ignored & ~jnp.isfinite(inputs), 0, inputs)
        return step(carry, arrays._replace(inputs=inputs, targets=targets), jnp.arange(size) * slabs + slab < tokens)

    # A gradient keeps nothing of a slab but its arguments then, and the zeros that a slab's gradient is added to are
    # not made once for all slabs, in memory. Twice, for a gradient's gradient: the first takes one of them off.
    checkpoint = partial(jax.checkpoint, prevent_cse=False)
    targets = cut(arrays.targets, 0 if arrays.soft else settings.ignore_index)
    xs = cut(arrays.inputs), targets, jnp.arange(slabs)
    carry, outputs = lax.scan(checkpoint(checkpoint(body)), start, xs)
    return carry, jax.tree.map(join, outputs)


def _tokens_within(budget: int | None, arrays: Arrays) -> int:
    """Tokens whose logits and their gradient fit in the budget; at least one.

    By default 128 MiB on CPU and 1 GiB elsewhere, but at least 128 and 2,048 tokens: each slab reads and writes the
    weight's whole gradient, which has to take less time than its three products.
    """
    bytes_per_token = 2 * accumulator_dtype(arrays.inputs).itemsize * math.prod(arrays.linear_weight.shape[:-1])
    budget, least = (budget, 1) if budget is not None else (2**27, 128) if on_cpu() else (2**30, 2048)
    return max(least, budget // max(1, bytes_per_token))


def slab_shape(tokens: int, most: int) -> tuple[int, int]:
    """Tokens in a slab and number of slabs: a size above half of the budget's that divides the tokens, if there is one.

    Among these, many factors of two let the devices of an automatically split token axis share each slab evenly.
    """
    if tokens <= most:
        return tokens, 1
    small = [n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0]
    exact = [size for n in small for size in (n, tokens // n) if most < 2 * size <= 2 * most]
    if not exact:
        slabs = -(-tokens // most)
        return -(-tokens // slabs), slabs
    size = max(exact, key=lambda size: (math.gcd(size, 64), size))
    return size, tokens // size
