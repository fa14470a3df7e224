"""ONNX files that are damaged, hostile or too new: one clear error, nothing else."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_made import made, saved

from fewbit.errors import ArtifactError, FewbitError, ModelError
from fewbit.model.readers.onnx import read_file


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _network() -> onnx.ModelProto:
    """A little of everything: convolution, pooling, a chain of sizes, a product."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MaxPool", ["b"], ["p"], name="pool", kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Shape", ["p"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "front"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["p", "shape"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["g"], transB=1, name="fc"),
        helper.make_node("Softmax", ["g"], ["y"], axis=-1),
        helper.make_node("Pad", ["x", "pads"], ["wide"]),
        helper.make_node("ReduceMean", ["wide", "axes"], ["m"], keepdims=0),
    ]
    constants = {
        "conv.weight": _floats(4, 3, 3, 3), "conv.bias": _floats(4), "zero": np.int64(0), "front": np.array([0]),
        "rest": np.array([-1]), "fc.weight": _floats(5, 16), "fc.bias": _floats(5),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "axes": np.array([1, 2, 3]),
    }  # fmt: skip
    return made(nodes, {"x": ("N", 3, 8, 8)}, ["y", "m"], constants)


def _product(opset: int = 21) -> onnx.ModelProto:
    return made(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("N", 6)}, ["y"], {"w": _floats(6, 5)}, opset
    )


def _refused(model: onnx.ModelProto | bytes, folder: Path, kind: type[FewbitError], *words: str) -> None:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(kind) as caught:
        read_file(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert len(message) < 1500
    for word in words:
        assert word in message


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"x" * 50])
def test_not_an_onnx_file(content: bytes, tmp_path: Path) -> None:
    _refused(content, tmp_path, ArtifactError, "not an ONNX file")


def test_no_file_and_no_ordinary_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_file(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="ordinary file"):
        read_file(tmp_path)


def test_an_opset_from_the_future(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    model = _product()
    model.opset_import[0].version = newest + 1
    _refused(model, tmp_path, ModelError, f"opset {newest + 1}", f"up to {newest}", "upgrade onnx")


def test_an_opset_from_the_past(tmp_path: Path) -> None:
    model = _product()
    model.opset_import[0].version = 6
    _refused(model, tmp_path, ModelError, "opset 6", "opsets 7 to")


def test_an_ir_version_from_the_future(tmp_path: Path) -> None:
    model = _product()
    model.ir_version = onnx.IR_VERSION + 1
    _refused(model, tmp_path, ModelError, f"IR version {onnx.IR_VERSION + 1}", "upgrade onnx")


def test_the_newest_opset_is_read_though_the_runtime_is_older(tmp_path: Path) -> None:
    model = _product()
    model.opset_import[0].version = onnx.defs.onnx_opset_version()
    model.ir_version = onnx.IR_VERSION
    gm, x = read_file(saved(model, tmp_path)), torch.randn(2, 6)
    torch.testing.assert_close(gm(x).detach(), x @ torch.from_numpy(_floats(6, 5)))


def test_all_unknown_operators_are_listed_at_once(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", 1, None)])
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="where_it_is"),
        helper.make_node("If", ["c"], ["b"], name="either", then_branch=branch, else_branch=branch),
        helper.make_node("Magic", ["x"], ["d"], name="spell", domain="com.example"),
        helper.make_node("Relu", ["x"], ["e"], name="fine"),
    ]
    infos = [helper.make_tensor_value_info(n, t, s) for n, t, s in (("x", 1, ["N", 3]), ("c", 9, []))]
    outputs = [helper.make_tensor_value_info(n, 1, None) for n in "abde"]
    model = helper.make_model(helper.make_graph(nodes, "g", infos, outputs))
    words = (
        "3 operators",
        "where_it_is",
        "NonZero",
        "either",
        "If: control flow",
        "spell",
        "com.example.Magic",
    )
    _refused(model, tmp_path, ModelError, *words)


def test_a_size_that_depends_on_values(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], name="bend")]
    model = made(nodes, {"x": (4, 6), "shape": (2,)}, ["y"], types={"shape": "int64"})
    _refused(model, tmp_path, ModelError, "bend", "values of a tensor")


