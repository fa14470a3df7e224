"""Recurrent layers in LiteRT: every form of them, and no memory of the run before."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from litert_floats import check, kinds, lowered

from fewbit.errors import TargetError
from fewbit.targets._litert.prepare import prepare
from fewbit.targets._litert.runtime import Session


def _x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


class _Recurrent(nn.Module):
    """A recurrent layer with all of its answers; given states come as inputs with the batch in front."""

    def __init__(self, layer: nn.RNNBase, given: bool) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        x = x if self.layer.batch_first else x.transpose(0, 1)
        state = (h, c) if isinstance(self.layer, nn.LSTM) else h
        output, final = self.layer(x, *([state] if self.given else []))
        output = output if self.layer.batch_first else output.transpose(0, 1)
        finals = final if isinstance(final, tuple) else (final,)
        return output, *(f.transpose(0, 1) for f in finals), (h + c).transpose(0, 1)


LAYERS = {
    "lstm": (nn.LSTM(5, 4, batch_first=True), False),
    "lstm_time_first": (nn.LSTM(5, 4), False),
    "lstm_states": (nn.LSTM(5, 4, batch_first=True), True),
    "lstm_deep_both_ways": (nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True), True),
    "lstm_no_bias": (nn.LSTM(5, 4, num_layers=2, bias=False, bidirectional=True, batch_first=True), False),
    "lstm_projected": (nn.LSTM(5, 6, proj_size=4, batch_first=True), False),
    "gru": (nn.GRU(5, 4, batch_first=True), False),
    "gru_states": (nn.GRU(5, 4), True),
    "gru_deep_both_ways": (nn.GRU(5, 4, num_layers=2, bidirectional=True, batch_first=True), True),
    "gru_no_bias": (nn.GRU(5, 4, bias=False, batch_first=True), False),
    "rnn": (nn.RNN(5, 4, num_layers=2, bidirectional=True, batch_first=True), True),
    "rnn_relu": (nn.RNN(5, 4, nonlinearity="relu"), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent(name: str) -> None:
    torch.manual_seed(0)
    layer, given = LAYERS[name]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    check(_Recurrent(layer, given), _x(3, 4, 5), _x(3, depth, 4), _x(3, depth, 4) * 0.5)


class Last(nn.Module):
    """A classifier that reads the last state of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_the_second_run_knows_nothing_of_the_first(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, model = _x(1, 6, 5), Last()
    _, content = check(model, x)
    path = tmp_path / "last.tflite"
    path.write_bytes(content)
    run = Session(path)
    first = run(x)[0].clone()
    run(x * 7)
    assert torch.equal(run(x)[0], first)


def test_the_input_is_multiplied_once_for_the_whole_sequence() -> None:
    _, content = check(Last(), _x(2, 6, 5))
    found = kinds(content)
    assert found.count("FULLY_CONNECTED") == 1 + 5 + 1  # the sequence, every state but the first, the head
    assert "CONCATENATION" not in found  # nobody reads the states in between


def test_a_sequence_of_any_length_is_refused() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    program = lowered(TimeFirst(), _x(6, 3, 5))
    program.input_shapes[0] = (None, 3, 5)
    with pytest.raises(TargetError, match=r"gru: .*the length of its sequence is free.*batch_first=True"):
        prepare(program)
