"""The real path of a float model into ONNX Runtime: read, lower, write, check, run, compare."""

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.readers.torch import read
from fewbit.model.simulate import QuantizedModel
from fewbit.plan.plan import Plan
from fewbit.targets._onnx.runtime import session
from fewbit.targets._onnx.writer import Writer


def program(module: nn.Module, *inputs: Tensor, batch_only: bool = False) -> Program:
    """The program of a float model; ``batch_only`` fixes every size but the first of each input."""
    free = tuple({0: torch.export.Dim.AUTO} for _ in inputs) if batch_only else None
    gm = read(module.eval(), inputs, dynamic_shapes=free)
    return lower(QuantizedModel(gm, Plan(()), {}, frozenset(), inputs))


def written(program: Program) -> onnx.ModelProto:
    model = Writer(program).model({})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, *inputs: Tensor) -> list[np.ndarray]:
    s = session(model.SerializeToString(), 1)
    return list(s.run(None, {i.name: x.numpy() for i, x in zip(s.get_inputs(), inputs, strict=True)}))


def longer(x: Tensor) -> Tensor:
    """The same samples, backwards, and three more: another batch size, other numbers."""
    return torch.cat([x.flip(0), x[:1], x[-1:], x[:1]])


def check(
    module: nn.Module, *inputs: Tensor, rtol: float = 1e-5, atol: float = 2e-6, batch_only: bool = False
) -> onnx.ModelProto:
    """ONNX Runtime must answer as torch does, for the example and for another batch size."""
    model = written(program(module, *inputs, batch_only=batch_only))
    for given in (inputs, tuple(longer(x) for x in inputs)):
        with torch.no_grad():
            expected = [t for t in pytree.tree_leaves(module(*given)) if isinstance(t, Tensor)]
        found = run(model, *given)
        assert len(found) == len(expected)
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert f.shape == tuple(e.shape), f"output {i}: shape {f.shape}, torch has {tuple(e.shape)}"
            assert str(f.dtype) == str(e.dtype).removeprefix("torch."), (
                f"output {i}: {f.dtype}, torch has {e.dtype}"
            )
            np.testing.assert_allclose(f, e.numpy(), rtol=rtol, atol=atol, err_msg=f"output {i}")
    return model