# ---- files that lie ---------------------------------------------------------------------------------------


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


LIES: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "more rows": (lambda m: _tensor(m, "fc.weight").dims.__setitem__(0, 6), "fc.weight"),
    "huge": (lambda m: _tensor(m, "fc.weight").dims.__setitem__(0, 2**40), "fc.weight"),
    "huge twice": (lambda m: _tensor(m, "fc.weight").dims.extend([2**62, 2**62]), "fc.weight"),
    "negative": (lambda m: _tensor(m, "fc.weight").dims.__setitem__(0, -5), "fc.weight"),
    "other type": (lambda m: setattr(_tensor(m, "fc.weight"), "data_type", TensorProto.DOUBLE), "fc.weight"),
    "no type": (lambda m: setattr(_tensor(m, "fc.weight"), "data_type", 99), "unknown type 99"),
    "cut": (lambda m: setattr(_tensor(m, "conv.weight"), "raw_data", b"1234"), "conv.weight"),
    "empty": (lambda m: _tensor(m, "conv.weight").ClearField("raw_data"), "conv.weight"),
    "undefined": (lambda m: m.graph.node[1].input.__setitem__(0, "nothing"), "nothing"),
    "circle": (lambda m: m.graph.node[0].input.__setitem__(0, "b"), "which nothing before it computes"),
    "twice": (lambda m: m.graph.node.add().CopyFrom(m.graph.node[1]), "computed twice"),
    "shadow": (lambda m: m.graph.node[1].output.__setitem__(0, "fc.bias"), "both stored and computed"),
    "no output": (lambda m: m.graph.ClearField("output"), "no outputs"),
    "unknown output": (lambda m: setattr(m.graph.output[0], "name", "none"), "nothing computes the output"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself(lie: str, tmp_path: Path) -> None:
    model = _network()
    LIES[lie][0](model)
    _refused(model, tmp_path, ArtifactError, LIES[lie][1])


def _many(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


HUGE = {
    "ConstantOfShape": ([], [_many(2**31, 2**31)], {}),
    "Expand": (["x"], [_many(2**20, 2**20, 6)], {}),
    "Tile": (["x"], [_many(2**20, 2**20)], {}),
    "Pad": (["x"], [_many(0, 0, 0, 2**40)], {}),
    "Range": ([], [np.int64(0), np.int64(2**50), np.int64(1)], {}),
    "Resize": (["x"], ["", np.array([1, 9e3], np.float32)], {}),
    "OneHot": (["i"], [np.int64(2**40), _floats(2)], {}),
}


@pytest.mark.parametrize("op", HUGE)
def test_a_small_file_that_asks_for_huge_tensors(op: str, tmp_path: Path) -> None:
    computed, constants, attrs = HUGE[op]
    stored = {f"c{k}": c for k, c in enumerate(constants) if not isinstance(c, str)}
    names = [*computed, *(f"c{k}" if f"c{k}" in stored else "" for k in range(len(constants)))]
    nodes = [helper.make_node(op, names, ["out"], name="the_node", **attrs)]
    if op == "Resize":
        nodes.append(helper.make_node("Resize", ["out", "", "c1"], ["more"], name="again"))
    inputs = {"x": ("N", 6), "i": ("N", 4)}
    last = "more" if op == "Resize" else "out"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    model = made(nodes, inputs, ["y"], stored, types={"i": "int64"})
    del model.graph.input[0 if computed == ["i"] else 1]
    _refused(model, tmp_path, ModelError, "the_node" if op != "Resize" else "again")


def test_an_input_of_impossible_size(tmp_path: Path) -> None:
    model = made([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 2**31, 2**31)}, ["y"])
    _refused(model, tmp_path, ModelError, "'x'", "example=")


# ---- external data ----------------------------------------------------------------------------------------


def _external(
    folder: Path, location: str, offset: int = 0, length: int | None = None, name: str = "w"
) -> onnx.ModelProto:
    model = _product()
    tensor = _tensor(model, "w")
    tensor.name = name
    model.graph.node[0].input[1] = name
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)} | (
        {} if length is None else {"length": str(length)}
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def test_external_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"12345678" + _floats(6, 5).tobytes())
    gm = read_file(saved(_external(tmp_path, "weights.bin", 8, 120), tmp_path))
    x = torch.randn(3, 6)
    torch.testing.assert_close(gm(x).detach(), x @ torch.from_numpy(_floats(6, 5)))


