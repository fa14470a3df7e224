"""LiteRT files end to end: random networks bit for bit, channels last without needless transposes, anyone's files."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from random_networks import draw
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

import fewbit
from fewbit.errors import ArtifactError, FewbitError, TargetError
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.targets import get_target
from fewbit.targets._litert.model import load


def quantized(net: nn.Module, x: Tensor, **options: Any) -> Any:
    return fewbit.quantize(net.eval(), x, target="litert", progress=False, **options)


def operators(path: Path) -> list[str]:
    return [op.name for op in load(path).operators]


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_are_exact(seed: int, tmp_path: Path) -> None:
    drawn = draw(seed)
    model = fewbit.quantize(drawn.module, [drawn.inputs(48)], example=drawn.inputs(4, 3), **drawn.recipe)
    artifact = fewbit.export(model, tmp_path / "net.tflite", time=False)
    check = artifact.verification
    assert check is not None and check.layers
    assert sum(layer.differing for layer in check.layers) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a strided depthwise convolution, pooling and softmax, for 8 by 8 images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 5), nn.Softmax(-1),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("litert") / "small.tflite"
    fewbit.export(quantized(net, torch.randn(64, 3, 8, 8)), path, time=False)
    return path


def test_one_transpose_at_the_input_and_none_behind_it(small: Path) -> None:
    assert operators(small) == [
        "QUANTIZE", "TRANSPOSE", "CONV_2D", "PAD", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "RESHAPE", "FULLY_CONNECTED",
        "SOFTMAX", "DEQUANTIZE",
    ]  # fmt: skip


class ChannelsLast(nn.Module):
    """Takes and gives images with channels last, as Keras models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


def test_channels_last_in_and_out_needs_no_transpose(tmp_path: Path) -> None:
    path = tmp_path / "nhwc.tflite"
    fewbit.export(quantized(ChannelsLast(), torch.randn(32, 6, 6, 3)), path, time=False)
    assert operators(path) == ["QUANTIZE", "CONV_2D", "CONV_2D", "DEQUANTIZE"]


@pytest.mark.parametrize(("dims", "size", "kernel", "stride", "padding"), [
    (2, 7, 2, 2, 0), (2, 8, 3, 2, 0), (2, 9, 3, 2, 1), (2, 8, 2, 3, 1), (1, 8, 3, 3, 1), (1, 7, 2, 2, 0),
])  # fmt: skip
def test_the_last_windows_of_ceil_mode(
    dims: int, size: int, kernel: int, stride: int, padding: int, tmp_path: Path
) -> None:
    conv, pool = ((nn.Conv1d, nn.MaxPool1d), (nn.Conv2d, nn.MaxPool2d))[dims - 1]
    net = nn.Sequential(conv(2, 3, 1), pool(kernel, stride, padding, ceil_mode=True), conv(3, 2, 1))
    x, path = torch.randn(32, 2, *[size] * dims), tmp_path / "ceil.tflite"
    model = quantized(net, x)
    fewbit.export(model, path, time=False)
    answer, wanted = get_target("litert").open_exact(path)(x)[0], model(x).detach()
    assert answer.shape == wanted.shape
    assert float((answer - wanted).norm() / wanted.norm()) < 0.02


class Turned(nn.Module):
    """Rows of numbers, turned behind a convolution: steps come first, as an LSTM wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm = nn.Conv1d(2, 6, 3), nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.conv(x).permute(0, 2, 1))[0]


def test_rows_that_are_turned_between_layers(tmp_path: Path) -> None:
    x, path = torch.randn(32, 2, 5), tmp_path / "turned.tflite"
    model = quantized(Turned(), x)
    fewbit.export(model, path, time=False)
    answer, wanted = get_target("litert").open_exact(path)(x)[0], model(x).detach()
    assert float((answer - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(("io", "first", "last"), [
    ("int8", "CONV_2D", "CONV_2D"), ("uint8", "QUANTIZE", "QUANTIZE"), ("float32", "QUANTIZE", "DEQUANTIZE"),
])  # fmt: skip
def test_codes_handed_over(io: str, first: str, last: str, tmp_path: Path) -> None:
    path, x = tmp_path / "io.tflite", torch.randn(32, 6, 6, 3)
    model = quantized(ChannelsLast(), x)
    fewbit.export(model, path, io=io, time=False)
    found = load(path)
    kinds = {found.tensors[i].kind.lower() for i in (*found.inputs, *found.outputs)}
    assert kinds == {io} and operators(path)[0] == first and operators(path)[-1] == last
    assert fewbit.verify(path).exact
    exact = get_target("litert").open_exact(path)(x)[0]
    program = get_target("litert").prepare(lower(model))
    assert torch.equal(exact, Reference(program, "q31_double")(x))


def test_codes_cannot_be_handed_over_by_other_targets(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="target 'onnx' cannot hand over 'int8'"):
        fewbit.export(quantized(ChannelsLast(), torch.randn(8, 6, 6, 3)), tmp_path / "a.onnx", io="int8")
    assert not list(tmp_path.iterdir())


def test_a_model_planned_for_another_target_is_exact_too(tmp_path: Path) -> None:
    """One calibration, many artifacts: uint8 codes for ONNX Runtime become int8 ones here."""
    x = torch.randn(32, 6, 6, 3)
    model = fewbit.quantize(ChannelsLast().eval(), x, target="onnx", progress=False)
    check = fewbit.export(model, tmp_path / "m.tflite", time=False).verification
    assert check is not None and check.exact and check.layers


class Rows(nn.Module):
    """A learned row in front of the others: its repetition over the batch has no operator in the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.linear = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.row.expand(x.shape[0], -1, -1), x], 1))


