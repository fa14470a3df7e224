"""Functions, arithmetic, products and reductions in float: ONNX Runtime answers as torch does."""

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
from onnx_floats import check

ACROSS_THE_BATCH: list[Function] = [
    torch.var,
    lambda x: x.log_softmax(0),
    lambda x: x[0] @ x[1].mT,
    lambda x: x + x[0],
]


@pytest.mark.parametrize("name", OF_ONE)
def test_of_one(name: str) -> None:
    x, functions = OF_ONE[name]
    check(One(functions), x)


def test_functions_across_the_batch() -> None:
    check(One(ACROSS_THE_BATCH), sample(3, 4, 6))


def test_of_small_numbers() -> None:
    x = torch.logspace(-8, 0.2, 64).reshape(2, 32) * torch.tensor([[1.0], [-0.6]])
    check(One([torch.expm1, torch.log1p]), x, atol=1e-10)


def test_of_two() -> None:
    check(Two(OF_TWO), sample(3, 4, 6), sample(3, 4, 6).flip(1) + 0.1, atol=1e-5)


INDICES: list[Function] = [
    lambda x, i, k: x[:, i[0]],
    lambda x, i, k: x[i],
    lambda x, i, k: x[i[:, 0], i[:, 1]],
    lambda x, i, k: x.gather(1, k),
    lambda x, i, k: x.gather(-1, k[:, :, :2]),
    lambda x, i, k: x.index_select(2, i[0]),
    lambda x, i, k: x[:, :, i],
    lambda x, i, k: x[i[:, 0], :, i[:, 1]],
    lambda x, i, k: x[:, i[0], i[1]],
    lambda x, i, k: x[:, torch.tensor([1, 0, 3])],
    lambda x, i, k: F.one_hot(i, 5),
    lambda x, i, k: F.embedding(i, x[0]),
    lambda x, i, k: x[:, i[:, 0], :, None],
    lambda x, i, k: x[torch.arange(x.shape[0]), i[:, 0]],
]


@pytest.mark.parametrize("number", range(len(INDICES)))
def test_indexing(number: int) -> None:
    g = torch.Generator().manual_seed(4)
    i = torch.randint(0, 3, (3, 2), generator=g)
    check(
        Three([INDICES[number]]),
        sample(3, 4, 6),
        i,
        torch.randint(0, 4, (3, 2, 6), generator=g),
        batch_only=True,
    )


@pytest.mark.parametrize("batch_only", [False, True], ids=["free", "batch"])
def test_attention(batch_only: bool) -> None:
    check(Three(ATTENTION), *attention_inputs(), atol=1e-5, batch_only=batch_only)


def test_what_torch_takes_apart_needs_no_rule() -> None:
    check(One(TAKEN_APART), sample(2, 4, 6), atol=1e-5)
