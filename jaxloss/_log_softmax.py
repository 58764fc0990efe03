"""Placeholder."""
import jax
def log_softmax(logits, *, axis=-1, dtype=None):
    return jax.nn.log_softmax(logits, axis=axis)
