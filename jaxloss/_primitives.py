"""How a function becomes a JAX primitive that is compiled in another form for CPUs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax import Array, lax
from jax.interpreters import batching, mlir

if TYPE_CHECKING:
    from jax.extend.core import Primitive
else:  # without jax.extend, which brings Pallas and takes a third of the time of `import jaxloss`
    Primitive = type(lax.add_p)


def make_primitive(name: str, function: Callable[..., Array], on_cpu: Callable[..., Array]) -> Primitive:
    """Without rules for shapes, derivatives and `vmap`; `on_cpu` has to give what `function` gives."""
    primitive = Primitive(f"jaxloss_{name}")
    primitive.def_impl(function)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    return primitive


def make_elementwise(name: str, function: Callable[..., Array], on_cpu: Callable[..., Array]) -> Primitive:
    """A primitive of arrays of one shape, which `vmap` batches together."""

    def batch(arrays: tuple, dims: tuple, **parameters: Any) -> tuple[Array, int]:
        if len(set(dims)) == 1:
            return primitive.bind(*arrays, **parameters), dims[0]
        size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
        moved = (batching.bdim_at_front(x, dim, size) for x, dim in zip(arrays, dims, strict=True))
        return primitive.bind(*moved, **parameters), 0

    primitive = make_primitive(name, function, on_cpu)
    batching.primitive_batchers[primitive] = batch
    return primitive
