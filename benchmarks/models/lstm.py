"""A classifier of sequences: two LSTM layers and a linear layer on the last step; trained by train_networks.py."""

from torch import Tensor, nn


class LSTMClassifier(nn.Module):
    """[n, steps, features] -> [n, classes]."""

    def __init__(self, features: int = 8, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(x)
        return self.head(steps[:, -1])
