"""Float operations in the form in which LiteRT has an operator for each."""

from collections.abc import Collection

from fewbit.model.program import Program
from fewbit.targets._litert.expand import Expand, Expansion
from fewbit.targets._litert.floats_arithmetic import ARITHMETIC
from fewbit.targets._litert.floats_fallback import decomposed
from fewbit.targets._litert.floats_functions import FUNCTIONS
from fewbit.targets._litert.floats_products import PRODUCTS
from fewbit.targets._litert.floats_recurrent import RECURRENT
from fewbit.targets._litert.floats_reductions import REDUCTIONS
from fewbit.targets._litert.floats_shapes import SHAPES
from fewbit.targets._litert.floats_windows import WINDOWS
from fewbit.targets._litert.fusion import norms_joined
from fewbit.targets._litert.shapes import Sizes

EXPANSIONS: dict[str, Expand] = FUNCTIONS | ARITHMETIC | REDUCTIONS | PRODUCTS | WINDOWS | SHAPES | RECURRENT


def expanded(program: Program, sizes: Sizes, free_batch: bool, rules: Collection[str]) -> Program:
    """The program with float operations that are one operator each, and with numbers in place of sizes.

    ``rules``: the operations that are written as they are.
    """
    program = norms_joined(program)
    return Expansion(program, sizes, free_batch, EXPANSIONS, rules, decomposed).run()
