"""Standard layers in float: what LiteRT answers is what torch answers, with few operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from float_functions import One
from litert_floats import check, kinds
from networks import Attention, Gamma, Loose, ResNet, Tied, Token, Twice


def _trained(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not the initial ones, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                random = torch.rand(tensor.shape, generator=generator) * 0.5 + 0.3
                tensor.copy_(random if "var" in name else random * 2 - 1.1)
    return module


def _x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


# layers by the shape of their input, each group one model with an output for each layer
LAYERS: dict[str, tuple[Tensor, list[nn.Module]]] = {
    "rows": (
        _x(3, 5),
        [
            nn.Linear(5, 7),
            nn.Linear(5, 7, bias=False),
            nn.BatchNorm1d(5),
            nn.LayerNorm(5, bias=False),
            nn.LayerNorm(5, elementwise_affine=False),
            nn.RMSNorm(5, elementwise_affine=False),
            nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3), nn.BatchNorm1d(3)),
        ],
    ),
    "sequences": (
        _x(3, 4, 6),
        [
            nn.Linear(6, 7),
            nn.Conv1d(4, 6, 3, stride=2, padding=1),
            nn.Conv1d(4, 6, 4, padding="same", dilation=2),
            nn.Conv1d(4, 8, 3, padding=2, groups=4),
            nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 2, 3)),
            nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2),
            nn.BatchNorm1d(4, eps=1e-2),
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)),
            nn.LayerNorm(6, eps=1e-3),
            nn.LayerNorm((4, 6)),
            nn.RMSNorm(6),
            nn.RMSNorm((4, 6), eps=0.1),
            nn.GroupNorm(2, 4, affine=False),
            nn.InstanceNorm1d(4),
            nn.PReLU(4),
        ],
    ),
    "images": (
        _x(2, 4, 9, 8),
        [
            nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.Conv2d(4, 12, 3, padding=1, groups=4),
            nn.Conv2d(4, 5, 3, stride=2, padding=1),
            nn.Conv2d(4, 5, 5, padding="same"),
            nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="replicate"),
            nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="circular"),
            nn.BatchNorm2d(4, affine=False),
            nn.GroupNorm(2, 4, eps=1e-3),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.LayerNorm(8),
            nn.Linear(8, 3, bias=False),
            nn.PReLU(),
        ],
    ),
    "turned_convolutions": (
        _x(2, 4, 5, 6),
        [
            nn.ConvTranspose2d(
                4, 6, (3, 2), stride=2, padding=(1, 0), output_padding=1, groups=2, dilation=(1, 2)
            ),
            nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
            nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.ConvTranspose2d(4, 3, 3, padding=1),
            nn.Sequential(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.BatchNorm2d(3), nn.ReLU()),
        ],
    ),
    "tokens": (torch.tensor([[1, 9, 0], [3, 3, 2]]), [nn.Embedding(10, 4)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    x, layers = LAYERS[name]
    model = One([_trained(layer).eval() for layer in layers])
    model.layers = nn.ModuleList(layers)
    check(model, x)


NETWORKS: dict[str, tuple[nn.Module, Tensor]] = {
    "attention": (Attention(need_weights=True), _x(2, 5, 8)),
    "tied": (Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]])),
    "twice": (Twice(), _x(2, 4, 6, 6)),
    "loose": (Loose(), _x(2, 3, 6, 6)),
    "gamma": (Gamma(), _x(2, 4, 5, 6)),
    "token": (Token(), _x(2, 4, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    module, x = NETWORKS[name]
    check(_trained(module), x)


def test_a_residual_network_is_convolutions_and_additions() -> None:
    """Batch norms are in the convolutions, ReLUs in the operators, and the image is turned once, at the start."""
    _, content = check(_trained(ResNet()), _x(2, 3, 16, 16))
    expected = ["TRANSPOSE", "CONV_2D", *["CONV_2D", "CONV_2D", "ADD"] * 2, "AVERAGE_POOL_2D", "RESHAPE"]
    assert kinds(content) == [*expected, "FULLY_CONNECTED"]


class Shared(nn.Module):
    """A convolution that is read before and behind its batch norm: the norm cannot join it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.norm(y)) + y


def test_a_norm_joins_only_what_nothing_else_reads() -> None:
    _, content = check(_trained(Shared()), _x(2, 3, 6, 6))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "MUL", "ADD", "ADD", "TRANSPOSE"]


class Flat(nn.Module):
    """A picture flattened for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


def test_weights_are_turned_and_not_the_image() -> None:
    _, content = check(_trained(Flat()), _x(2, 3, 6, 6))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "RESHAPE", "FULLY_CONNECTED"]


def test_channels_last_inside_a_model_cost_nothing() -> None:
    """As in ConvNeXt: permute, normalize the last axis, permute back; the image lies so anyway."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.out(self.norm(self.conv(x).permute(0, 2, 3, 1)))
            return x + y.permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Block(), Block())
    _, content = check(_trained(model), _x(2, 3, 8, 8))
    assert kinds(content).count("TRANSPOSE") == 2  # the model's own input and output
