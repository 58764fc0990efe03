"""The PyTorch originals of `train.models`, as the source notes have them: the reference they are held against."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)


class DropoutMasks(NamedTuple):
    """Which activations of `Net` survive dropout."""

    conv2_drop: Tensor  # (batch, 20, 1, 1)
    dropout: Tensor  # (batch, 50)


class CNN(nn.Module):
    """The model trained with CrossEntropyLoss: returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(7 * 7 * 64, 10, bias=True)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer2(self.layer1(x))
        return self.fc(out.view(out.size(0), -1))


class Net(nn.Module):
    """The model trained with NLLLoss: returns log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.conv2_drop = nn.Dropout2d(0.5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor, masks: DropoutMasks | None = None) -> Tensor:
        """With `masks`, training mode drops what they say instead of drawing."""
        given = masks if self.training else None
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = self.conv2(x)
        x = x * given.conv2_drop / (1 - 0.5) if given else self.conv2_drop(x)
        x = F.relu(F.max_pool2d(x, 2)).view(-1, 320)
        x = F.relu(self.fc1(x))
        x = x * given.dropout / (1 - 0.5) if given else F.dropout(x, 0.5, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class ExNN(nn.Module):
    """The small classifier with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 8)
        self.fc2 = nn.Linear(8, 3)
        self.log_softmax = nn.LogSoftmax(dim=-1)

    def forward1(self, x: Tensor) -> Tensor:
        """Logits, for CrossEntropyLoss."""
        return self.fc2(self.fc1(x))

    def forward2(self, x: Tensor) -> Tensor:
        """Log-probabilities, for NLLLoss."""
        return self.log_softmax(self.forward1(x))


def draw_masks(batch: int) -> DropoutMasks:
    """Draws from PyTorch's global stream what `Net` would draw for a batch, in the same order."""
    channels = F.dropout2d(torch.ones(batch, 20, 8, 8), 0.5)
    return DropoutMasks(channels[:, :, :1, :1] != 0, F.dropout(torch.ones(batch, 50), 0.5) != 0)
