"""The command line on Keras and ONNX files and on every runtime's files, as its users call it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbit
from fewbit import demo
from fewbit.cli import main


def run(folder: Path, *arguments: str) -> str:
    """The program in this process: a new one would import torch for seconds, each time."""
    code, out, _ = attempt(folder, *arguments)
    assert code == 0, out
    return out


def attempt(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    out, errors, here = io.StringIO(), io.StringIO(), Path.cwd()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["fewbit", *arguments])
        patch.setenv("COLUMNS", "200")
        os.chdir(folder)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.chdir(here)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a saved model, a file for ONNX Runtime, and a float ONNX file that another tool wrote."""
    folder = tmp_path_factory.mktemp("cli")
    model, data = demo.load()
    np.save(folder / "calibration.npy", data.calibration_images)
    np.savez(folder / "test.npz", images=data.test_images[:200], labels=data.test_labels[:200])
    quantized = fewbit.quantize(model, data.calibration_images)
    fewbit.save(quantized, folder / "saved")
    example = torch.from_numpy(data.test_images[:4])
    fewbit.export(model, folder / "float.onnx", example=example, verify=False)
    anonymous(folder / "float.onnx", folder / "foreign.onnx")
    run(folder, "export", "saved", "-o", "int8.onnx", "--no-time")
    return folder


