"""`import fewbit` is quick beyond torch, and neither it nor its public names load a heavy module."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
LIMIT = 0.3  # seconds
HEAVY = [
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "scipy",
    "torchmetrics",
    "rich",
    "typer",
    "matplotlib",
]

# Processor time, not wall time, so that a busy machine does not fail the test.
TIMED = """
import time, torch
start = time.process_time()
import fewbit
print(time.process_time() - start)
"""
# These write and run files of a runtime, so asking for them may load it.
LATE = {"export", "verify"}

LOADED = """
import json, sys, torch
before = set(sys.modules)
import fewbit
for name in set(fewbit.__all__) - {late!r}:
    getattr(fewbit, name)
heavy = [name for name in {heavy!r} if name in set(sys.modules) - before]
print(json.dumps([heavy, sorted(fewbit.__all__)]))
"""


def child(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_quick_beyond_torch() -> None:
    seconds = statistics.median(float(child(TIMED)) for _ in range(5))
    assert seconds < LIMIT, f"import fewbit takes {seconds:.2f} s beyond torch"


def test_public_names_load_nothing_heavy() -> None:
    heavy, names = json.loads(child(LOADED.format(heavy=HEAVY, late=LATE)))
    assert names, "fewbit.__all__ is empty"
    assert not heavy


def test_a_heavy_module_would_be_seen() -> None:
    code = LOADED.format(heavy=HEAVY, late=LATE).replace("import fewbit\n", "import fewbit, rich\n")
    assert json.loads(child(code))[0] == ["rich"]
