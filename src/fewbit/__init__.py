"""fewbit makes trained neural networks small and fast, and proves that what was evaluated is what runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "quantize": "fewbit.pipeline",
    "finetune": "fewbit.finetuning",
    "distill": "fewbit.finetuning",
    "prune": "fewbit.slimming",
    "compress": "fewbit.compression",
    "hold_zeros": "fewbit.model.zeros",
    "compare": "fewbit.comparison",
    "group_lasso": "fewbit.sparse_learning",
    "Training": "fewbit.training.model",
    "Distillation": "fewbit.training.objective",
    "load": "fewbit.storage",
    "save": "fewbit.storage",
    "synthesize": "fewbit.synthesis",
    "sensitivity": "fewbit.search.sensitivity",
    "evaluate": "fewbit.evaluation.metrics",
    "measure": "fewbit.evaluation.measure",
    "export": "fewbit.deploy",
    "benchmark": "fewbit.versus",
    "verify": "fewbit.deploy",
    "formats": "fewbit.catalogue",
    "Recipe": "fewbit.plan",
    "Plan": "fewbit.plan",
    "Steps": "fewbit.plan",
    "Scheme": "fewbit.numerics.scheme",
    "QTensor": "fewbit.numerics.qtensor",
    "FewbitError": "fewbit.errors",
}

if TYPE_CHECKING:
    from fewbit.catalogue import formats
    from fewbit.comparison import compare
    from fewbit.compression import compress
    from fewbit.deploy import export, verify
    from fewbit.errors import FewbitError
    from fewbit.evaluation.measure import measure
    from fewbit.evaluation.metrics import evaluate
    from fewbit.finetuning import distill, finetune
    from fewbit.model.zeros import hold_zeros
    from fewbit.numerics.qtensor import QTensor
    from fewbit.numerics.scheme import Scheme
    from fewbit.pipeline import quantize
    from fewbit.plan import Plan, Recipe, Steps
    from fewbit.search.sensitivity import sensitivity
    from fewbit.slimming import prune
    from fewbit.sparse_learning import group_lasso
    from fewbit.storage import load, save
    from fewbit.synthesis import synthesize
    from fewbit.training.model import Training
    from fewbit.training.objective import Distillation
    from fewbit.versus import benchmark

__all__ = [
    "Distillation",
    "FewbitError",
    "Plan",
    "QTensor",
    "Recipe",
    "Scheme",
    "Steps",
    "Training",
    "benchmark",
    "compare",
    "compress",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "formats",
    "group_lasso",
    "hold_zeros",
    "load",
    "measure",
    "prune",
    "quantize",
    "save",
    "sensitivity",
    "synthesize",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import fewbit`` costs next to nothing."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
