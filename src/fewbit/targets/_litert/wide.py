"""16-bit activations in this runtime: what its kernels cannot do with them is refused before a file is written."""

from fewbit.errors import TargetError
from fewbit.model.kernels_16x8 import ADD_SHIFT, LARGEST_RESULT, wide
from fewbit.model.program import Coding, Op


def check_width(op: Op, codings: dict[str, Coding]) -> None:
    """Raise ``TargetError`` where an operation mixes 8 and 16 bits, or its numbers could leave 32 bits on the way."""
    out = codings.get(op.output)
    if op.domain != "integer" or out is None:
        return
    given = [codings[name] for name in op.inputs if name in codings]
    if any(wide(c) != wide(out) for c in given):
        raise TargetError(
            f"{op.layer or op.node}: reads {given[0].scheme.format} and gives {out.scheme.format}, which no kernel of "
            "LiteRT does: give both the same activations, or keep the layer float"
        )
    if wide(out) and op.kind in ("conv", "linear"):
        _check_sums(op, given[0], out)
    if wide(out) and op.kind == "add" and max(c.scale for c in given) * 2 >= out.scale * 2**ADD_SHIFT:
        raise TargetError(
            f"{op.layer or op.node}: its sum is too small beside what is added for LiteRT: keep it float"
        )


def _check_sums(op: Op, x: Coding, out: Coding) -> None:
    weight, bias = op.constants["weight"], op.constants.get("bias")
    sums = weight.double().abs().flatten(1).sum(1) * -x.scheme.qmin
    if bias is not None:
        sums = sums + bias.double().abs()
    results = sums * x.scale * op.constants["weight_scale"].double() / out.scale
    if bool((results > LARGEST_RESULT).any()):
        raise TargetError(
            f"{op.layer or op.node}: its result can reach {float(results.max()):.3g} units of its own scale, over 32 "
            "bits: keep the layer float"
        )
