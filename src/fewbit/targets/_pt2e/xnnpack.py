"""ExecuTorch's lowering of a program: exported, given to XNNPACK as far as it takes it, serialized."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fewbit.errors import TargetError
from fewbit.extras import require
from fewbit.model.program import Program
from fewbit.model.torch_export import first_line
from fewbit.targets._pt2e.export import Shapes, exported, mute, quiet, sample
from fewbit.targets._pt2e.module import QdqModule
from fewbit.targets._pt2e.styles import XNNPACK

LARGEST_BATCH = 64  # memory for inputs and outputs is planned for that many samples

Methods = Callable[[list[Tensor | bytes], bool], dict[str, str]]
"""More methods of a file and the text each returns, given the constants that the file keeps, and whether the samples
of a batch are computed each for itself."""


def package(name: str) -> Any:
    """A module of ExecuTorch. Raises ``MissingExtraError`` where it is not installed."""
    with mute():
        return require(f"executorch.{name}", "executorch", "writing and running ExecuTorch files")


def lowered(program: Program, shapes: Shapes, methods: Methods, codes: Sequence[str] = ()) -> bytes:
    """The program as a file's bytes: for any number of samples up to a limit, or for a fixed one where that fails.

    That is one sample if a batch can be run in pieces, else as many as the example has. Raises ``TargetError`` with
    ExecuTorch's own reason where neither works.
    """
    module = QdqModule(program, XNNPACK, codes)
    inputs = sample(program, shapes, module)
    independent = _independent(module, inputs, shapes)
    try:
        return _lower(module, inputs, shapes, lambda constants: methods(constants, independent))
    except TargetError:
        if not any(shape and shape[0] is None for shape in shapes):
            raise
        count = 1 if independent or not program.example_shapes else program.example_shapes[0][0]
        fixed = [(count, *shape[1:]) if shape and shape[0] is None else shape for shape in shapes]
        few = sample(program, fixed, module)
        return _lower(module, few, fixed, lambda constants: methods(constants, independent))


def _independent(module: QdqModule, inputs: tuple[Tensor, ...], shapes: Shapes) -> bool:
    """Whether the samples of a batch are computed each for itself, as far as one batch shows."""
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


def _lower(
    module: QdqModule, inputs: tuple[Tensor, ...], shapes: Shapes,
    methods: Callable[[list[Tensor | bytes]], dict[str, str]],
) -> bytes:  # fmt: skip
    exir, partitioner = package("exir"), package("backends.xnnpack.partition.xnnpack_partitioner")
    graph = exported(module, inputs, shapes, LARGEST_BATCH)
    unchecked = exir.EdgeCompileConfig(
        _check_ir_validity=False
    )  # it was checked before XNNPACK's parts were in it
    try:
        with quiet(), torch.no_grad():
            edge = exir.to_edge_transform_and_lower(graph, partitioner=[partitioner.XnnpackPartitioner()])
            program = edge.exported_program()
            if not _left_free(program, shapes):
                raise RuntimeError("it fixed the number of samples")
            found = methods(_constants(program))
            return bytes(exir.EdgeProgramManager(program, found, unchecked).to_executorch().buffer)
    except Exception as error:
        raise TargetError(
            f"ExecuTorch cannot lower the quantized model ({first_line(error)}); fix its input sizes by exporting with "
            "an example, or keep the layer in question float"
        ) from error


def _left_free(graph: ExportedProgram, shapes: Shapes) -> bool:
    """Whether the number of samples is free where it should be: some operators fix it without a word."""
    nodes = [n for n in graph.graph.nodes if n.name in graph.graph_signature.user_inputs]
    sizes = [n.meta["val"].shape[0] for n, s in zip(nodes, shapes, strict=True) if s and s[0] is None]
    return all(not isinstance(size, int) and size.node.maybe_as_int() is None for size in sizes)


def _constants(program: Any) -> list[Tensor | bytes]:
    """The tensors that a file will keep: those in XNNPACK's parts and those of ExecuTorch's own operators."""
    parts = [getattr(m, "named_data_store_output", None) for m in program.graph_module.modules()]
    kept = [bytes(buffer) for part in parts if part is not None for buffer in part.buffers]
    signature = program.graph_signature
    names = [*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()]
    return [*kept, *(program.state_dict[name] for name in names if name in program.state_dict)]
