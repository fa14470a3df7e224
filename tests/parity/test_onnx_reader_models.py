"""Whole models through torch's exporters: recurrent, attention, embeddings, arithmetic of shapes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.model.readers.onnx import read_file


class Recurrent(nn.Module):
    def __init__(
        self, cls: type[nn.RNNBase], both: bool, layers: int = 1, first: bool = True, **settings: Any
    ) -> None:
        super().__init__()
        self.rnn = cls(5, 7, layers, bidirectional=both, batch_first=first, **settings)
        self.fc = nn.Linear(14 if both else 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class FinalState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.rnn(x)
        return torch.cat([h[-1], c[-1]], 1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.words(x) + self.places).mean(1))


class ClassToken(nn.Module):
    """A small vision transformer: patches, a token for the class, places."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm(x)).reshape(n, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, -1)
        return self.out((a @ v).transpose(1, 2).reshape(n, -1, 8))[:, 0]


class Shuffle(nn.Module):
    """Channels shuffled by a reshape of sizes taken from the tensor, then doubled in size like another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.conv(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = F.interpolate(self.wide(y), size=(x.shape[2], x.shape[3]), mode="nearest")
        return torch.cat([x, y], 1).mean((2, 3))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.excite = nn.Conv1d(4, 8, 5, padding="same"), nn.Conv1d(8, 8, 1)
        self.norm, self.slope = nn.GroupNorm(2, 8), nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.norm(self.conv(x)))
        y = y * torch.sigmoid(self.excite(F.adaptive_avg_pool1d(y, 1)))
        a, b = y.chunk(2, 1)
        return F.silu(a) * F.gelu(b) + F.pad(a, (1, -1))


class Rotary(nn.Module):
    """Places that the length of the input decides."""

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device).to(torch.float32)
        angle = at[:, None] * torch.tensor([1.0, 0.1])
        a, b = x[..., :2], x[..., 2:4]
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        y = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return torch.einsum("ts,nsd->ntd", mask, y)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM, False), (2, 6, 5)),
    "lstm-both": (lambda: Recurrent(nn.LSTM, True), (2, 6, 5)),
    "lstm-two": (lambda: Recurrent(nn.LSTM, True, 2), (2, 6, 5)),
    "gru": (lambda: Recurrent(nn.GRU, False), (2, 6, 5)),
    "gru-both": (lambda: Recurrent(nn.GRU, True, bias=False), (2, 6, 5)),
    "rnn": (lambda: Recurrent(nn.RNN, False, nonlinearity="relu"), (2, 6, 5)),
    "state": (FinalState, (2, 6, 5)),
    "words": (Words, (2, 6)),
    "vit": (ClassToken, (2, 3, 8, 8)),
    "shuffle": (Shuffle, (2, 3, 8, 8)),
    "gated": (Gated, (2, 4, 12)),
    "rotary": (Rotary, (2, 9, 4)),
}


NEW = ["lstm", "words", "vit", "shuffle"]  # the newer exporter takes its time


@pytest.mark.parametrize(("name", "dynamo"), [*((n, False) for n in MODELS), *((n, True) for n in NEW)])
def test_an_exported_model_answers_as_the_module(name: str, dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    make, shape = MODELS[name]
    module = make().eval()
    x = torch.randint(0, 11, shape) if name == "words" else torch.randn(shape)
    settings: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    if not dynamo:
        settings = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False, **settings)
    gm = read_file(tmp_path / "m.onnx")
    more = torch.cat([x, x.flip(0), x])
    torch.testing.assert_close(gm(more), module(more), rtol=1e-4, atol=1e-5)
    kinds = nn.LSTM | nn.GRU | nn.Conv1d | nn.Conv2d | nn.Embedding
    layers = {type(m) for m in module.modules() if isinstance(m, kinds)}
    assert layers == {type(m) for m in gm.modules() if isinstance(m, tuple(layers) or ())}
    sizes = any("sym_size" in str(n.target) for n in gm.graph.nodes)
    assert not sizes or name == "vit", f"arithmetic of sizes is left: {gm.graph}"
