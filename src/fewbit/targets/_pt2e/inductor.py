"""torch's compiler with frozen weights: where a Q/DQ module becomes oneDNN's integer kernels and fused loops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fewbit.errors import TargetError
from fewbit.model.program import Op, Program
from fewbit.model.torch_export import first_line
from fewbit.targets import Kernel
from fewbit.targets._pt2e.export import exported, quiet
from fewbit.targets._pt2e.module import QdqModule

Compiled = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of the compiled graph, and whether oneDNN multiplies integers in it."""

    kind: str
    integer: bool


class _Seen(Exception):
    """The graph is known; it need not be compiled to the end."""


def compiled(module: QdqModule, inputs: tuple[Tensor, ...]) -> Compiled:
    """The module compiled for inputs of these sizes: with free sizes, torch 2.13's integer convolutions fail."""
    try:
        function = _compile(module, inputs, {})
    except Exception as error:
        raise TargetError(
            f"torch's compiler failed on the quantized model ({first_line(error)}); it needs a C++ compiler such as g++"
        ) from error

    def answer(*given: Tensor) -> list[Tensor]:
        with one_thread():
            return list(function(*given))

    return answer


def products(module: QdqModule, inputs: tuple[Tensor, ...]) -> list[Product]:
    """The products in the compiler's own graph, after all that it fuses of Q/DQ form is fused."""
    found: list[Product] = []

    def look(graph: Graph) -> None:
        found.extend(_products(graph))
        raise _Seen

    try:
        _compile(module, inputs, {"post_grad_custom_pre_pass": look})
    except Exception as error:
        if not _caused_by_seeing(error):
            raise TargetError(
                f"torch's compiler failed on the quantized model ({first_line(error)})"
            ) from error
    return found


def _caused_by_seeing(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _Seen):
        error = error.__cause__ or error.__context__
    return error is not None


def _compile(module: QdqModule, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    graph = exported(module, inputs, [tuple(x.shape) for x in inputs]).module(check_guards=False)
    inductor: Any = import_module("torch._inductor")
    with quiet(), one_thread():
        return inductor.compile(graph, inputs, options={"freezing": True} | options)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's own loops and oneDNN, no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _products(graph: Graph) -> Iterator[Product]:
    for node in graph.nodes:
        kind = _PRODUCTS.get(str(node.target).rpartition(".")[0]) if node.op == "call_function" else None
        if kind is not None:
            yield Product(kind, str(node.target).startswith("onednn.q"))


_PRODUCTS = {
    "onednn.qconv_pointwise": "conv",
    "onednn.qconv2d_pointwise": "conv",
    "aten.convolution": "conv",
    "mkldnn._convolution_pointwise": "conv",
    "onednn.qlinear_pointwise": "linear",
    "mkldnn._linear_pointwise": "linear",
    "mkl._mkl_linear": "linear",
    "aten.addmm": "linear",
    "aten.mm": "linear",
    "aten.bmm": "matmul",
    "aten.baddbmm": "matmul",
}


_LOOP = "in a fused loop: 8-bit codes in memory, float arithmetic in registers"
_FLOAT_PRODUCT = "a float product between 8-bit codes: oneDNN's integer one needs a constant weight here"
_NO_DYNAMIC = "a float convolution: torch's compiler quantizes inputs at run time for linear layers only"
_NOT_FUSED = "torch's compiler left it in float"
_FLOAT_LAYERS = ("Conv", "Linear", "LSTM", "GRU")


def kernels(program: Program, products: list[Product]) -> list[Kernel]:
    """Which operations became oneDNN's integer kernels. Products come in the program's own order."""
    integer = _flags(program, products, "conv") | _flags(program, products, "linear")
    found = []
    for op in program.ops:
        kind = op.attrs["type"] if op.kind == "module" else op.kind
        if op.output in integer and op.kind != "module":
            done = integer[op.output]
            cause = _NO_DYNAMIC if kind == "dynamic_conv" else _NOT_FUSED
            found.append(Kernel(op.layer, kind, done, "" if done else cause))
        elif op.kind == "module" and kind.startswith(_FLOAT_LAYERS):
            found.append(Kernel(op.layer, kind, False, op.note or "planned as float", planned=False))
        elif op.domain == "integer":
            cause = _FLOAT_PRODUCT if op.kind == "matmul" else _LOOP
            found.append(Kernel(op.layer, kind, False, cause, planned=False))
    return found


def _flags(program: Program, products: list[Product], kind: str) -> dict[str, bool]:
    """For each operation of a kind, by its output, whether it became an integer kernel."""
    ops = [op for op in program.ops if _product_kind(op) == kind]
    flags = [p.integer for p in products if p.kind == kind]
    if len(ops) != len(flags):  # float operations made products of their own: only the number is known
        ops = [op for op in ops if op.kind != "module"]
        flags = [i < sum(flags) for i in range(len(ops))]
    return {op.output: flag for op, flag in zip(ops, flags, strict=True)}


def _product_kind(op: Op) -> str:
    kind = str(op.attrs["type"]) if op.kind == "module" else op.kind.removeprefix("dynamic_")
    return "conv" if kind.startswith("Conv") else kind.lower()