def test_what_cannot_grow_with_the_batch_takes_one_sample_at_a_time(tmp_path: Path) -> None:
    x = torch.randn(32, 5, 8)
    model = quantized(Rows(), x)
    path = tmp_path / "rows.tflite"
    assert fewbit.export(model, path, time=False).verification is not None
    assert load(path).tensors[load(path).inputs[0]].shape[0] == 1
    answer = get_target("litert").open(path)(x)[0]
    assert answer.shape == (32, 6, 8) and float((answer - model(x)).abs().max()) < 0.1


def test_everything_that_has_no_operator_is_listed_at_once(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(torch.erfinv(x.clamp(-0.5, 0.5)))

    with pytest.raises(TargetError, match=r"(?s)no operation for these.*erfinv.*i0"):
        fewbit.export(Odd(), tmp_path / "odd.tflite", example=torch.randn(2, 4))


def test_files_of_others_are_verified_too(data_dir: Path, tmp_path: Path) -> None:
    """The reference conversion of MLPerf Tiny: every code as the program in the file says, in the reference kernels."""
    source = data_dir / "models" / "mlperf-tiny-resnet8-int8.tflite"
    result = fewbit.verify(source)
    assert result.exact and len(result.layers) >= 16
    assert sum(layer.differing for layer in result.layers) == 0


def test_a_weight_that_was_changed_is_another_file_not_an_error(small: Path, tmp_path: Path) -> None:
    """Verification compares a file with itself; comparing with the model shows the change."""
    changed = tmp_path / "changed.tflite"
    content = bytearray(small.read_bytes())
    model = load(small)
    weight = next(
        t for t in model.tensors if t.name.endswith("/weight") and t.data is not None and t.data.size > 64
    )
    assert weight.data is not None
    place = bytes(content).find(weight.data.tobytes())
    assert place > 0
    content[place] ^= 0x7F
    changed.write_bytes(bytes(content))
    assert fewbit.verify(changed).exact


def test_damaged_files_are_one_clear_error(small: Path, tmp_path: Path) -> None:
    """Bits flipped, words replaced, ends cut: an error of ours or an exact file; never a crash or a hang."""
    whole, path, refused = small.read_bytes(), tmp_path / "damaged.tflite", 0
    for seed in range(150):
        rng, data = random.Random(seed), bytearray(whole)
        place = rng.randrange(len(data) - 4)
        if seed % 3 == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif seed % 3 == 1:
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)])
        else:
            data = data[:place]
        path.write_bytes(bytes(data))
        try:
            fewbit.verify(path)
        except FewbitError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)[:60]
    assert refused > 60


def test_a_text_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    path.write_text("hello, this is no flatbuffer")
    with pytest.raises(ArtifactError, match=r"a.tflite: not a .tflite file"):
        fewbit.verify(path)


def test_nothing_is_left_behind_after_a_refusal(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(small, folder / "keep.tflite")
    with pytest.raises(FewbitError):
        fewbit.export(
            nn.Sequential(nn.Conv3d(1, 2, 3)), folder / "no.tflite", example=torch.randn(1, 1, 4, 4, 4)
        )
    assert [p.name for p in folder.iterdir()] == ["keep.tflite"]


def test_four_bit_weights_are_stored_in_four_bits(tmp_path: Path) -> None:
    """Convolutions of every kind and a linear layer with an odd number of weights: half the bytes, still exact."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Conv2d(32, 33, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(33, 5),
    )  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    sizes = {}
    for bits in (8, 4):
        path = tmp_path / f"w{bits}.tflite"
        fewbit.export(quantized(net, x, weights=f"int{bits}"), path, time=False)
        weights = [t for t in load(path).tensors if t.name.endswith("/weight")]
        assert {t.kind for t in weights} == {f"INT{bits}"} and len(weights) == 4
        assert fewbit.verify(path).exact
        sizes[bits] = path.stat().st_size
    count = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert sizes[8] - sizes[4] >= count // 2 - 64


def test_a_clamp_that_cuts_nothing_off(tmp_path: Path) -> None:
    """A ReLU behind a pooling whose codes start at zero anyway."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    check = fewbit.export(
        quantized(net, torch.randn(64, 1, 8, 8)), tmp_path / "m.tflite", time=False
    ).verification
    assert check is not None and check.exact
