"""The real path of a float model into LiteRT: read, lower, prepare, write, run with both kinds of kernels, compare."""

import importlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.readers.torch import read
from fewbit.model.reference import Reference
from fewbit.model.simulate import QuantizedModel
from fewbit.plan.plan import Plan
from fewbit.targets._litert.prepare import prepare
from fewbit.targets._litert.reader import read_back
from fewbit.targets._litert.runtime import Session
from fewbit.targets._litert.writer import Writer


def lowered(module: nn.Module, *inputs: Tensor) -> Program:
    """The program of a float model; every size but the first of each input is fixed."""
    free = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    return lower(
        QuantizedModel(read(module.eval(), inputs, dynamic_shapes=free), Plan(()), {}, frozenset(), inputs)
    )


def file(program: Program) -> bytes:
    return Writer(program).file({})


def answers(content: bytes, *inputs: Tensor, reference: bool = False) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        return Session(path, reference)(*inputs)


def longer(x: Tensor) -> Tensor:
    """The same samples, backwards, and one more: another batch size, other numbers."""
    return torch.cat([x.flip(0), x[:1]])


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the largest expected magnitude."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, torch has {tuple(expected.shape)}"
    finite = torch.isfinite(expected.double())
    assert torch.equal(found[~finite], expected[~finite].to(found.dtype)) or bool(
        torch.isnan(expected[~finite]).all()
    )
    if not bool(finite.any()):
        return 0.0
    difference = (found.double() - expected.double())[finite].abs().max()
    return float(difference / expected.double()[finite].abs().max().clamp_min(1e-6))


def check(module: nn.Module, *inputs: Tensor, tolerance: float = 1e-4) -> tuple[Program, bytes]:
    """LiteRT must answer as torch does, with its reference kernels and its own, for two batch sizes."""
    program = lowered(module, *inputs)
    prepared = prepare(program)
    content = file(prepared)
    for given in (inputs, tuple(longer(x) for x in inputs)):
        with torch.no_grad():
            expected = [t for t in pytree.tree_leaves(module(*given)) if isinstance(t, Tensor)]
        if prepared.input_shapes[0][0] is None:
            results = [pytree.tree_leaves(Reference(prepared)(*given))]
        else:
            results = []
        results += [answers(content, *given, reference=r) for r in (False, True)]
        for kind, result in zip(
            ("reference", "own kernels", "reference kernels")[-len(results) :], results, strict=True
        ):
            assert len(result) == len(expected)
            for i, (f, e) in enumerate(zip(result, expected, strict=True)):
                wrong = error(f, e)
                assert wrong <= tolerance, f"{kind}, output {i}: off by {wrong:.2g}"
    _read_back(prepared, content, inputs)
    return prepared, content


def _read_back(prepared: Program, content: bytes, inputs: tuple[Tensor, ...]) -> None:
    """What the file's operators say, read without the program, computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        described = read_back(path)
    assert described.program is not None, described.properties["unread"]
    given = inputs if prepared.input_shapes[0][0] is None else [x[:1] for x in inputs]
    found, expected = (pytree.tree_leaves(Reference(p)(*given)) for p in (described.program, prepared))
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        wrong = error(f, e.to(f.dtype))
        assert wrong <= 1e-5, f"read back, output {i}: off by {wrong:.2g}"


def kinds(content: bytes) -> list[str]:
    """The operators of a file, in order."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    return [names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators]
