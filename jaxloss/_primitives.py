"""How a function becomes a JAX primitive that is compiled in another form for CPUs."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from jax import Array, lax
from jax.interpreters import mlir

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
