"""Compares what was read with what ONNX Runtime computes from the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fewbit.errors import ArtifactError, ModelError
from fewbit.model.onnx_file import opset
from fewbit.model.onnx_graph import Graph
from fewbit.model.torch_proof import TOLERANCE, difference

NEWEST_OPSET, NEWEST_IR = 26, 13  # that ONNX Runtime 1.31 takes


class Source:
    """The file, run by ONNX Runtime without graph optimizations."""

    def __init__(self, model: Any, graph: Graph, path: Path, changed: bool = False) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.path, self.graph = path, graph
        content: Any = str(path)
        if (older := _for_runtime(model)) is not model or changed:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.absolute().parent)
            )
            content = older.SerializeToString()
        try:
            self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types have no common importable base
            raise ArtifactError(
                f"{path}: ONNX Runtime cannot load it ({_line(error)}); export it again"
            ) from error

    def run(self, example: tuple[Tensor, ...]) -> list[Tensor]:
        """The outputs on the example, floats in float32."""
        feeds = {i.name: _fed(t, i.dtype) for i, t in zip(self.graph.inputs, example, strict=True)}
        try:
            results = self.session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in example)
            raise ModelError(
                f"{self.path}: ONNX Runtime cannot run it on inputs of shape {shapes} ({_line(error)}): expected the "
                "file's own inputs; give one that fits with example="
            ) from error
        return [_read(r) for r in results]


def _for_runtime(model: Any) -> Any:
    """The model under the newest versions that ONNX Runtime takes, if its operators were the same in those."""
    import onnx

    if model.ir_version <= NEWEST_IR and opset(model) <= NEWEST_OPSET:
        return model
    new = [
        n.op_type
        for n in model.graph.node
        if n.domain in ("", "ai.onnx")
        and onnx.defs.has(n.op_type)
        and onnx.defs.get_schema(n.op_type, max_inclusive_version=opset(model)).since_version > NEWEST_OPSET
    ]
    if new:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, NEWEST_IR)
    for imported in copy.opset_import:
        if imported.domain in ("", "ai.onnx"):
            imported.version = min(imported.version, NEWEST_OPSET)
    return copy


def _fed(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    return tensor.numpy().astype(dtype, copy=False)


def _read(array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise ModelError("the file's output is no tensor: expected tensors only")
    wide = array.astype(np.float32) if array.dtype.kind == "f" else array
    return torch.from_numpy(np.array(wide, order="C"))


def _line(error: BaseException) -> str:
    text = str(error).replace("[ONNXRuntimeError] : ", "")
    return text.splitlines()[0][-200:] if text else type(error).__name__


def outputs(module: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    """All outputs of a module, flat."""
    with torch.no_grad():
        return list(tree_leaves(module(*example)))


def prove(gm: fx.GraphModule, source: Source, example: tuple[Tensor, ...], what: str = "the example") -> None:
    """ModelError unless the graph computes what the file does on the example; see `compare`."""
    compare(gm, source.run(example), example, source, what)


def compare(
    gm: fx.GraphModule, expected: list[Tensor], example: tuple[Tensor, ...], source: Source, what: str
) -> None:
    """ModelError unless the graph gives these outputs, up to 1e-5 of the largest.

    Where large numbers cancel, float32 itself is no better than that. The graph in float64 tells how far rounding moves
    the graph's outputs; a difference of a few times as much, and of at most 1e-3, is rounding too.
    """
    worst, name = 0.0, ""
    actual = outputs(gm, example)
    for e, a, output in zip(expected, actual, source.graph.outputs, strict=True):
        off = difference(e, a)
        if off > worst:
            worst, name = off, output
    if worst <= TOLERANCE:
        return
    rounding = _rounding(gm, example, actual)
    if worst > min(4 * rounding, 1e-3):
        raise ModelError(
            f"{source.path}: what was read differs from ONNX Runtime's result on {what} by {worst:.1e} at output "
            f"{name!r:.80} (relative; expected at most {TOLERANCE:.0e}): the two understand an operator differently; "
            "please report it, and export the model another way"
        )
    note = "large numbers cancel in its outputs, and rounding to float32 moves them by more than 1e-5"
    if note not in gm.meta["notes"]:
        gm.meta["notes"].append(note)


def _rounding(gm: fx.GraphModule, example: tuple[Tensor, ...], actual: list[Tensor]) -> float:
    """How far the outputs are from those in float64; 0 where the graph cannot be run in that."""
    try:
        wide = tuple(t.double() if t.is_floating_point() else t for t in example)
        exact = outputs(copy.deepcopy(gm).double(), wide)
        return max(difference(e.to(a.dtype), a) for e, a in zip(exact, actual, strict=True))
    except Exception:
        return 0.0  # an operator that says float32 itself
