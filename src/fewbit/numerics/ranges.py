"""The range of a tensor's blocks, and how much of a tensor a range cuts off."""

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.scheme import Scheme, blocks


def extremes(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block: float32 [C] each.

    Raises:
        CalibrationError: NaN or an infinity in x (naming its index), or an empty tensor.
        FormatError: the scheme does not fit the shape.
    """
    if x.numel() == 0:
        raise CalibrationError(f"a tensor of shape {tuple(x.shape)} is empty: at least one number is needed")
    rows = blocks(x, scheme)
    # Measured on CPU: along a dimension, aminmax is 20 times slower than over all; amin and amax are not.
    lo, hi = rows.aminmax() if rows.shape[0] == 1 else (rows.amin(dim=1), rows.amax(dim=1))
    # The extremes carry every NaN and infinity, so the tensor itself is only searched to name the place.
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        index = tuple(torch.nonzero(~torch.isfinite(x))[0].tolist())
        raise CalibrationError(
            f"found {float(x[index])} at index {index} of a tensor of shape {tuple(x.shape)}: "
            "expected finite numbers"
        )
    return lo.to(torch.float32).reshape(-1), hi.to(torch.float32).reshape(-1)


def clipped_fraction(x: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> Tensor:
    """Fraction of each block's numbers that lie outside lo..hi: float32 [C], between 0 and 1."""
    rows = blocks(x, scheme)
    outside = (rows < lo.reshape(-1, 1)) | (rows > hi.reshape(-1, 1))
    return outside.to(torch.float32).mean(dim=1)