def anonymous(source: Path, target: Path) -> None:
    """The same file without what fewbit says of it."""
    import onnx

    model = onnx.load(str(source))
    del model.metadata_props[:]
    onnx.save(model, str(target))


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Keras model in both formats, and inputs for it."""
    pytest.importorskip("ai_edge_litert")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    folder = tmp_path_factory.mktemp("keras")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu", name="first"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, name="last"),
        ]
    )
    model.save(folder / "net.keras")
    x = np.random.default_rng(0).random((64, 8, 8, 1), np.float32)
    np.save(folder / "x.npy", x)
    np.savez(folder / "test.npz", x=x, y=np.arange(64) % 10)
    return folder


def test_quantize_follows_the_suffix_of_its_output(keras_files: Path) -> None:
    out = run(
        keras_files, "quantize", "net.keras", "--calibration", "x.npy", "--io", "int8", "-o", "net.tflite", "--json"
    )  # fmt: skip
    answer = json.loads(out)
    assert answer["target"] == "litert" and answer["verification"]["exact"]
    from fewbit.targets._litert.runtime import interpreter

    details = interpreter(keras_files / "net.tflite").get_input_details()
    assert details[0]["dtype"] == np.int8
    operations = json.loads(run(keras_files, "inspect", "net.tflite", "--json"))["operations"]
    assert [row["layer"] for row in operations if row["weights"]] == ["first", "last"]
    planned = fewbit.quantize(fewbit.load(keras_files / "net.keras"), keras_files / "x.npy", target="litert")
    fewbit.export(planned, keras_files / "same.tflite", io="int8", time=False)
    assert (keras_files / "same.tflite").read_bytes() == (keras_files / "net.tflite").read_bytes()


def test_target_is_planned_for(keras_files: Path) -> None:
    formats = {}
    for target in ("onnx", "litert"):
        rows = json.loads(run(keras_files, "inspect", "net.keras", "--target", target, "--json"))["rows"]
        formats[target] = {row["site"]: row["scheme"]["format"] for row in rows if row["scheme"]}
    assert formats["onnx"]["first.weight"] == formats["litert"]["first.weight"] == "int8"
    assert (formats["onnx"]["first.output"], formats["litert"]["first.output"]) == ("uint8", "int8")


def test_quantize_saves_for_a_target(keras_files: Path) -> None:
    run(keras_files, "quantize", "net.keras", "--calibration", "x.npy", "--target", "litert", "-o", "saved")
    assert fewbit.load(keras_files / "saved").target == "litert"
    code, _, errors = attempt(
        keras_files, "quantize", "net.keras", "--calibration", "x.npy", "--io", "int8", "-o", "saved"
    )
    assert code == 2 and "--io is for files" in errors


def test_a_float_keras_file_is_evaluated_and_measured(keras_files: Path) -> None:
    out = run(keras_files, "evaluate", "net.keras", "--data", "test.npz", "--baseline", "net.keras", "--json")
    assert json.loads(out)["agreement"]["identical"]
    run(keras_files, "export", "net.keras", "-o", "float.onnx", "--no-time")
    answer = json.loads(run(keras_files, "measure", "net.keras", "--artifact", "float.onnx", "--json"))
    assert answer["macs"] == 4 * 9 * 36 + 4 * 10  # the shape of the input is the file's
    assert set(answer["candidates"]) == {"model", "float.onnx"}


def test_export_to_several_targets(folder: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    out = run(
        folder, "export", "saved", "--targets", "onnx, litert", "-o", "build", "--data", "test.npz", "--json"
    )
    answer = json.loads(out)
    assert {name: Path(a["path"]).suffix for name, a in answer["artifacts"].items()} == {
        "onnx": ".onnx",
        "litert": ".tflite",
    }
    assert all(report["metrics"]["accuracy"] > 0.95 for report in answer["reports"].values())
    assert (folder / "build" / "model.tflite").is_file()
    table = run(folder, "benchmark", "build/model.onnx", "build/model.tflite", "--data", "test.npz", "--rounds", "2",
                "--metrics", "accuracy,f1")  # fmt: skip
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["build/model.onnx", "build/model.tflite"]
    assert "f1" in table and "LiteRT" in table


def test_a_target_that_fails_is_exit_code_1_after_the_table(folder: Path) -> None:
    code, out, errors = attempt(
        folder, "export", "saved", "--targets", "onnx,tensorrt", "-o", "two", "--no-time"
    )
    assert code == 1 and "tensorrt: not written: " in out and not errors
    assert out.splitlines()[1].startswith("onnx")


def test_benchmark_takes_a_batch(folder: Path) -> None:
    call = ["benchmark", "int8.onnx", "--data", "test.npz", "--rounds", "3", "--json", "--batch"]
    answers = [json.loads(run(folder, *call, n)) for n in ("1", "64")]
    one, many = (answer["int8.onnx"]["latency"]["median_ms"] for answer in answers)
    assert many > 4 * one
    assert answers[0]["int8.onnx"]["latency"]["n"] == 3 and answers[0]["int8.onnx"]["report"] is None


def test_verify_against_a_saved_model(folder: Path, tmp_path: Path) -> None:
    answer = json.loads(run(folder, "verify", "int8.onnx", "--model", "saved", "--json"))
    assert answer["exact"] and answer["samples"] == 8
    answer = json.loads(run(folder, "verify", "int8.onnx", "--data", "test.npz", "--json"))
    assert answer["exact"] and answer["samples"] == 16 and answer["output_total"] == 160
    other = fewbit.quantize(demo.load()[0], np.load(folder / "calibration.npy") * 0.5)
    fewbit.save(other, tmp_path / "other")
    code, _, errors = attempt(folder, "verify", "int8.onnx", "--model", str(tmp_path / "other"))
    assert code == 1 and "int8.onnx: " in errors and "differ" in errors
    fewbit.save(fewbit.load(folder / "foreign.onnx"), tmp_path / "float")
    code, _, errors = attempt(folder, "verify", "int8.onnx", "--model", str(tmp_path / "float"))
    assert code == 1 and "a float model; expected the folder of a quantized one" in errors


def test_inspect_plans_a_foreign_onnx_file(folder: Path) -> None:
    code, out, errors = attempt(folder, "inspect", "foreign.onnx", "--json")
    assert code == 0 and "read as a model instead" in errors
    sites = {row["site"]: row for row in json.loads(out)["rows"]}
    assert sum(site.endswith(".weight") for site in sites) == 6
    assert all(row["scheme"]["format"] == "int8" for s, row in sites.items() if s.endswith(".weight"))
    assert "operations" in json.loads(run(folder, "inspect", "int8.onnx", "--json"))


def test_inspect_reads_anyone_s_tflite(data_dir: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    name = "mlperf-tiny-resnet8-int8.tflite"
    table = run(data_dir / "models", "inspect", name)
    assert f"{name}: 98,496 bytes, not written by fewbit" in table
    kinds = [r["kind"] for r in json.loads(run(data_dir / "models", "inspect", name, "--json"))["operations"]]
    assert (kinds.count("conv"), kinds.count("add"), kinds.count("linear")) == (9, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "saved", "--targets", "onxx", "-o", "b"], 1, "did you mean 'onnx'"),
        (["export", "saved", "-o", "model.npz"], 1, "no target has the suffix '.npz'"),
        (["export", "saved", "-o", "m.onnx", "--io", "int8"], 1, "cannot hand over 'int8'"),
        (["export", "saved", "-o", "m.onnx", "--data", "test.npz"], 2, "--data goes with --targets"),
        (["export", "saved", "-o", "b", "--targets", "onnx", "--io", "int8"], 2, "--io is for one file"),
        (["export", "fewbit.demo:DigitsNet", "-o", "m.onnx"], 1, "with an example input"),
        (["benchmark", "int8.onnx", "nothing.onnx", "--data", "test.npz"], 1, "nothing.onnx: no such file"),
        (["benchmark", "int8.onnx", "--data", "test.npz", "--batch", "0"], 2, "--batch"),
        (["measure", "fewbit.demo:DigitsNet"], 1, "--shape"),
        (["inspect", "fewbit.demo:DigitsNet"], 1, "--shape"),
        (["inspect", "nothing.onnx"], 1, "nothing.onnx: no such file"),
        (["inspect", "nothing.keras"], 1, "nothing.keras: no such file"),
    ],
)  # fmt: skip
def test_errors(folder: Path, arguments: list[str], code: int, message: str) -> None:
    found, out, errors = attempt(folder, *arguments)
    assert (found, out) == (code, "") and message in errors
    if code == 1:
        assert errors.startswith("error: ") and not (folder / "m.onnx").exists()


def test_the_program_as_a_process(folder: Path) -> None:
    program = [sys.executable, "-c", "from fewbit.cli import main; main()"]
    done = subprocess.run(
        [*program, "verify", "int8.onnx"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.startswith("int8.onnx: ONNX Runtime")
