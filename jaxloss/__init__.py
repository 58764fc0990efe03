"""PyTorch's softmax cross-entropy family in JAX: the same answers, proven, and safe under every transformation."""

from jaxloss._criteria import CrossEntropyLoss, LogSoftmax, NLLLoss
from jaxloss._cross_entropy import cross_entropy
from jaxloss._kl_div import kl_div
from jaxloss._linear import linear_cross_entropy
from jaxloss._linear_log_prob import LinearLogProb, linear_log_prob
from jaxloss._log_softmax import log_softmax
from jaxloss._nll import nll_loss

nll = nll_loss

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "LinearLogProb",
    "LogSoftmax",
    "NLLLoss",
    "__version__",
    "cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "linear_log_prob",
    "log_softmax",
    "nll",
    "nll_loss",
]
