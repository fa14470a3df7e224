"""GPTQ rounding: the layer's output error, not the weight's, is kept small by second moments of its inputs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with the order of falling second moments ("act-order") and scales that stay as they were
observed, so that groups may have any size.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.clustering import cluster, nearest_value
from fewbit.numerics.codebooks import fit_codebook
from fewbit.numerics.format import Format
from fewbit.numerics.gptq import Nearest, factor, losses, round_inputs
from fewbit.numerics.qtensor import QTensor, encode
from fewbit.numerics.scheme import Scheme, blocks, unblocks

STATISTICS: frozenset[str] = frozenset({"hessian"})


def accepts(spec: Format) -> bool:
    """All formats: the values of those that are learned are found by k-means first."""
    return True


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes that minimise tr(E H E^T), E the error of the weight, row by row never worse than the nearest codes.

    Args:
        weight: [outputs, ...]; the other dimensions, flattened, are the inputs that the Hessian is of.
        scheme, lo, hi: the scheme and the range of each of its blocks; values outside saturate.
        statistics: "hessian", float32 or float64 [inputs, inputs], or [groups, inputs, inputs] for a grouped
            convolution, whose outputs come group by group. It may be singular; the arithmetic has its dtype.

    Raises:
        CalibrationError: a Hessian of another shape, or with numbers that are not finite.
    """
    plain = _nearest(weight, scheme, lo, hi)
    hessian: Tensor = statistics["hessian"]
    hessian = hessian if hessian.dim() == 3 else hessian.unsqueeze(0)
    groups, inputs = hessian.shape[:2]
    if hessian.shape[2] != inputs or len(weight) % groups or weight.numel() != len(weight) * inputs:
        raise CalibrationError(
            f"a Hessian of shape {tuple(hessian.shape)} does not belong to a weight of shape {tuple(weight.shape)}"
        )

    size = len(weight) // groups
    found = []
    for group, moments in enumerate(hessian):
        rows = slice(group * size, (group + 1) * size)
        parts = (weight.detach()[rows], plain.dequantize()[rows] if groups > 1 else plain.dequantize())
        factored = factor(moments)
        ordered, simple = (
            x.reshape(size, inputs).to(moments.dtype).T.contiguous().index_select(0, factored.order)
            for x in parts
        )
        nearest = _quantizer(plain, rows, inputs, factored.order.tolist(), moments.dtype)
        nearest = _keeping(ordered == 0, nearest)
        rounded, loss = round_inputs(ordered, factored, nearest)
        worse = loss > losses(ordered - simple, factored, loss)
        rounded[:, worse] = simple[:, worse]
        found.append(rounded.index_select(0, factored.order.argsort()).T)
    values = torch.cat(found).reshape(weight.shape).to(torch.float32)
    return replace(plain, codes=_codes(values, plain))


def _nearest(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor) -> QTensor:
    """The nearest codes; where the format is learned, of the values that k-means finds."""
    learned = scheme.spec.learned
    return fit_codebook(weight, scheme, cluster) if learned else QTensor.quantize(weight, scheme, lo, hi)


def _codes(values: Tensor, plain: QTensor) -> Tensor:
    """The codes of values that are representable."""
    if plain.codebook is None:
        return encode(values, plain.scale, plain.zero_point, plain.scheme)
    rows = blocks(values, plain.scheme) / plain.scale.reshape(-1, 1)
    codes = nearest_value(rows, plain.codebook)
    return unblocks(codes, plain.shape, plain.scheme).to(plain.scheme.spec.code_dtype)


def _quantizer(plain: QTensor, rows: slice, inputs: int, order: list[int], dtype: torch.dtype) -> Nearest:
    """The nearest values of the weights of some outputs, one input after another, in the order of rounding."""
    scheme = plain.scheme
    block, place = _blocks_by_input(plain, rows, inputs)
    index = [place[i] for i in order]
    scale, zero_point = plain.scale.to(dtype)[block], plain.zero_point.to(dtype)[block]
    if plain.codebook is not None:
        return _codebook(scale, plain.codebook, block, index)
    return (_integer if scheme.spec.integer else _table)(scale, zero_point, index, scheme)


def _blocks_by_input(plain: QTensor, rows: slice, inputs: int) -> tuple[Tensor, list[int]]:
    """The number of each weight's block, int64 [any, outputs], and for each input the row that is its own."""
    outputs, scheme, count = plain.shape[0], plain.scheme, plain.scale.numel()
    numbers = torch.arange(count, device=plain.scale.device)
    if scheme.granularity == "tensor":
        return numbers.expand(1, len(range(*rows.indices(outputs)))), [0] * inputs
    if scheme.axis % len(plain.shape) == 0:
        table = numbers.reshape(outputs, -1)[rows].T.contiguous()
        return table, [i // (inputs // len(table)) for i in range(inputs)]
    full = unblocks(numbers.reshape(-1, 1).expand(-1, plain.codes.numel() // count), plain.shape, scheme)
    return full.reshape(outputs, inputs)[rows].T.contiguous(), list(range(inputs))


def _keeping(zeros: Tensor, nearest: Nearest) -> Nearest:
    """The same quantizer, but weights that were pruned stay zero and make up for nothing: [I, O] in the same order."""
    if not bool(zeros.any()):
        return nearest
    return lambda x, place: nearest(x, place).masked_fill_(zeros[place], 0.0)


def _integer(scale: Tensor, zero_point: Tensor, index: list[int], scheme: Scheme) -> Nearest:
    """The quantizer of an integer format. Rounding to an integer after clamping to integers is the same as before."""
    least, most = scheme.qmin - zero_point, scheme.qmax - zero_point
    # Adding this rounds to a whole number, ties to even. torch.round divides even 4,096 numbers among threads,
    # and then waits: up to a thousand times longer where the machine is busy.
    whole = 1.5 * 2.0 ** (52 if scale.dtype == torch.float64 else 23)

    def nearest(x: Tensor, place: int) -> Tensor:
        row = index[place]
        v = (x / scale[row]).clamp_(least[row], most[row])
        return v.add_(whole).sub_(whole).mul_(scale[row])

    return nearest


def _codebook(scale: Tensor, codebook: Tensor, block: Tensor, index: list[int]) -> Nearest:
    """The quantizer of a learned format: each block has a table of its own, or all have one."""

    def nearest(x: Tensor, place: int) -> Tensor:
        row = index[place]
        table = codebook[block[row]] if len(codebook) > 1 else codebook
        codes = nearest_value((x / scale[row]).to(torch.float32).unsqueeze(1), table)
        return table.expand(len(x), -1).gather(1, codes.long()).squeeze(1) * scale[row]

    return nearest


def _table(scale: Tensor, zero_point: Tensor, index: list[int], scheme: Scheme) -> Nearest:
    """The quantizer of a format with values of its own, which has no zero points."""

    def nearest(x: Tensor, place: int) -> Tensor:
        row = index[place]
        v = (x / scale[row]).clamp_(scheme.qmin, scheme.qmax)
        return scheme.spec.nearest(v.to(torch.float32)) * scale[row]

    return nearest
