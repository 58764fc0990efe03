"""Cross entropy's value and gradient, float32 logits and integer labels, against optax and PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from rich.progress import track
from rich.table import Table

import jaxloss
from benchmarks.timing import Calls, assert_same_answers, medians, ratio

SHAPES = [(128, 10), (8192, 10), (1024, 1000), (256, 32000), (1024, 32768)]
OURS = "jaxloss"
PEERS = ("optax", "PyTorch eager")


def implementations(logits: np.ndarray, labels: np.ndarray) -> Calls:
    """Calls without arguments that return the loss and its gradient, finished."""
    z, t = jnp.asarray(logits), jnp.asarray(labels)

    def optax_loss(z: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, t))

    def jitted(loss: Callable) -> Callable[[], tuple[jax.Array, jax.Array]]:
        step = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(step(z, t))

    leaf, long = torch.tensor(logits, requires_grad=True), torch.tensor(labels).long()

    def torch_step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(leaf, long)
        return loss, *torch.autograd.grad(loss, leaf)

    return {OURS: jitted(jaxloss.cross_entropy), "optax": jitted(optax_loss), "PyTorch eager": torch_step}


def measure(turns: int) -> list[dict[str, Any]]:
    """Rows of the table: a fifth of the turns from 8 million logits on."""
    cases = [(shape, confident) for shape in SHAPES for confident in (False, True)]
    rows = []
    for shape, confident in track(cases, description="measuring losses", transient=True):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=shape).astype(np.float32), rng.integers(0, shape[1], shape[0]).astype(np.int32)
        if confident:
            logits[0, labels[0]] = 40
        calls = implementations(logits, labels)
        assert_same_answers(calls)
        few = turns if np.prod(shape) < 8_000_000 else max(turns // 5, 1)
        rows.append({"shape": shape, "one confident row": confident, "milliseconds": medians(calls, few)})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, with both quartiles of ours for the noise."""
    table = Table("logits", "one confident row", f"{OURS} ms (quartiles)", *(f"/ {peer}" for peer in PEERS))
    for row in rows:
        ours = row["milliseconds"][OURS]
        spread = f"{ours['median']:.3g} ({ours['q1']:.3g}-{ours['q3']:.3g})"
        ratios = (ratio(row["milliseconds"], OURS, peer) for peer in PEERS)
        table.add_row(" x ".join(map(str, row["shape"])), "yes" if row["one confident row"] else "no", spread, *ratios)
    return [table]
