"""The command line as its users call it: output, JSON, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbit import demo


def fewbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    program = [sys.executable, "-c", "from fewbit.cli import main; main()", *arguments]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a quantized file, made through the command line itself."""
    folder = tmp_path_factory.mktemp("cli")
    data = demo.load_digits_split()
    np.save(folder / "calibration.npy", data.calibration_images)
    np.savez(folder / "test.npz", images=data.test_images, labels=data.test_labels)
    weights = Path(demo.__file__).parent / "digits.safetensors"
    done = fewbit(
        "quantize", "fewbit.demo:DigitsNet", "--weights", str(weights), "--calibration", "calibration.npy",
        "-o", "model.onnx", "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["verification"]["exact"] is True
    assert answer["size"] == (folder / "model.onnx").stat().st_size
    return folder


def test_verify(folder: Path) -> None:
    done = fewbit("verify", "model.onnx", "--json", cwd=folder)
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["exact"] is True
    assert sum(layer["differing"] for layer in answer["layers"]) == 0
    assert "5/5 conv" in answer["coverage"]


def test_evaluate(folder: Path) -> None:
    done = fewbit(
        "evaluate", "model.onnx", "--data", "test.npz", "--metrics", "accuracy,f1", "--json", cwd=folder
    )
    answer = json.loads(done.stdout)
    assert answer["samples"] == 497
    assert answer["metrics"]["accuracy"] > 0.97


def test_inspect_lists_every_operation(folder: Path) -> None:
    done = fewbit("inspect", "model.onnx", "--json", cwd=folder)
    kinds = [row["kind"] for row in json.loads(done.stdout)["operations"]]
    assert kinds.count("conv") == 5 and kinds.count("linear") == 1
    assert kinds[0] == "quantize" and kinds[-1] == "dequantize"


def test_inspect_plans_a_model_without_data(folder: Path) -> None:
    done = fewbit("inspect", "fewbit.demo:DigitsNet", "--shape", "4,1,8,8", cwd=folder)
    assert done.returncode == 0
    assert "conv1.weight" in done.stdout and "int8" in done.stdout


def test_settings_replace_the_recipe(folder: Path) -> None:
    done = fewbit(
        "quantize", "fewbit.demo:DigitsNet", "--calibration", "calibration.npy", "--set", "weights=int4",
        "--set", "equalize=true", "-o", "small.onnx", "--no-verify", "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["verification"] is None
    assert answer["size"] < 0.75 * (folder / "model.onnx").stat().st_size


def test_a_saved_folder_is_a_model(folder: Path) -> None:
    saved = fewbit(
        "quantize", "fewbit.demo:DigitsNet", "--calibration", "calibration.npy", "-o", "saved", cwd=folder
    )
    assert saved.returncode == 0, saved.stderr
    done = fewbit("inspect", "saved", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert any(row["site"] == "head.weight" for row in json.loads(done.stdout)["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nothing.onnx"], "error: nothing.onnx: no such file"),
        (["verify", "test.npz"], "error: test.npz: no target has the suffix '.npz'"),
        (["inspect", "nowhere:net", "--shape", "1,2"], "error: nowhere:net: cannot be imported"),
        (["evaluate", "model.onnx", "--data", "test.npz", "--metrics", "acuracy"], "accuracy"),
        (["quantize", "fewbit.demo:DigitsNet", "-o", "x.onnx"], "needs calibration data"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(folder: Path, arguments: list[str], message: str) -> None:
    done = fewbit(*arguments, cwd=folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "x.onnx").exists()


def test_wrong_usage_is_exit_code_2(folder: Path) -> None:
    assert fewbit("quantize", "fewbit.demo:DigitsNet", cwd=folder).returncode == 2


def test_demo_prints_json(tmp_path: Path) -> None:
    done = fewbit("demo", "-o", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["outputs_differing_from_reference"] == 0
    assert answer["int8"]["metrics"]["accuracy"] > 0.97
    assert answer["artifact"]["size"] < 0.4 * answer["float_size"]
    assert (tmp_path / "out" / "digits.int8.onnx").is_file()


def test_finetune_trains_exports_and_goes_on(folder: Path) -> None:
    data = demo.load_digits_split()
    np.savez(folder / "train.npz", images=data.train_images, labels=data.train_labels)
    weights = str(Path(demo.__file__).parent / "digits.safetensors")
    command = [
        "finetune",
        "fewbit.demo:DigitsNet",
        "--weights",
        weights,
        "--train",
        "train.npz",
        "--epochs",
        "2",
    ]
    command += ["--set", "weights=int3", "--folder", "run", "-o", "trained.onnx", "--json"]
    done = fewbit(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["verification"]["exact"] is True
    assert [record["epoch"] for record in answer["training"]] == [1, 2]
    again = json.loads(fewbit(*command, cwd=folder).stdout)  # finished: the state says so
    assert again["training"] == answer["training"]
    unlabelled = [*command[:4], "--train", "calibration.npy", "--teacher", "none", "-o", "x.onnx"]
    refused = fewbit(*unlabelled, cwd=folder)
    assert refused.returncode == 1 and "has no labels" in refused.stderr and not (folder / "x.onnx").exists()
