"""Functions, arithmetic, products and reductions in float: LiteRT answers as torch does."""

import pytest
import torch
import torch.nn.functional as F
from float_functions import (
    ATTENTION,
    OF_ONE,
    OF_TWO,
    TAKEN_APART,
    Function,
    One,
    Three,
    Two,
    attention_inputs,
    sample,
)
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from litert_floats import check, kinds, lowered

from fewbit.errors import TargetError
from fewbit.targets._litert.prepare import prepare


@pytest.mark.parametrize("name", OF_ONE)
def test_of_one(name: str) -> None:
    x, functions = OF_ONE[name]
    check(One(functions), x)


def test_of_two() -> None:
    check(Two(OF_TWO), sample(3, 4, 6), sample(3, 4, 6).flip(1) + 0.1)


def test_places() -> None:
    g = torch.Generator().manual_seed(4)
    i, k = torch.randint(0, 3, (3, 2), generator=g), torch.randint(0, 4, (3, 2, 6), generator=g)
    functions: list[Function] = [
        lambda x, i, k: x.gather(1, k),
        lambda x, i, k: x.gather(-1, k[:, :, :2]),
        lambda x, i, k: x[:, torch.tensor([1, 0, 3])],
        lambda x, i, k: x[:, torch.tensor([[1, 0], [3, 3]])],
        lambda x, i, k: x[:, torch.tensor([1, 0]), torch.tensor([5, 2])],
        lambda x, i, k: x.index_select(2, torch.tensor([4, 4, 0])),
        lambda x, i, k: F.one_hot(i, 5),
        lambda x, i, k: F.embedding(i, torch.arange(12.0).reshape(4, 3)),
    ]
    check(Three(functions), sample(3, 4, 6), i, k)


def test_attention() -> None:
    check(Three(ATTENTION), *attention_inputs())


def test_a_transposed_operand_is_read_as_it_lies() -> None:
    """y.mT costs no transpose: BATCH_MATMUL reads the second operand transposed."""
    _, content = check(Two([lambda x, y: x @ y.mT]), sample(3, 4, 6), sample(3, 5, 6))
    assert kinds(content) == ["BATCH_MATMUL"]


def test_what_torch_takes_apart_needs_no_rule() -> None:
    check(One(TAKEN_APART), sample(2, 4, 6))


def test_what_has_no_operator_is_listed_whole() -> None:
    """What has no rule, and what has one that says no."""
    functions = [
        torch.special.bessel_j0,
        lambda x: x + 1,
        torch.special.i0,
        lambda x: torch.atan2(x, x[:, :1]),
        lambda x: F.max_pool2d(x[:, None, None], (1, 2), dilation=1, ceil_mode=True),
        lambda x: x.topk(2, largest=False),
    ]
    with pytest.raises(TargetError) as caught:
        prepare(lowered(One(functions), sample(2, 6)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "LiteRT has no operation for these, or fewbit cannot write it yet:"
    assert [line.split(":")[1].strip() for line in lines[1:-1]] == [
        "atan2",
        "special_bessel_j0",
        "special_i0",
    ]


def test_a_linear_layer_with_a_constant_matrix() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", sample(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x @ self.table)

    _, content = check(Product(), sample(3, 4, 6))
    assert kinds(content) == ["FULLY_CONNECTED"]  # the ReLU is its activation
