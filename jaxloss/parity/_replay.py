"""Checks a port against a golden file, without PyTorch."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import optax

import jaxloss
from jaxloss.parity._batch import FlaxLoss
from jaxloss.parity._check import judge
from jaxloss.parity._findings import Explanation, Failure
from jaxloss.parity._golden import read
from jaxloss.parity._recording import Source
from jaxloss.parity._report import Report
from jaxloss.parity._subject import Subject

_LOSSES: dict[str, FlaxLoss] = {
    "cross_entropy": jaxloss.cross_entropy,
    "nll_loss": jaxloss.nll_loss,
    "kl_div": jaxloss.kl_div,
}


def replay(
    path: str | os.PathLike[str],
    flax_module: Any,
    flax_batch: Any = None,
    *,
    layouts: Mapping[str, Sequence[int]] | None = None,
    names: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    loss: FlaxLoss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Compares a Flax port with a golden file: what `check` compares, where there is no PyTorch.

    The comparisons, their bounds, the planted faults and the first divergence are those of `check`. The reasons are
    only those that arrays tell: there is no PyTorch that could be run again with calls changed. Steps, mode, dtypes
    and seed are those of the recording.

    Args:
        path: of a file that `record` has written.
        flax_module: the port, in any of the forms that `check` takes. Copied, never changed.
        flax_batch: the inputs for the port. By default those that were recorded, with 4-D ones transposed from NCHW to
            NHWC.
        layouts: see `check`.
        names: see `check`.
        ignore: see `check`.
        loss: the counterpart of PyTorch's loss. By default the function of jaxloss that has the recorded one's name;
            nothing, where the file was recorded without a loss.
        optimizer: the counterpart of PyTorch's optimizer. By default `optax.adam(1e-3)`, where none was given to
            `record`.
        progress: called with the name of each stage as it begins.

    Returns:
        The report, as `check` gives it. Its notes say which PyTorch recorded the file.

    Raises:
        TypeError: the port returns something other than one array.
        ValueError: the file is no golden file, of another version, cut off, changed or incomplete, each in one line;
            the port's loss or optimizer is not known; or the port does not fit, as in `check`.
        OSError: there is no such file, or it cannot be read.

    Examples:
        >>> import tempfile, torch
        >>> from flax import nnx
        >>> from jaxloss import parity
        >>> path = tempfile.mkdtemp() + "/norm.safetensors"
        >>> parity.record(path, torch.nn.LayerNorm(4), torch.randn(3, 4), steps=1, dtypes=["float64"])
        >>> report = parity.replay(path, nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
        >>> report.ok, report.first_divergence.place
        (False, 'LayerNorm')

    References:
        The list of what ports get wrong, each found by a test: `parity_tests/faults.md`.
    """
    source, dtypes, torch_version = read(path)
    loss, optimizer = _loss(path, source, loss), _optimizer(path, source, optimizer)
    report = judge(
        source,
        flax_module,
        flax_batch,
        loss=loss,
        optimizer=optimizer,
        layouts=layouts,
        names=names,
        ignore=ignore,
        dtypes=dtypes,
        ask=_nothing,
        progress=progress,
    )
    report.notes.append(f"PyTorch is that of {path}: recorded with torch {torch_version}.")
    if not report.ok:
        report.notes.append(
            "A golden file holds no PyTorch to ask for the reason: check can say more where there is one."
        )
    return report


def _nothing(subject: Subject, failures: Sequence[Failure]) -> Iterator[Explanation]:
    return iter(())


def _loss(path: str | os.PathLike[str], source: Source, given: FlaxLoss | None) -> FlaxLoss | None:
    if source.loss is None:
        if given is not None:
            raise ValueError(f"replay: {path} was recorded without a loss: leave out loss=.")
        return None
    if given is None and source.loss not in _LOSSES:
        raise ValueError(f"replay: {path} was recorded with the loss {source.loss}: pass its JAX counterpart as loss=.")
    return given or _LOSSES[source.loss]


def _optimizer(
    path: str | os.PathLike[str], source: Source, given: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    if given is None and source.optimizer_given and source.steps:
        raise ValueError(
            f"replay: {path} was recorded with {source.optimizer}, given to record: pass its optax counterpart as "
            "optimizer=."
        )
    return optax.adam(1e-3) if given is None else given
