"""PyTorch's softmax cross-entropy family in JAX."""

from jaxloss._cross_entropy import cross_entropy
from jaxloss._log_softmax import log_softmax
from jaxloss._nll import nll_loss

nll = nll_loss
__version__ = "0.1.0"