def test_many_external_weights_stay_in_their_file(tmp_path: Path) -> None:
    table = np.zeros((2**18, 32), np.float32)
    table[7] = 1
    table.tofile(tmp_path / "weights.bin")
    model = made([helper.make_node("Gather", ["words", "i"], ["y"])], {"i": ("N", 3)}, ["y"],
                 {"words": _floats(1)}, types={"i": "int64"})  # fmt: skip
    tensor = _tensor(model, "words")
    tensor.CopyFrom(_tensor(_external(tmp_path, "weights.bin", name="words"), "words"))
    tensor.dims[:] = table.shape
    gm = read_file(saved(model, tmp_path))
    assert gm(torch.tensor([[7, 0, 7]])).sum() == 64
    weight = next(m for m in gm.modules() if isinstance(m, torch.nn.Embedding)).weight
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("where memory comes from is told by Linux only")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if "weights.bin" in line]
    assert any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in ranges)


def test_all_missing_files_are_listed(tmp_path: Path) -> None:
    model = _external(tmp_path, "one.bin")
    model.graph.initializer.append(_tensor(_external(tmp_path, "two.bin", name="v"), "v"))
    _refused(model, tmp_path, ArtifactError, "2 other files", "one.bin", "two.bin", str(tmp_path))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "a/../../secret.bin", "C:\\secret.bin",
                                      "..\\secret.bin", "", "\\\\host\\share"])  # fmt: skip
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    folder = tmp_path / "models"
    folder.mkdir()
    _refused(_external(folder, location), folder, ArtifactError, "'w'", "refused")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    _refused(_external(folder, "weights.bin"), folder, ArtifactError, "link", "refused")
    (folder / "inside.bin").write_bytes(_floats(6, 5).tobytes())
    (folder / "linked.bin").symlink_to(folder / "inside.bin")
    (folder / "model.onnx").write_bytes(_external(folder, "inside.bin").SerializeToString())
    read_file(folder / "model.onnx")


@pytest.mark.parametrize(
    ("offset", "length"), [(900, 120), (0, 1000), (-8, 120), (2**62, 120), (0, 119), (881, None)]
)
def test_external_data_beyond_the_file_is_refused(offset: int, length: int | None, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    _refused(
        _external(tmp_path, "weights.bin", offset, length), tmp_path, ArtifactError, "'w'", "weights.bin"
    )


def test_external_data_in_a_folder_or_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").mkdir()
    _refused(_external(tmp_path, "weights.bin"), tmp_path, ArtifactError, "not an ordinary file")


# ---- examples ---------------------------------------------------------------------------------------------


def test_examples_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(_network(), tmp_path)
    for example in (torch.randn(2, 3, 9, 8), torch.randn(3, 8, 8), (torch.randn(2, 3, 8, 8),) * 2, "picture"):
        with pytest.raises(ModelError, match=r"example.*\[N, 3, 8, 8\]"):
            read_file(path, example)
    assert read_file(path, np.zeros((2, 3, 8, 8), np.float32)).meta["example"][0].shape == (2, 3, 8, 8)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = _network()
    weights = _floats(5, 16)
    weights[2, 3] = np.nan
    _tensor(model, "fc.weight").CopyFrom(numpy_helper.from_array(weights, "fc.weight"))
    _refused(model, tmp_path, ModelError, "fc.weight", "nan")


# ---- fuzzing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(6))
def test_flipped_bits_give_a_clear_error_or_a_model_that_proves_itself(part: int, tmp_path: Path) -> None:
    content = _network().SerializeToString()
    path = tmp_path / "model.onnx"
    read = 0
    for seed in range(50 * part, 50 * part + 50):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(len(damaged))
            damaged[at] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            damaged = damaged[: rng.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            read_file(path)
            read += 1
        except FewbitError as error:
            assert str(error)
    assert read < 45
