"""What all tests share: where the data sets lie, a fixed seed, reproducible random examples."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# The same examples on every run: a test that fails for one person fails for everybody.
settings.register_profile("fewbit", deadline=None, derandomize=True)
settings.load_profile("fewbit")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data and models, from FEWBIT_DATA; tests that need it skip where it is absent."""
    path = Path(os.environ.get("FEWBIT_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "datasets.py").is_file():
        pytest.skip(f"no data sets at {path}: set FEWBIT_DATA to the folder that holds datasets.py")
    return path


@pytest.fixture(scope="session")
def datasets(data_dir: Path) -> ModuleType:
    """The module that reads the data sets: ``datasets.cifar10("test")``, ``datasets.mnist("train")``."""
    spec = importlib.util.spec_from_file_location("fewbit_test_datasets", data_dir / "datasets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run in several processes, so each keeps to one thread; it also fixes the order of float sums."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
