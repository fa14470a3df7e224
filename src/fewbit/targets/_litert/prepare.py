"""From the integer program to the one that a ``.tflite`` file holds: int8 codes, LiteRT's operations, channels last."""

import dataclasses

from fewbit.model.program import Op, Program
from fewbit.model.signed import signed
from fewbit.targets._litert.codes import legalize
from fewbit.targets._litert.floats import expanded
from fewbit.targets._litert.layout import FixedBatch, Layout
from fewbit.targets._litert.moves import MOVES
from fewbit.targets._litert.rules import RULES
from fewbit.targets._litert.rules_floats import FLOAT_RULES
from fewbit.targets._litert.shapes import sizes

ALL_RULES = RULES | MOVES | FLOAT_RULES


def prepare(program: Program) -> Program:
    """Each operation of the result is one operator of the file (a float layer may be several), each value a tensor.

    Where an operation cannot follow the batch in this runtime, the file takes one sample at a time:
    ``input_shapes`` then say so. Raises ``TargetError`` that lists what LiteRT cannot do.
    """
    legal = legalize(signed(_padding_joined(program)))
    try:
        return _laid_out(legal, free_batch=True)
    except FixedBatch:
        return _laid_out(legal, free_batch=False)


def _laid_out(program: Program, free_batch: bool) -> Program:
    own = dataclasses.replace(program, ops=[dataclasses.replace(op) for op in program.ops])
    own = expanded(own, sizes(own, free_batch), free_batch, ALL_RULES)
    found = sizes(own, free_batch)
    layout = Layout(own, found, ALL_RULES)
    result = layout.run()
    shapes = [layout.stored[name] for name in result.inputs]
    outputs = [layout.stored[name] for name in result.output_names()]
    return dataclasses.replace(result, input_shapes=shapes, output_shapes=outputs, example_shapes=[])


def _padding_joined(program: Program) -> Program:
    """Zeros added in front of one convolution become that convolution's own padding."""
    users: dict[str, list[Op]] = {}
    for op in program.ops:
        for name in op.inputs:
            users.setdefault(name, []).append(op)
    joined: dict[str, Op] = {}
    ops = []
    for op in program.ops:
        readers = users.get(op.output, [])
        if (
            op.kind == "pad"
            and op.domain == "integer"
            and op.output not in program.output_names()
            and _zeros_for_one(op, readers)
        ):
            joined[op.output] = op
            continue
        pad = joined.get(op.inputs[0]) if op.inputs else None
        if pad is not None:
            own = list(op.attrs["pad"]) or [0] * len(pad.attrs["pad"][:-4])
            spatial = [a + b for a, b in zip(own, pad.attrs["pad"], strict=False)]
            op = dataclasses.replace(op, inputs=[pad.inputs[0]], attrs=op.attrs | {"pad": spatial})
        ops.append(op)
    return dataclasses.replace(program, ops=ops)


def _zeros_for_one(op: Op, readers: list[Op]) -> bool:
    """Whether a padding adds zeros around images only, and one convolution alone reads it."""
    pad = op.attrs["pad"]
    return len(readers) == 1 and readers[0].kind == "conv" and not any(pad[-4:]) and min(pad) >= 0
