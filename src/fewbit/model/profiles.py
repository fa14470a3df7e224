"""The families of integer kernels that ``Reference`` can reproduce, by the name of their requantization rule."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbit.model import kernels, kernels_q31, kernels_xnnpack
from fewbit.model.integer_weights import SHIFTS
from fewbit.model.program import Coding


@dataclass(frozen=True)
class Profile:
    """What one family of runtimes computes: every integer operation, and the step from float to codes."""

    kernels: dict[str, kernels.Kernel]
    quantize: Callable[[Tensor, Coding], Tensor]


PROFILES: dict[str, Profile] = {
    "f32_even": Profile(kernels.KERNELS, kernels.quantize),
    "f32_even_shifts": Profile(SHIFTS, kernels.quantize),
    "xnnpack": Profile(kernels_xnnpack.KERNELS, kernels.quantize),
    "q31_double": Profile(kernels_q31.KERNELS, kernels_q31.quantize),
}
