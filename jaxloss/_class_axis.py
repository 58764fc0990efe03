"""Operations along the class axis, on one device or on the shards of a mesh axis."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Integer

from jaxloss._checks import MeshAxes, Size
from jaxloss._exp import exp_of_negative
from jaxloss._halves import zero_unless
from jaxloss._primitives import Primitive
from jaxloss._row_sums import SHORT, row_sum

LONG_ROW, SHORT_BLOCK = 2**15, 2**10  # classes, see `ClassAxis.sum_of`
UNROLLED = 10, 32  # classes at least and at most, see `ClassAxis.exp`
FEW, EVEN = 24, 64  # classes, and what divides the number of rows, see `ClassAxis.sums_in_one_pass`


class ClassAxis(NamedTuple):
    """Where the classes are: an array axis and, inside `shard_map`, the mesh axis (or axes) that split it.

    `widened` says that `x` was cast from another dtype, and its gradient will be cast back; `lean`, that nothing of the
    size of `x` is to be stored in its own dtype: each sum reads the array that it was cast from, see `of_cast`.
    An array with the classes is called `x`; `rows` is an array without that axis.
    """

    position: int
    mesh_axis: MeshAxes | None = None
    widened: bool = False
    lean: bool = False

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes' names."""
        return (self.mesh_axis,) if isinstance(self.mesh_axis, str) else self.mesh_axis or ()

    def size(self, x: Array) -> Size:
        """The number of classes over all shards."""
        return x.shape[self.position] * math.prod(lax.axis_size(name) for name in self.mesh_axes)

    def untracked_shards(self) -> int:
        """How many shards there are where JAX does not track what varies over them, as in `vmap` and `pmap`.

        By so much the gradients are too large there that are taken on the shards: it adds up what each of them has.
        """
        untracked = (name for name in self.mesh_axes if not jax.typeof(lax.axis_index(name)).manual_axis_type.varying)
        return math.prod(lax.axis_size(name) for name in untracked)

    def expand(self, rows: Array) -> Array:
        """Rows against classes: the class axis put back with size 1."""
        return jnp.expand_dims(rows, self.position)

    def sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Sum over all classes."""
        total = row_sum(x) if self.has_short_rows_on_cpu(x) else jnp.sum(x, self.position)
        return total if self.mesh_axis is None else lax.psum(total, self.mesh_axis)

    def sums_in_one_pass(self, x: Array) -> bool:
        """Whether `both_sums` is faster than one sum after the other: on CPU and of few classes.

        That is XLA's own loop and not a library's, which where each row is one stretch of memory takes several rows at
        once, and so many for each thread.
        """
        if not self.is_whole_on_cpu(x) or not has_at_least(1, x) or x.shape[self.position] > FEW:
            return False
        return self.position != x.ndim - 1 or (x.size // x.shape[-1]) % EVEN == 0

    def both_sums(self, x: Float[Array, "..."], y: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
        """Two sums over the classes in one pass, which XLA does not give to a library."""
        return _both_sums(self.position, x, y)

    def has_whole_rows_on_cpu(self, x: Array) -> bool:
        """Whether each row is one stretch of a CPU's memory."""
        return self.position == x.ndim - 1 and self.is_whole_on_cpu(x)

    def has_short_rows_on_cpu(self, x: Array) -> bool:
        """Whether each row is one stretch of a CPU's memory, of at most SHORT classes."""
        return self.has_whole_rows_on_cpu(x) and isinstance(x.shape[-1], int) and 0 < x.shape[-1] <= SHORT

    def is_whole_on_cpu(self, x: Array) -> bool:
        """Whether a CPU has all classes, as far as tracing tells."""
        return self.mesh_axis is None and not on_explicit_mesh(x) and on_cpu()

    def of_cast(self, narrow: Array, dtype: jnp.dtype, least: int = 0) -> "ClassAxis":
        """This axis of `narrow` cast to `dtype`.

        On CPU it is lean for bfloat16 arrays of at least so many elements (under `vmap`, of each example).
        """
        halves = narrow.dtype == jnp.bfloat16 and dtype == jnp.float32
        lean = halves and self.has_whole_rows_on_cpu(narrow) and (not least or has_at_least(least, narrow))
        return self._replace(widened=narrow.dtype != dtype, lean=lean)

    def read(self, x: Array, narrow: Array) -> Array:
        """What a sum over the classes is to read: `x`, or the array that it was cast from."""
        return narrow if self.lean else x

    def copies(self, x: Array, count: int) -> tuple[Array, ...]:
        """`x` so many times; if lean, so that what is made from each is computed for each and never stored."""
        return apart(x, count) if self.lean else (x,) * count

    def sum_of(self, terms: Callable[..., Array], x: Array, *others: Array) -> Float[Array, "..."]:
        """Sum over all classes of terms(x, *others), where each of the others has all classes or one.

        On CPU long rows are summed in blocks of classes, whose terms XLA computes on the fly. Where devices may split
        the classes the blocks are as long as they can be and no class is left over, so that few or none are moved.
        """
        arrays, classes = (x, *others), x.shape[self.position]
        longest = SHORT if undivided() else LONG_ROW
        if not self.has_whole_rows_on_cpu(x) or not isinstance(classes, int) or classes <= longest:
            return self.sum(terms(*arrays))
        divisors = (size for size in range(longest, SHORT_BLOCK - 1, -1) if classes % size == 0)
        block = next(divisors, SHORT_BLOCK if undivided() else classes)
        count, rest = divmod(classes, block)

        def blocks(x: Array) -> Array:
            if x.shape[-1] == 1:
                return x[..., None, :]
            return x[..., : count * block].reshape(*x.shape[:-1], count, block)

        within = self._replace(position=x.ndim)
        # The barrier keeps XLA from making one long sum of the two, which rounds worse.
        total = jnp.sum(lax.optimization_barrier(within.sum(terms(*map(blocks, arrays)))), -1)
        if rest:
            total += self.sum(terms(*(x if x.shape[-1] == 1 else x[..., -rest:] for x in arrays)))
        return total

    def exp(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Exponentials of what is not positive, for an array in memory.

        On CPU written out where rows are so short that LLVM unrolls the loop over them, unless a cast lengthens it.
        """
        classes = x.shape[self.position]
        unrolled = isinstance(classes, int) and UNROLLED[0] <= classes <= UNROLLED[1] and x.dtype == jnp.float32
        return exp_of_negative(x) if unrolled and not self.widened and self.has_whole_rows_on_cpu(x) else jnp.exp(x)

    def max(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maximum over all classes, as a constant: no derivative passes through it."""
        top = jnp.max(lax.stop_gradient(x), self.position, initial=-jnp.inf)
        return top if self.mesh_axis is None else lax.pmax(top, self.mesh_axis)

    def peaks(self, x: Float[Array, "..."], dtype: jnp.dtype) -> "Peaks":
        """Each row's maximum in `dtype`, and off the CPU in the same pass what the sums of exponentials need.

        Not where devices may split the classes: XLA would gather them.
        """
        if on_cpu() or not undivided():
            return Peaks(self.max(x).astype(dtype))
        top, below, ties = _peaks.bind(x, position=self.position, dtype=jnp.dtype(dtype))
        if self.mesh_axis is not None:
            local, top = top, lax.pmax(lax.stop_gradient(top), self.mesh_axis)
            highest = local == top
            below = jnp.where(highest, below, (below + ties) * jnp.exp(lax.stop_gradient(local) - top))
            below, ties = lax.psum((below, jnp.where(highest, ties, 0)), self.mesh_axis)
        return Peaks(top, (below + (top - top), ties))  # NaN where the maximum is infinite

    def argmax(self, x: Float[Array, "..."]) -> Integer[Array, "..."]:
        """Index, over all classes, of the first maximum."""
        x = lax.stop_gradient(x)
        classes = x.shape[self.position]
        first = jnp.argmax(x, self.position).astype(jnp.int32)
        if self.mesh_axis is None:
            return first
        top = jnp.max(x, self.position)
        nowhere = jnp.iinfo(jnp.int32).max  # but where the maximum is NaN
        is_top = (top == lax.pmax(top, self.mesh_axis)) | jnp.isnan(top)
        return lax.pmin(jnp.where(is_top, first + lax.axis_index(self.mesh_axis) * classes, nowhere), self.mesh_axis)

    def local(self, targets: Integer[Array, "..."], classes: Size) -> Integer[Array, "..."]:
        """Class indices counted from the first of this shard's `classes` classes."""
        if self.mesh_axis is None:
            return targets
        return targets - (lax.axis_index(self.mesh_axis) * classes).astype(targets.dtype)

    def from_owner(self, values: Float[Array, "..."], local: Array, classes: Size) -> Float[Array, "..."]:
        """Values read at `local` indices, from the shard that has that class."""
        if self.mesh_axis is None:
            return values
        return lax.psum(jnp.where((local >= 0) & (local < classes), values, 0), self.mesh_axis)

    def is_target(self, x: Array, targets: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """True where the class index equals the row's target; the shape of `x`."""
        index = lax.broadcasted_iota(targets.dtype, x.shape, self.position)
        return index == self.expand(self.local(targets, x.shape[self.position]))

    def scatters(self, x: Array) -> bool:
        """Whether to write one element to a row rather than to select among all: on CPU only.

        There the select slows the loop it is in by a quarter, and one element to a row costs as much as 64 selects.
        A scatter needs the array in memory, and one into a half type widens it first; elsewhere it is one more pass.
        """
        stored = x.dtype.itemsize > 2 and not self.lean
        classes = x.shape[self.position]
        many = isinstance(classes, int) and classes >= 64
        return stored and many and self.is_whole_on_cpu(x)

    def without_target(self, x: Float[Array, "..."], targets: Integer[Array, "..."]) -> Float[Array, "..."]:
        """`x` with 0 at each row's target; where the target is out of range, at any class or none."""
        if not self.scatters(x):
            return jnp.where(self.is_target(x, targets), 0, x)
        # Rows as batching dimensions: `put_along_axis` would gather the targets of rows that an Auto mesh splits.
        rows = tuple(axis for axis in range(x.ndim) if axis != self.position)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(self.position,),
            scatter_dims_to_operand_dims=(self.position,),
            operand_batching_dims=rows,
            scatter_indices_batching_dims=tuple(range(targets.ndim)),
        )
        index = jnp.clip(targets, 0, x.shape[self.position] - 1)[..., None]
        zero = jnp.zeros(targets.shape, x.dtype)
        return lax.scatter(x, index, zero, numbers, unique_indices=True, mode="promise_in_bounds")

    def pick(
        self, x: Float[Array, "..."], targets: Integer[Array, "..."], *, spread: bool = False
    ) -> Float[Array, "..."]:
        """The entry of `x` at each row's target; unspecified where a target is out of range.

        `spread` makes such a target's derivative the sum over its row, so that a NaN that multiplies it reaches all.
        """
        return _pick(self, spread, x, targets)


class Peaks(NamedTuple):
    """Each row's maximum and, if one pass finds both too, Σ exp(x - top) of the classes below and how many have it."""

    top: Array
    below_and_ties: tuple[Array, Array] | None = None


def _online(x: Float[Array, "..."], *, position: int, dtype: jnp.dtype) -> list[Array]:
    """An online softmax, https://arxiv.org/abs/1805.02867, with the maximum left out of the sum and counted."""

    def join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        top = jnp.maximum(a[0], b[0])
        factor = jnp.exp(jnp.minimum(a[0], b[0]) - top)

        def scaled(part: Array, below: Array, ties: Array) -> tuple[Array, Array]:
            highest = part == top
            return jnp.where(highest, below, (below + ties) * factor), jnp.where(highest, ties, 0)

        return top, *map(jnp.add, scaled(*a), scaled(*b))

    x = x.astype(dtype)
    start = (jnp.asarray(value, dtype) for value in (-jnp.inf, 0, 0))
    return list(lax.reduce((x, jnp.zeros_like(x), jnp.ones_like(x)), tuple(start), join, (position,)))


def _shapes_of_peaks(x: Any, *, position: int, dtype: jnp.dtype) -> list[Any]:
    shape, spec = (tuple(np.delete(np.array(each, object), position)) for each in (x.shape, x.sharding.spec))
    return [x.update(shape=shape, dtype=dtype, sharding=x.sharding.update(spec=spec), weak_type=False)] * 3


def _peaks_jvp(primals: tuple, tangents: tuple, *, position: int, dtype: jnp.dtype) -> tuple[list, list]:
    (x,), (dx,) = primals, tangents
    top, below, ties = _peaks.bind(x, position=position, dtype=dtype)
    dtop = dbelow = dties = jnp.zeros_like(top)
    if not isinstance(dx, ad.Zero):
        exponentials = jnp.exp(x.astype(dtype) - jnp.expand_dims(top, position))
        dbelow = jnp.sum(exponentials * dx.astype(dtype), position)
    return [top, below, ties], [dtop, dbelow, dties]


def _peaks_of_batch(arrays: tuple, dims: tuple, *, position: int, dtype: jnp.dtype) -> tuple[list[Array], tuple]:
    (x,), (dim,) = arrays, dims
    return _peaks.bind(jnp.moveaxis(x, dim, 0), position=position + 1, dtype=dtype), (0, 0, 0)


# A primitive, since reverse mode drops the custom rules of what a scan keeps, and JAX has none for this reduction.
# Derivatives are those with the maximum held: of `below`, and of it alone, the sum over all classes.
_peaks = Primitive("jaxloss_peaks")
_peaks.multiple_results = True
_peaks.def_impl(jax.jit(_online, static_argnames=("position", "dtype")))
_peaks.def_abstract_eval(_shapes_of_peaks)
mlir.register_lowering(_peaks, mlir.lower_fun(_online, multiple_results=True))
ad.primitive_jvps[_peaks] = _peaks_jvp
batching.primitive_batchers[_peaks] = _peaks_of_batch


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _both_sums(position: int, x: Float[Array, "..."], y: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    zero = jnp.zeros((), x.dtype)
    return lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (position,))


@_both_sums.defjvp
def _both_sums_jvp(position: int, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    return _both_sums(position, *primals), tuple(jnp.sum(x, position) for x in tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pick(axis: ClassAxis, spread: bool, x: Float[Array, "..."], targets: Integer[Array, "..."]) -> Float[Array, "..."]:
    # A gather is free on CPU where a masked sum over the classes is not, but it cannot cross an explicit mesh axis.
    if is_split(x, axis.position):
        return _pick_masked(axis, False, x, targets)
    classes = x.shape[axis.position]
    if classes == 0:
        return jnp.full(targets.shape, jnp.nan, x.dtype)
    local = axis.local(targets, classes)
    index = axis.expand(jnp.clip(local, 0, classes - 1))
    values = jnp.take_along_axis(x, index, axis.position, mode="promise_in_bounds").squeeze(axis.position)
    return axis.from_owner(values, local, classes)


@_pick.defjvp
def _pick_jvp(axis: ClassAxis, spread: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, targets = primals
    # The transpose of a masked sum is one elementwise select; that of a gather is one scattered element to a row, which
    # XLA adds to the rest of the gradient in place. Neither the mask nor the index is kept.
    pick = _pick_masked if spread or axis.widened or not axis.scatters(x) else _pick
    pick = jax.checkpoint(pick, prevent_cse=False, static_argnums=(0, 1))
    return _pick(axis, spread, x, targets), pick(axis, spread, tangents[0], targets)


def _pick_masked(
    axis: ClassAxis, spread: bool, x: Float[Array, "..."], targets: Integer[Array, "..."]
) -> Float[Array, "..."]:
    mask = axis.is_target(x, targets)
    if spread:
        mask |= axis.expand((targets < 0) | (targets >= axis.size(x)))
    explicit = on_explicit_mesh(x) or on_explicit_mesh(mask)
    return axis.sum(jnp.where(mask, x, 0) if explicit else zero_unless(mask, x))


def on_cpu() -> bool:
    """Whether programs are for a CPU, as far as tracing tells: `jax.export` for another platform does not."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return (getattr(device, "platform", device) or jax.default_backend()) == "cpu"


def undivided() -> bool:
    """Whether no device has a part of an array but those that `shard_map` gives it, as far as tracing tells."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)


def has_at_least(elements: int, x: Array) -> bool:
    """Whether the array is that large; False where a dimension is symbolic, as in `jax.export`."""
    return all(isinstance(length, int) for length in x.shape) and x.size >= elements


def apart(x: Array, copies: int) -> tuple[Array, ...]:
    """Copies that XLA cannot tell to be equal: what is computed from each is fused where it is used, never stored."""
    return lax.optimization_barrier((x,) * copies)


def is_split(x: Array, position: int) -> bool:
    """Whether an explicit mesh axis splits this array axis (Auto meshes do not say so while tracing)."""
    return jax.typeof(x).sharding.spec[position] is not None


def on_explicit_mesh(x: Array) -> bool:
    """Whether the array lives on a mesh with an explicit axis, even one that `vmap` hides."""
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
