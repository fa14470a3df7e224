"""Float layers with stored codes in LiteRT: the file is smaller, and answers as the codes say."""

import copy
import importlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("ai_edge_litert")

from litert_floats import answers, error, file, kinds, longer, lowered

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.readers.torch import read
from fewbit.model.reference import Reference
from fewbit.model.simulate import QuantizedModel
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.plan.plan import Plan
from fewbit.targets._litert.prepare import prepare

ModelT = importlib.import_module("ai_edge_litert.schema_py_generated").ModelT


def _weight_only(module: nn.Module, x: Tensor, scheme: Scheme) -> QuantizedModel:
    gm = read(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    qtensors = {}
    for layer, part in list(gm.named_modules()):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() >= 2 and "bias" not in name:
                q = QTensor.quantize(parameter.detach(), scheme)
                qtensors[f"{layer}.{name}"] = q
                parameter.data = q.dequantize()
    return QuantizedModel(gm, Plan(()), qtensors, frozenset(), (x,))


SCHEMES = {
    "float16": (Scheme("float16"), 16),
    "int8": (Scheme("int8", "channel"), 8),
    "int8_tensor": (Scheme("int8"), 8),
    "uint8": (Scheme("uint8", "channel", symmetric=False), 8),
    "int4": (Scheme("int4", "channel"), 4),
    "uint4_tensor": (Scheme("uint4", symmetric=False), 4),
    "int6": (Scheme("int6", "channel"), 8),
    "int8_group": (Scheme("int8", "group", group_size=16), 8),
    "int4_group": (Scheme("int4", "group", group_size=16), 4),
}


class Sequences(nn.Module):
    """Layers on sequences [N, T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 24, bias=False), nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x), self.conv(x), self.lstm(x)[0]


class Images(nn.Module):
    """Layers on images [N, 16, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 4, groups=16)
        self.transposed = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x), self.depthwise(x), self.transposed(x)


class Words(nn.Module):
    """A table and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 32), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


NETWORKS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "sequences": (Sequences, torch.randn(2, 16, 16)),
    "images": (Images, torch.randn(2, 16, 9, 8)),
    "words": (Words, torch.tensor([[1, 39, 0], [7, 3, 3]])),
}
CASES = [(n, s) for n in ("sequences", "images") for s in ("float16", "int8", "uint8", "int4_group")]
CASES += [("words", s) for s in SCHEMES]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_weight_only(name: str, scheme: str) -> None:
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    wanted, bits = SCHEMES[scheme]
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.05)  # not centred: zero points differ
    quantized = _weight_only(module, x, wanted)
    content = file(prepare(lower(quantized)))
    for given in (x, longer(x)):
        expected = [t.detach() for t in pytree.tree_leaves(quantized(given))]
        for reference in (False, True):
            for found, e in zip(answers(content, given, reference=reference), expected, strict=True):
                assert error(found, e) < 1e-5, f"reference kernels: {reference}"
    assert _stored_bits(content) == {bits}


def _stored_bits(content: bytes) -> set[int]:
    """Widths of the large constants of a file."""
    model = ModelT.InitFromPackedBuf(content)
    widths = set()
    for tensor in model.subgraphs[0].tensors:
        numbers = math.prod(int(s) for s in tensor.shape)
        data = model.buffers[tensor.buffer].data
        if data is not None and numbers >= 128:
            widths.add(8 * len(data) // numbers)
    return widths


def test_4_bit_weights_beside_floats_are_said_to_be_slow() -> None:
    quantized = _weight_only(Words(), NETWORKS["words"][1], Scheme("int4", "channel"))
    notes = [
        op.note
        for op in prepare(lower(quantized)).ops
        if op.kind == "module" and op.attrs["type"] == "Linear"
    ]
    assert len(notes) == 1 and "activations='dynamic'" in notes[0]


def test_half_the_bytes_for_half_the_bits() -> None:
    """A network in float16 is half as large."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 50)).eval(), torch.randn(4, 200)
    whole = len(file(prepare(lowered(model, x))))
    quantized = _weight_only(copy.deepcopy(model), x, Scheme("float16"))
    content = file(prepare(lower(quantized)))
    assert len(content) < 0.52 * whole
    assert error(answers(content, x)[0], model(x).detach()) < 2e-3


class Small(nn.Module):
    """Convolutions of every kind and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.hidden(x.flatten(2).transpose(1, 2))))


def _dynamic(bits: int) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 1.0, 3.0, 10.0]).reshape(4, 1, 1, 1)
    quantized = fewbit.quantize(
        Small().eval(), x, weights=f"int{bits}", activations="dynamic", target="litert", progress=False
    )
    return quantized, x


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_ranges(bits: int) -> None:
    """The runtime quantizes each row by itself: so does the prepared program, and the codes agree."""
    quantized, x = _dynamic(bits)
    program = lower(quantized)
    dynamic = [op.layer for op in program.ops if op.kind.startswith("dynamic_")]
    assert dynamic == ["stem", "grouped", "depth", "hidden", "head"]
    prepared = prepare(program)
    content = file(prepared)
    expected = Reference(prepared)(x)
    for reference in (False, True):
        assert error(answers(content, x, reference=reference)[0], expected) < 1e-5
    assert error(expected, Reference(program)(x)) < 5e-2
    assert "DEQUANTIZE" in kinds(content)  # the depthwise layer's weights: it is computed in float
    assert kinds(content).count("DEQUANTIZE") == 1


def test_an_image_alone_answers_as_in_a_batch() -> None:
    """A range of its own for each row: other samples change nothing."""
    quantized, x = _dynamic(8)
    content = file(prepare(lower(quantized)))
    together = answers(content, x)[0]
    alone = torch.cat([answers(content, x[i : i + 1])[0] for i in range(4)])
    assert error(together, alone) < 1e-6
