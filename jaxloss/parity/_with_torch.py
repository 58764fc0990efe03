"""What needs PyTorch: `check`, which compares a port with an original, and `record`, which keeps one for later."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import optax
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss.parity import _golden
from jaxloss.parity._batch import FlaxLoss
from jaxloss.parity._check import judge
from jaxloss.parity._live import Live, TorchLoss
from jaxloss.parity._report import Report
from jaxloss.parity._rerun import explain

Losses = tuple[TorchLoss, FlaxLoss]
Optimizers = tuple[torch.optim.Optimizer, optax.GradientTransformation]


def check(
    torch_module: nn.Module,
    flax_module: Any,
    torch_batch: Any,
    flax_batch: Any = None,
    *,
    layouts: Mapping[str, Sequence[int]] | None = None,
    names: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    losses: Losses | None = (F.cross_entropy, jaxloss.cross_entropy),
    optimizers: Optimizers | None = None,
    steps: int = 10,
    train: bool = False,
    dtypes: Sequence[str] = ("float64", "float32"),
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Compares a Flax port with its PyTorch original, and finds the first place where they differ, and why.

    Both run in float64, where semantics is all that can differ. Every layer of the port is fed what the original's
    layer was fed, and what lies between two layers (an edge: views, activations, pools, residual sums) starts from
    the original's outputs; so one fault makes one place fail, forward and backward. Then the network runs from end to
    end, and takes steps with both optimizers. In the other dtypes every layer and edge is judged by its error
    against float64 on the same rounded inputs, beside PyTorch's; the network's error is only told.

    Each comparison that passes is repeated with wrong arrays, which have to fail. To explain the first difference,
    PyTorch is run again with one call changed, or all of a kind (other padding, epsilon, axis, activation, …), until
    it gives what the port gives.

    Args:
        torch_module: the original. Weights and gradients are compared by its names. Copied, never changed.
        flax_module: the port: an nnx.Module; a pair of a Linen module and its variables; or a pair of a function and
            its parameters, called with them and the inputs: of that one the layers are unknown, and only outputs,
            gradients and steps are compared. Layers are paired by name, else by shape in the order in which they are
            called. Weights that come from the original are compared with it; if none does, the original's are copied
            for the check, and the report says so. Copied, never changed.
        torch_batch: one tensor or array; or a tuple of the module's inputs, and last, if there is a loss, the targets.
        flax_batch: the inputs for the port. By default those of PyTorch, with 4-D ones transposed from NCHW to NHWC.
        layouts: shape in PyTorch, `(channels, *spatial)`, of the feature maps that linear layers read, or write, as
            one axis, by the port's layer. Found by themselves where PyTorch flattens directly before the layer.
        names: PyTorch's names of weights by the port's, where they would be paired otherwise: `report.weight_map` shows
            how.
        ignore: names of weights or buffers that the port does not need, like a causal mask; of the port's variables
            that are no nnx.Param and in no state_dict, like those of non-persistent buffers; or patterns, `"*.mask"`.
        losses: PyTorch's and JAX's, each called with outputs and targets. With None, outputs are multiplied by random
            numbers and summed. Where targets have the outputs' shape without its last axis, as of a language model,
            `cross_entropy` and `nll_loss` take the classes from there, else from PyTorch's axis 1.
        optimizers: one of PyTorch's over `torch_module.parameters()`, and its optax counterpart. By default
            `torch.optim.Adam` and `optax.adam`, with rate 1e-3.
        steps: how many steps are taken with them on the batch; 0 for none.
        train: train mode instead of evaluation. What dropout keeps, that of attention's weights and between recurrent
            layers too, is drawn once and given to both. A port whose call takes `train`, `training`, `is_training` or
            `deterministic` is told.
        dtypes: "float32", "bfloat16" or "float16" beside "float64", which is always checked.
        seed: of dropout, targets and random numbers. Global random states are not touched.
        progress: called with the name of each stage as it begins.

    Returns:
        The report: `ok`, `first_divergence`, one line per place when printed, `to_json`, `to_html`, `to_junit`.

    Raises:
        TypeError: a module returns something other than one array.
        ValueError: the batch is empty, or does not fit the port; `names`, `ignore`, `layouts` or `dtypes` has an
            unknown name.

    Examples:
        >>> import torch
        >>> from flax import nnx
        >>> from jaxloss import parity
        >>> original, port = torch.nn.LayerNorm(4), nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        >>> report = parity.check(original, port, torch.randn(3, 4), dtypes=["float64"])
        >>> report.ok
        False
        >>> report.first_divergence.diagnosis
        "The port's epsilon is 1e-06, PyTorch's 1e-05."

    References:
        The list of what ports get wrong, each found by a test: `parity_tests/faults.md`.
    """
    for name, pair in {"losses": losses, "optimizers": optimizers}.items():
        if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"parity: {name} must be a pair, PyTorch's and JAX's, got {pair!r}.")
    torch_loss, flax_loss = losses or (None, None)
    torch_optimizer, optax_optimizer = optimizers or (None, optax.adam(1e-3))
    live = Live(
        torch_module,
        torch_batch,
        loss=torch_loss,
        optimizer=torch_optimizer,
        steps=steps,
        train=train,
        seed=seed,
        dtypes=dtypes,
    )
    return judge(
        live.source(),
        flax_module,
        flax_batch,
        loss=flax_loss,
        optimizer=optax_optimizer,
        layouts=layouts,
        names=names,
        ignore=ignore,
        dtypes=dtypes,
        ask=partial(explain, live),
        progress=progress,
    )


