"""The same call of a loss in jaxloss and in PyTorch, with every gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import jaxloss

OURS: dict[str, Callable] = {
    "cross_entropy": jaxloss.cross_entropy,
    "nll_loss": jaxloss.nll_loss,
    "kl_div": jaxloss.kl_div,
}
THEIRS: dict[str, Callable] = {"cross_entropy": F.cross_entropy, "nll_loss": F.nll_loss, "kl_div": F.kl_div}
Results = dict[str, Any]


def to_torch(x: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    """A tensor of the same values; float arrays in `dtype`, integers as int64 (PyTorch's only index dtype)."""
    x = np.array(x, np.float32 if x.dtype == jnp.bfloat16 else None)
    tensor = torch.tensor(x)
    return tensor.to(getattr(torch, dtype or str(x.dtype))) if tensor.is_floating_point() else tensor.long()


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values nearest in `dtype`, as float64: the oracle gets the inputs that the dtype holds."""
    return np.asarray(jnp.asarray(np.asarray(x, np.float32 if dtype != "float64" else np.float64), dtype), np.float64)


def evaluate_jax(
    name: str, arrays: dict[str, np.ndarray], options: dict[str, Any], dtype: str, axis: int, *, jit: bool = False
) -> Results:
    """The loss and its gradient (of the summed loss) to every floating array, in `dtype`."""
    arrays = {k: jnp.asarray(v, dtype if np.issubdtype(v.dtype, np.floating) else None) for k, v in arrays.items()}
    floating = {k: v for k, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    values, targets = list(arrays)[:2]
    position = {} if name == "kl_div" else {"axis": axis}

    def loss(floating: dict) -> tuple[jax.Array, jax.Array]:
        inputs = arrays | floating
        weight = {"weight": inputs["weight"]} if "weight" in inputs else {}
        result = OURS[name](inputs[values], inputs[targets], **weight, **options, **position)
        return jnp.sum(result.astype(jnp.float64 if dtype == "float64" else jnp.float32)), result

    differentiate = jax.grad(loss, has_aux=True)
    gradients, result = (jax.jit(differentiate) if jit else differentiate)(floating)
    return {"loss": result} | {f"d{k}": v for k, v in gradients.items()}


def evaluate_torch(name: str, arrays: dict[str, np.ndarray], options: dict[str, Any], dtype: str) -> Results:
    """The same in PyTorch; the class axis is axis 1 (0 for one row)."""
    tensors = {k: to_torch(v, dtype if np.issubdtype(v.dtype, np.floating) else None) for k, v in arrays.items()}
    floating = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    if name != "kl_div" and not tensors["targets"].is_floating_point():
        floating.pop("weight", None)  # PyTorch has no gradient to class weights there
    values, targets, *weight = tensors.values()
    result = THEIRS[name](values, targets, **({"weight": weight[0].detach()} if weight else {}), **options)
    wanted = {k: v for k, v in floating.items() if k != "weight"}
    gradients = torch.autograd.grad(result.sum(), list(wanted.values()))
    return {"loss": result} | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}
