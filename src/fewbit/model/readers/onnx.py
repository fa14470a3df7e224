"""Reads `.onnx` files into the standard form, and proves that it computes what ONNX Runtime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, fx

from fewbit.errors import ArtifactError, FewbitError, ModelError
from fewbit.model import onnx_example
from fewbit.model.onnx_build import Network
from fewbit.model.onnx_convert import check_operators, network
from fewbit.model.onnx_file import open_model, opset
from fewbit.model.onnx_graph import Graph, graph_of
from fewbit.model.onnx_precision import float32_twin, other_floats
from fewbit.model.onnx_proof import Source, outputs
from fewbit.model.onnx_quantized import float_twin, is_quantized
from fewbit.model.onnx_standard import standard
from fewbit.model.torch_export import first_line

SUFFIXES = (".onnx",)


def read_file(path: Path, example: Any = None) -> fx.GraphModule:
    """The standard form of an ONNX model: `nn` layers under the names of its weights or nodes, `aten` operators
    between.

    `example` is a tensor or a tuple of tensors, one for each input of the file; without one it is made up from the
    declared shapes (4 for a free batch size, 16 for other free sizes). It is kept in `gm.meta["example"]`;
    `gm.meta["source"]` says in one line what was read.

    Raises ArtifactError for a file that is damaged or whose external data is missing or elsewhere, and ModelError for
    operators that cannot be read, all of them at once, or when the graph does not compute what ONNX Runtime does.
    """
    path = Path(path)
    try:
        return _read(path, example)
    except FewbitError:
        raise
    except Exception as error:  # a hostile file can make anything raise anything
        raise ArtifactError(
            f"{path}: damaged or hostile ({type(error).__name__}: {first_line(error)[:200]}); export it again"
        ) from error


def _read(path: Path, example: Any) -> fx.GraphModule:
    model = open_model(path)
    graph = original = graph_of(model, path)
    check_operators(graph)
    twin, record = float_twin(model, path) if is_quantized(model) else (model, {})
    twin = float32_twin(twin) if other_floats(twin) else twin
    if twin is not model:
        graph = graph_of(twin, path)
    inputs, module = _built(graph, example)
    gm = standard(module, graph, Source(twin, graph, path, changed=twin is not model), inputs)
    if record:
        gm.meta["notes"] += _rounding_left_out(gm, Source(model, original, path), inputs)
    gm.meta["quantization"] = record
    gm.meta["example"] = inputs
    gm.meta["source"] = f"ONNX file {path.name}, opset {opset(model)}"
    return gm


def _rounding_left_out(gm: fx.GraphModule, source: Source, inputs: tuple[Tensor, ...]) -> list[str]:
    """How far the float graph is from the quantized file, as a note."""
    pairs = [
        (e.float(), a.float())
        for e, a in zip(source.run(inputs), outputs(gm, inputs), strict=True)
        if e.shape == a.shape
    ]
    size = sum(float(e.square().sum()) for e, _ in pairs)
    error = sum(float((e - a).square().sum()) for e, a in pairs)
    share = (error / size) ** 0.5 if size else 0.0
    return [
        "the file is quantized: weights are what its codes stand for, the rounding of activations is left out "
        f"(its outputs differ by {share:.2%} on the example)"
    ]


def _built(graph: Graph, example: Any) -> tuple[tuple[Tensor, ...], Network]:
    """The module and an example that it runs on."""
    if example is not None:
        inputs = onnx_example.given(graph, example)
        return inputs, network(graph, inputs)
    free = any(not isinstance(size, int) for i in graph.inputs for size in i.shape[1:])
    failed: ModelError | None = None
    for size in onnx_example.FREE if free else onnx_example.FREE[:1]:
        inputs = onnx_example.draw(graph, size)
        try:
            return inputs, network(graph, inputs)
        except ModelError as error:
            failed = failed or error
    assert failed is not None
    if not free:
        raise failed
    raise ModelError(
        f"{failed} (with made-up inputs; if their sizes are wrong, give some with example=)"
    ) from failed
