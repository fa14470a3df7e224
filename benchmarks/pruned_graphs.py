"""Random networks of everything that couples channels, pruned by every criterion, against the masked networks.

For each: the pruned network's outputs, its multiply-accumulates and its parameters are what was predicted.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fewbit.evaluation.costs import macs
from fewbit.model.readers.torch import read
from fewbit.pruning.allocation import Bounds, allocate
from fewbit.pruning.criteria import comparable, criterion_names, needs, scores
from fewbit.pruning.evidence import gather
from fewbit.pruning.groups import couple, find_groups, macs_without, parameters_without
from fewbit.pruning.slicing import masked, without

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from random_prunable import network

SHARE = 0.6  # of the multiply-accumulates between all and the fewest that may stay
TOLERANCE = 1e-4  # of the largest output


def check(gm: GraphModule, criterion: str, example: tuple[torch.Tensor, ...], seed: int) -> float | None:
    """The largest difference to the masked network, as a share of its largest output; None where nothing can leave."""
    c = couple(gm)
    groups = [g for g in find_groups(c) if g.reason is None and len(g) > 1]
    if not groups:
        return None
    batches = [(tuple(torch.randn(4, *x.shape[1:]) for x in example), torch.randint(5, (4,)))]
    generator = torch.Generator().manual_seed(seed)
    evidence = gather(c, groups, needs(criterion), batches, generator)
    found = {g.labels[0]: scores(criterion, g, evidence, generator) for g in groups}
    whole = macs_without(c, set())
    least = macs_without(c, {label for g in groups for label in g.labels[: len(g) - Bounds().kept(g, 1)]})
    budget = least + SHARE * (whole - least)
    gone = allocate(
        groups,
        found,
        lambda labels: macs_without(c, labels),
        budget,
        "global",
        Bounds(),
        comparable(criterion),
    )
    smaller = without(c, gone, example).eval()
    x = tuple(torch.randn(3, *each.shape[1:]) for each in example)
    with torch.no_grad():
        outputs, expected = smaller(*x), masked(c, gone, x)
    assert sum(each.macs for each in macs(smaller)) * len(example[0]) == macs_without(c, gone) <= budget
    assert sum(p.numel() for p in smaller.parameters()) == parameters_without(c, gone)
    return float((outputs - expected).abs().max() / expected.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    results: Counter[str] = Counter()
    worst = 0.0
    for seed in tqdm(range(args.first, args.first + args.graphs), disable=None):
        torch.manual_seed(seed)
        example = (torch.randn(2, 3, 8, 8),)
        gm = read(network(seed), example)
        for criterion in criterion_names():
            try:
                error = check(gm, criterion, example, seed)
            except Exception as failure:  # counted, named, and the next one tried
                print(f"seed {seed}, {criterion}: {type(failure).__name__}: {failure}", flush=True)
                results["failed"] += 1
                continue
            worst = max(worst, error or 0.0)
            ok = error is None or error < TOLERANCE
            results["nothing can leave" if error is None else "same" if ok else "differ"] += 1
            if not ok:
                print(f"seed {seed}, {criterion}: differs by {error:.2g}", flush=True)
    counts = ", ".join(f"{name} {count}" for name, count in results.items())
    print(f"{args.graphs} graphs x {len(criterion_names())} criteria: {counts}; largest difference {worst:.1e} of the "
          "largest output; multiply-accumulates and parameters as predicted")  # fmt: skip
    return 1 if results["failed"] or results["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
