"""The target class and the others taught apart: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.errors import DataError

_TARGET, _OTHERS = 1.0, 2.0  # weights of the two parts; the paper tunes the second, from 1 to 8


def loss(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Both parts, times the squared temperature."""
    if labels is None:
        raise DataError(
            "distillation loss 'dkd' needs labels: it treats the right class apart; use 'kd' without them"
        )
    classes = student.shape[-1]
    found, wanted = (x.reshape(-1, classes) / temperature for x in (student, teacher))
    right = F.one_hot(labels.reshape(-1).long(), classes).bool()
    p, t = F.softmax(found, dim=1), F.softmax(wanted, dim=1)
    pair_p, pair_t = (torch.stack([x[right], 1 - x[right]], dim=1).clamp(min=1e-8) for x in (p, t))
    of_target = F.kl_div(pair_p.log(), pair_t, reduction="batchmean")
    found, wanted = (x.masked_fill(right, -1e4) for x in (found, wanted))
    of_others = F.kl_div(
        F.log_softmax(found, dim=1), F.log_softmax(wanted, dim=1), log_target=True, reduction="batchmean"
    )
    return (_TARGET * of_target + _OTHERS * of_others) * temperature**2
