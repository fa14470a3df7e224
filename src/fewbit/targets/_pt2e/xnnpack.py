"""ExecuTorch's lowering of a program: exported, given to XNNPACK as far as it takes it, serialized."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.extras import require
from fewbit.model.program import Program
from fewbit.model.torch_export import first_line
from fewbit.targets._pt2e.export import Shapes, exported, mute, quiet, sample
from fewbit.targets._pt2e.module import QdqModule
from fewbit.targets._pt2e.styles import XNNPACK

LARGEST_BATCH = 64  # memory for inputs and outputs is planned for that many samples


def package(name: str) -> Any:
    """A module of ExecuTorch. Raises ``MissingExtraError`` where it is not installed."""
    with mute():
        return require(f"executorch.{name}", "executorch", "writing and running ExecuTorch files")


class Lowering:
    """A program on its way into a file: for any number of samples up to a limit, or for one where that fails.

    ``independent``: whether the samples of a batch are computed each for itself, as far as one batch shows.
    """

    def __init__(self, program: Program, shapes: Shapes, codes: Sequence[str] = ()) -> None:
        module = QdqModule(program, XNNPACK, codes)
        inputs = sample(program, shapes, module)
        self.independent = _independent(module, inputs, shapes)
        try:
            self._edge = _lower(module, inputs, shapes)
        except TargetError:
            one = [(1, *shape[1:]) if shape and shape[0] is None else shape for shape in shapes]
            if one == shapes:
                raise
            single = tuple(x[: shape[0]] if shape else x for x, shape in zip(inputs, one, strict=True))
            self._edge = _lower(module, single, one)

    def constants(self) -> list[bytes]:
        """The tensors that XNNPACK's parts keep."""
        parts = [
            getattr(m, "named_data_store_output", None)
            for m in self._edge.exported_program().graph_module.modules()
        ]
        return [bytes(buffer) for part in parts if part is not None for buffer in part.buffers]

    def data(self, methods: dict[str, str] | None = None) -> bytes:
        """The file's bytes, once; ``methods``: more methods of the file, and the text that each returns."""
        exir = package("exir")
        unchecked = exir.EdgeCompileConfig(
            _check_ir_validity=False
        )  # it was checked before XNNPACK's parts were in
        with quiet():
            edge = exir.EdgeProgramManager(self._edge.exported_program(), methods, unchecked)
            return bytes(edge.to_executorch().buffer)


def _independent(module: QdqModule, inputs: tuple[Tensor, ...], shapes: Shapes) -> bool:
    if any(not shape or shape[0] is not None for shape in shapes):
        return False
    with torch.no_grad():
        together, alone = module(*inputs), module(*(x[:1] for x in inputs))
    return all(
        a.shape[:1] == (1,)
        and t.shape[:1] == inputs[0].shape[:1]
        and torch.allclose(t[:1], a, rtol=1e-3, atol=1e-5)
        for t, a in zip(together, alone, strict=True)
    )


def _lower(module: QdqModule, inputs: tuple[Tensor, ...], shapes: Shapes) -> Any:
    exir, partitioner = package("exir"), package("backends.xnnpack.partition.xnnpack_partitioner")
    graph = exported(module, inputs, shapes, LARGEST_BATCH)
    try:
        with quiet(), torch.no_grad():
            return exir.to_edge_transform_and_lower(graph, partitioner=[partitioner.XnnpackPartitioner()])
    except Exception as error:
        raise TargetError(f"ExecuTorch cannot lower the quantized model ({first_line(error)})") from error
