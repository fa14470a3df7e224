"""Calibration: one pass over the data, one observer a site, bounded memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fewbit.errors import CalibrationError, FewbitError
from fewbit.observers import RangeObserver

Watch = Callable[[Tensor], None]


class Watcher(Interpreter):
    """Runs a graph and shows the outputs of some nodes; values are dropped as soon as nothing needs them."""

    def __init__(self, gm: GraphModule, watches: dict[Node, Watch]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.watches = {node.name: watch for node, watch in watches.items()}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        watch = self.watches.get(n.name)
        if watch is not None:
            watch(result)
        return result


def calibrate(
    gm: GraphModule, batches: Iterable[tuple[tuple[Tensor, ...], Any]], observers: dict[Node, tuple[str, RangeObserver]]
) -> int:
    """Show every batch to the observers (site name and observer by node). Returns the number of samples.

    Raises ``CalibrationError`` that names the layer where a range cannot be estimated.
    """

    def watch(site: str, observer: RangeObserver) -> Watch:
        def update(x: Tensor) -> None:
            try:
                observer.update(x)
            except FewbitError as error:
                raise CalibrationError(f"{site}: {error}") from error

        return update

    watcher = Watcher(gm, {node: watch(site, observer) for node, (site, observer) in observers.items()})
    samples = 0
    with torch.inference_mode():
        for inputs, _ in batches:
            watcher.run(*inputs)
            samples += inputs[0].shape[0] if inputs[0].dim() else 1
    return samples
