"""The PyTorch originals of `train.models`, as the source notes have them: the reference they are held against."""

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)


class CNN(nn.Module):
    """The model trained with CrossEntropyLoss: returns logits."""

    def __init__(self) -> None:
        """Draws PyTorch's default weights, but for `fc`'s: xavier_uniform."""
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(7 * 7 * 64, 10, bias=True)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        out = self.layer2(self.layer1(x))
        return self.fc(out.view(out.size(0), -1))


class Net(nn.Module):
    """The model trained with NLLLoss: returns log-probabilities."""

    def __init__(self) -> None:
        """Draws PyTorch's default weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.conv2_drop = nn.Dropout2d(0.5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2)).view(-1, 320)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class ExNN(nn.Module):
    """The small classifier with two heads."""

    def __init__(self) -> None:
        """Draws PyTorch's default weights."""
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
