"""Programs as PyTorch modules in Q/DQ form: run as they are, they compute what the reference computes."""

from typing import Any

import pytest
import torch
from random_networks import draw
from torch import Tensor, nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.reference import Reference
from fewbit.model.signed import signed
from fewbit.targets._pt2e.module import QdqModule, visible
from fewbit.targets._pt2e.styles import ONEDNN, XNNPACK

STYLES = {"oneDNN": (ONEDNN, lambda program: program), "XNNPACK": (XNNPACK, signed)}


def differing(
    program: Program, inputs: tuple[Tensor, ...], seen: dict[str, Tensor]
) -> list[tuple[str, int, int]]:
    """Operations (kind, codes that differ from the reference on the same inputs, largest difference)."""
    reference, known = Reference(program), seen | dict(zip(program.inputs, inputs, strict=True))
    found = []
    for op in program.ops:
        if op.output in seen and all(name in known for name in op.inputs):
            expected = reference.step(op, [known[name] for name in op.inputs])
            difference = (expected - seen[op.output].reshape(expected.shape)).abs()
            found.append((op.kind, int((difference > 0).sum()), int(difference.max())))
    return found


def codes(module: QdqModule, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        values = module(*inputs)[len(module.program.output_names()) :]
    return {name: value.to(torch.int32) for name, value in zip(module.codes, values, strict=True)}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", [1, 3, 10, 13])
def test_random_networks_have_the_codes_of_the_reference(seed: int, style: str) -> None:
    drawn = draw(seed)
    quantized = fewbit.quantize(drawn.module, [drawn.inputs(32)], example=drawn.inputs(4, 3), **drawn.recipe)
    form, prepare = STYLES[style]
    program = prepare(lower(quantized))
    inputs = drawn.inputs(4, 1)
    found = differing(program, inputs, codes(QdqModule(program, form, visible(program)), inputs))
    assert len(found) >= 3 and max(largest for _, _, largest in found) <= 1
    assert sum(count for _, count, _ in found) <= 4  # float sums round where integers do not


class Attention(nn.Module):
    """Attention, a convolution padded unevenly, a product with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 4, padding="same")
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x).transpose(1, 2) * 0.5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("activations", ["int8", "dynamic", "float"])
def test_layers_that_are_not_integer_compute_what_the_reference_does(activations: str, style: str) -> None:
    x = torch.randn(4, 6, 10)  # as many as the example: "same" padding fixes the batch
    program = lower(fewbit.quantize(Attention().eval(), x, example=x, activations=activations))
    form, prepare = STYLES[style]
    program = prepare(program)
    with torch.no_grad():
        actual = QdqModule(program, form)(x)[0]
    expected = Reference(program)(x)
    # Ranges for rows instead of whole tensors, or none where the runtime has no kernel for it, move every number.
    tolerance = 0.05 if activations == "dynamic" else 1e-5 if activations == "float" else 0.03
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_weights_of_float_layers_stay_codes_where_that_saves_memory(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.embed = kind(5, 7, batch_first=True), nn.Embedding(9, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.rnn(self.embed(tokens))[0]

    tokens = torch.randint(0, 9, (4, 6))
    program = lower(fewbit.quantize(Net().eval(), example=tokens, activations="float"))
    expected = Reference(program)(tokens)
    for style, stored in ((ONEDNN, torch.int8), (XNNPACK, torch.float32)):
        module = QdqModule(program, style)
        weights = {
            t.dtype for name, t in module.state_dict().items() if "weight" in name and "::" not in name
        }
        assert weights == {stored}
        torch.testing.assert_close(module(tokens)[0], expected, rtol=1e-5, atol=1e-6)
