"""Standard layers in float: what ONNX Runtime answers is what torch answers."""

import pytest
import torch
from onnx_floats import check
from torch import Tensor, nn

torch.manual_seed(0)


def _trained(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not the initial ones, so that a forgotten one shows."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) * 0.5 + 0.3 if "var" in name else torch.randn_like(tensor) * 0.4
                )
    return module


def _shape(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), _shape(2, 4, 11)),
    "conv1d_same": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), _shape(2, 4, 11)),
    "conv2d_grouped": (
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        _shape(2, 4, 9, 8),
    ),
    "conv2d_depthwise_no_bias": (nn.Conv2d(4, 4, 3, groups=4, bias=False), _shape(2, 4, 7, 7)),
    "conv2d_reflect": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), _shape(2, 3, 6, 7)),
    "conv2d_replicate": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate"), _shape(2, 3, 6, 7)),
    "conv2d_circular": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), _shape(2, 3, 6, 7)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 3), padding=(0, 1, 1), stride=(1, 2, 1)), _shape(2, 2, 4, 7, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2), _shape(2, 4, 5)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(
            4, 6, (3, 2), stride=2, padding=(1, 0), output_padding=1, groups=2, dilation=(1, 2)
        ),
        _shape(2, 4, 5, 6),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), _shape(2, 2, 3, 4, 3)),
    "linear": (nn.Linear(5, 7), _shape(3, 5)),
    "linear_no_bias": (nn.Linear(5, 7, bias=False), _shape(3, 5)),
    "linear_3d": (nn.Linear(5, 7), _shape(3, 4, 5)),
    "linear_4d_no_bias": (nn.Linear(5, 7, bias=False), _shape(2, 3, 4, 5)),
    "batch_norm_rows": (nn.BatchNorm1d(5), _shape(3, 5)),
    "batch_norm1d": (nn.BatchNorm1d(5, eps=1e-2), _shape(3, 5, 6)),
    "batch_norm2d_plain": (nn.BatchNorm2d(5, affine=False), _shape(3, 5, 4, 3)),
    "batch_norm3d": (nn.BatchNorm3d(2), _shape(3, 2, 4, 3, 2)),
    "layer_norm": (nn.LayerNorm(6, eps=1e-3), _shape(3, 4, 6)),
    "layer_norm_two_axes": (nn.LayerNorm((4, 6)), _shape(3, 4, 6)),
    "layer_norm_no_bias": (nn.LayerNorm(6, bias=False), _shape(3, 6)),
    "layer_norm_plain": (nn.LayerNorm(6, elementwise_affine=False), _shape(3, 6)),
    "group_norm": (nn.GroupNorm(3, 6, eps=1e-3), _shape(2, 6, 5, 4)),
    "group_norm_plain": (nn.GroupNorm(2, 6, affine=False), _shape(2, 6, 5)),
    "rms_norm": (nn.RMSNorm(6), _shape(3, 4, 6)),
    "rms_norm_eps": (nn.RMSNorm((4, 6), eps=0.1), _shape(3, 4, 6)),
    "rms_norm_plain": (nn.RMSNorm(6, elementwise_affine=False), _shape(3, 6)),
    "instance_norm": (nn.InstanceNorm2d(3, affine=True), _shape(2, 3, 5, 4)),
    "instance_norm_plain": (nn.InstanceNorm1d(3), _shape(2, 3, 5)),
    "instance_norm_tracked": (
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        _shape(2, 3, 5, 4),
    ),
    "instance_norm3d": (nn.InstanceNorm3d(2), _shape(2, 2, 3, 4, 3)),
    "embedding": (nn.Embedding(10, 4), torch.tensor([[1, 9, 0], [3, 3, 2]])),
    "dropout": (nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), _shape(2, 4)),
    "prelu": (nn.PReLU(4), _shape(2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    module, x = LAYERS[name]
    check(
        _trained(module), x, batch_only=name == "group_norm_plain"
    )  # torch fixes the batch of that one otherwise


class _Recurrent(nn.Module):
    """A recurrent layer with all of its answers; given states come as inputs with the batch in front."""

    def __init__(self, layer: nn.Module, states: int) -> None:
        super().__init__()
        self.layer, self.states = layer, states

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        x = x if self.layer.batch_first else x.transpose(0, 1)
        given = (None,) if self.states == 0 else ((h, c),) if self.states == 2 else (h,)
        output, final = self.layer(x, *given)
        return output, *(final if isinstance(final, tuple) else (final,)), h + c


RECURRENT = {
    "lstm": (nn.LSTM(5, 4, batch_first=True), 0),
    "lstm_time_first": (nn.LSTM(5, 4), 0),
    "lstm_states": (nn.LSTM(5, 4, batch_first=True), 2),
    "lstm_deep_both_ways": (nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True), 2),
    "lstm_no_bias": (nn.LSTM(5, 4, num_layers=2, bias=False, bidirectional=True, batch_first=True), 0),
    "gru": (nn.GRU(5, 4, batch_first=True), 0),
    "gru_states": (nn.GRU(5, 4), 1),
    "gru_deep_both_ways": (nn.GRU(5, 4, num_layers=3, bidirectional=True, batch_first=True), 1),
    "rnn": (nn.RNN(5, 4, num_layers=2, bidirectional=True, batch_first=True), 1),
    "rnn_relu": (nn.RNN(5, 4, nonlinearity="relu"), 0),
    "gru_no_bias": (nn.GRU(5, 4, bias=False, batch_first=True), 0),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str) -> None:
    layer, states = RECURRENT[name]
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    check(
        _Recurrent(_trained(layer), states), _shape(3, 6, 5), _shape(3, depth, 4), _shape(3, depth, 4) * 0.5
    )
