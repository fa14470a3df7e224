"""Saved folders that lie with valid checksums: refused by name, and nothing of them runs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.errors import ArtifactError
from fewbit.pipeline import quantize
from fewbit.storage import MODEL, load, save

LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "code in a node's name": lambda d: d["graph"]["nodes"][1].update(name="x); import os; (x"),
    "operator that is none": lambda d: d["graph"]["nodes"][1].update(
        op="call_function", target="aten.__class__.mro"
    ),
    "python function": lambda d: d["graph"]["nodes"][1].update(op="call_function", target="os.system"),
    "layer that is none": lambda d: d["graph"]["layers"]["1"].update(type="Sequential"),
    "huge layer": lambda d: d["graph"]["layers"]["1"]["config"].update(in_features=2**39),
    "node that comes later": lambda d: d["graph"]["nodes"][1].update(args=[{"node": 99}]),
    "unknown target": lambda d: d.update(target="../../etc"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(tmp_path: Path, lie: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    folder = save(quantize(net, torch.randn(40, 4)), tmp_path / "net")
    header = json.loads((folder / MODEL).read_text())
    LIES[lie](header["model"])
    text = json.dumps(header["model"], sort_keys=True, separators=(",", ":"))
    header["model_digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MODEL).write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=r"model.json") as caught:
        load(folder)
    assert "checksum" not in str(caught.value)


def test_a_real_layer_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    folder = save(quantize(nn.Sequential(nn.Linear(4, 3)), torch.randn(40, 4)), tmp_path / "net")
    header = json.loads((folder / MODEL).read_text())
    header["model"]["graph"]["layers"]["0"].update(type="Bilinear")
    text = json.dumps(header["model"], sort_keys=True, separators=(",", ":"))
    header["model_digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MODEL).write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=r"layer '0': 'Bilinear' is no standard layer"):
        load(folder)