def record(
    path: str | os.PathLike[str],
    torch_module: nn.Module,
    torch_batch: Any,
    *,
    loss: TorchLoss | None = F.cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 10,
    train: bool = False,
    dtypes: Sequence[str] = ("float64", "float32"),
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Writes a golden file: all that `check` asks of a PyTorch original, so that `replay` needs no PyTorch.

    No port is needed. The file is one safetensors file: weights, batch, what every layer read and returned and the
    gradients with respect to both, dropout's masks, the optimizer's steps (of large arrays small images), and how far
    PyTorch's steps are from its own when rounding moves its weights. A JSON manifest in its header names the modules,
    options and versions, and holds a SHA-256 of the whole. The same run writes the same bytes. Arrays that are equal
    are kept once. The file is written whole or not at all.

    Args:
        path: where; a file that is there is replaced, and a link followed. ".safetensors" is the usual ending.
        torch_module: the original. Copied, never changed.
        torch_batch: one tensor or array; or a tuple of the module's inputs, and last, if there is a loss, the targets.
            A small one: the file grows with it.
        loss: called with outputs and targets, as in `check`. With None, outputs are multiplied by random numbers and
            summed.
        optimizer: one of PyTorch's over `torch_module.parameters()`. By default `torch.optim.Adam` with rate 1e-3.
        steps: how many steps are taken with it on the batch; 0 for none.
        train: train mode instead of evaluation.
        dtypes: "float32", "bfloat16" or "float16" beside "float64", which is always recorded.
        seed: of dropout, targets and random numbers. Global random states are not touched.
        progress: called with the name of each stage as it begins.

    Raises:
        TypeError: the module returns something other than one tensor.
        ValueError: the batch is empty, or `dtypes` has another one.
        OSError: the file cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> from flax import nnx
        >>> from jaxloss import parity
        >>> original, path = torch.nn.Linear(4, 3), tempfile.mkdtemp() + "/linear.safetensors"
        >>> parity.record(path, original, torch.randn(5, 4), dtypes=["float64"])
        >>> port = parity.load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.state_dict())
        >>> parity.replay(path, port).ok
        True

    References:
        https://github.com/huggingface/safetensors#format
    """
    live = Live(
        torch_module, torch_batch, loss=loss, optimizer=optimizer, steps=steps, train=train, seed=seed, dtypes=dtypes
    )
    versions = {"torch": torch.__version__, "jaxloss": jaxloss.__version__}
    _golden.write(path, live.source(), dtypes, versions, progress)
