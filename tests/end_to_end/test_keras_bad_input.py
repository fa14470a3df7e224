"""Keras files and models that cannot be read, are damaged, or mean harm: one clear error each, nothing run."""

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

import h5py
import keras
from keras import layers as kl
from keras.src.backend.common import global_state

from fewbit.errors import ArtifactError, FewbitError, ModelError
from fewbit.model.readers.keras import is_keras_model, read_file, read_model

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(path: Path, *layers: Any, shape: tuple[int, ...] = (4, 3)) -> Path:
    keras.Sequential([keras.Input(shape), *layers]).save(path)
    return path


def reconfigured(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same file with another configuration."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            change(config)
            file.attrs["model_config"] = json.dumps(config)
        return path
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config)
    return packed(path, parts | {"config.json": json.dumps(config).encode()})


def packed(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def unpacked(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Squared(kl.Layer):
    """Nobody registered it."""

    def call(self, x: Any) -> Any:
        return x * x


@keras.saving.register_keras_serializable("bad_input")
class Tripled(kl.Dense):
    """Registered, but it computes something of its own."""

    def call(self, x: Any, training: Any = None) -> Any:
        return 3 * super().call(x)


def unreadable() -> Any:
    """A model with seven layers that cannot be read, one of them inside another model."""
    i = keras.Input((4, 4, 4, 3))
    inner_input = keras.Input((9, 3))
    inner = keras.Model(inner_input, kl.GRU(3, reset_after=False, name="old_gru")(inner_input), name="inner")
    x = kl.Lambda(lambda t: t * 2, name="doubling")(i)
    x = kl.ConvLSTM2D(2, 2, name="conv_lstm")(x)
    x = kl.Reshape((9, 2))(x)
    x = Squared(name="squared")(x)
    x = Tripled(3, name="tripled")(x)
    x = kl.LSTM(3, activation="relu", return_sequences=True, name="relu_lstm")(x)
    x = inner(kl.Dense(3, name="sparse", activation=keras.activations.sparsemax)(x))
    return keras.Model(i, x)


NAMES = ["doubling", "conv_lstm", "squared", "tripled", "relu_lstm", "old_gru", "sparse"]


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_all_layers_that_cannot_be_read_are_listed_at_once(tmp_path: Path, suffix: str) -> None:
    unreadable().save(tmp_path / f"m.{suffix}")
    with pytest.raises(ModelError, match="7 layers") as error:
        read_file(tmp_path / f"m.{suffix}")
    assert all(f"'{name}' (" in str(error.value) for name in NAMES)
    assert "register_keras_serializable" in str(error.value)


def test_a_live_model_lists_them_too() -> None:
    with pytest.raises(ModelError, match="7 layers") as error:
        read_model(unreadable())
    assert all(f"'{name}' (" in str(error.value) for name in NAMES)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def hide(config: dict[str, Any]) -> None:
        code = {
            "class_name": "__lambda__",
            "config": {"value": {"code": "AAAA", "defaults": None, "closure": None}},
        }
        config["config"]["layers"][1]["config"]["kernel_initializer"] = code

    path = reconfigured(saved(tmp_path / "m.keras", kl.Dense(2, name="dense")), hide)
    with pytest.raises(ModelError, match=r"'dense' \(Dense: .*__lambda__.*never run"):
        read_file(path)
    saved(
        tmp_path / "l.keras", kl.Lambda(lambda t, place=str(mark): (Path(place).touch(), t)[1], name="writes")
    )
    mark.unlink()
    with pytest.raises(ModelError, match=r"'writes' \(Lambda: runs Python code"):
        read_file(tmp_path / "l.keras")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "class_name"),
    [("os", "system"), ("keras.utils", "get_file"), ("builtins", "Dense"), ("tests", "Dense")],
)
def test_classes_of_other_modules_are_not_even_looked_up(
    tmp_path: Path, module: str, class_name: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["config"]["layers"][1] |= {"module": module, "class_name": class_name}

    with pytest.raises(ModelError, match=f"{class_name}: unknown to this reader"):
        read_file(reconfigured(saved(tmp_path / "m.keras", kl.Dense(2)), change))


def test_objects_of_the_users_own_are_named(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        layer = config["config"]["layers"][1]["config"]
        layer["kernel_regularizer"] = {
            "module": "mine",
            "class_name": "Mine",
            "config": {},
            "registered_name": "p>Mine",
        }
        layer["activation"] = {
            "module": "builtins",
            "class_name": "function",
            "config": "my_act",
            "registered_name": "my_act",
        }

    with pytest.raises(ModelError, match=r"'my_act'.*kernel_regularizer 'Mine' is not one of Keras's"):
        read_file(reconfigured(saved(tmp_path / "m.keras", kl.Dense(2)), change))


def test_operators_that_keras_cannot_load_from_hdf5(tmp_path: Path) -> None:
    i = keras.Input((5,))
    keras.Model(i, kl.Dense(5)(i) + i).save(tmp_path / "m.h5")
    with pytest.raises(
        ModelError, match=r"\(Add: an operator, which Keras .* cannot load .*: save as .keras"
    ):
        read_file(tmp_path / "m.h5")


def test_masks_that_matter() -> None:
    embedding = kl.Embedding(9, 4, mask_zero=True)
    model = keras.Sequential([keras.Input((5,)), embedding, kl.LSTM(3, name="lstm")])
    with pytest.raises(
        ModelError, match=r"'lstm' \(LSTM: leaves out the steps that a mask marks.*mask_zero=False"
    ):
        read_model(model)
    with pytest.raises(ModelError, match="Masking: steps cannot be left out"):
        read_model(keras.Sequential([keras.Input((5, 4)), kl.Masking(), kl.LSTM(3)]))


def test_models_whose_layers_cannot_be_seen() -> None:
    class Own(keras.Model):
        def call(self, x: Any) -> Any:
            return x

    with pytest.raises(ModelError, match=r"Own with a call of its own.*keras.Model\(inputs, outputs\)"):
        read_model(Own())
    with pytest.raises(ModelError, match=r"no input shape yet.*keras\.Input"):
        read_model(keras.Sequential([kl.Dense(3)]))
    with pytest.raises(ModelError, match="expected one of Keras 3"):
        read_model(torch.nn.Linear(2, 2))


def test_an_example_that_does_not_fit() -> None:
    model = keras.Sequential([keras.Input((5,)), kl.Dense(3)])
    with pytest.raises(ModelError, match=r"shapes \[\(2, 4\)\]: expected \[\(None, 5\)\]"):
        read_model(model, torch.zeros(2, 4))


def test_weights_that_are_not_finite() -> None:
    model = keras.Sequential([keras.Input((5,)), kl.Dense(3, name="broken")])
    model.layers[-1].kernel.assign(np.full((5, 3), np.nan, "float32"))
    with pytest.raises(ModelError, match=r"broken\.weight holds nan"):
        read_model(model)


def test_mixed_precision_is_read_from_files_and_named_live(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,)), kl.Dense(3, dtype="mixed_float16", name="half")])
    with pytest.raises(ModelError, match=r"'half' \(Dense: computes in float16.*read the file"):
        read_model(model)
    model.save(tmp_path / "m.keras")
    gm = read_file(tmp_path / "m.keras")
    assert gm.meta["notes"] == ["layers of mixed_float16 were read in float32"]


def test_quantized_keras_layers_are_refused() -> None:
    model = keras.Sequential([keras.Input((5,)), kl.Dense(3, name="quantized")])
    model.quantize("int8")
    with pytest.raises(ModelError, match=r"'quantized' \(.*quantize the float model with fewbit"):
        read_model(model)


# files


def test_what_is_no_keras_file(tmp_path: Path) -> None:
    h5 = saved(tmp_path / "m.h5", kl.Dense(2))
    (tmp_path / "renamed.keras").write_bytes(h5.read_bytes())
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "text.keras").write_text("hello")
    keras.Sequential([keras.Input((3,)), kl.Dense(2)]).save_weights(tmp_path / "only.weights.h5")
    for name, words in [
        ("renamed.keras", "an HDF5 file: rename it to .h5"), ("text.h5", "damaged"), ("text.keras", "no zip archive"),
        ("only.weights.h5", "weights without a model"), ("missing.keras", "no such file"), ("", "no such file"),
    ]:  # fmt: skip
        with pytest.raises(FewbitError, match=words):
            read_file(tmp_path / name)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_damaged_files_are_one_clear_error(tmp_path: Path, suffix: str) -> None:
    """Truncated and with bytes changed: an error of ours, or the model (a weight may have changed), never a crash."""
    path = saved(
        tmp_path / f"m.{suffix}", kl.Conv1D(3, 2), kl.BatchNormalization(), kl.Flatten(), kl.Dense(2)
    )
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    victims = [whole[: len(whole) * k // 6] for k in range(6)]
    for _ in range(12):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 4, 40])):
            broken[rng.randrange(len(whole))] = rng.randrange(256)
        victims.append(bytes(broken))
    for victim in victims:
        path.write_bytes(victim)
        try:
            read_file(path)
        except FewbitError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 6


def test_archives_that_mean_harm(tmp_path: Path) -> None:
    parts = unpacked(saved(tmp_path / "m.keras", kl.Dense(2)))
    bomb = {"config.json": b"[" * 1 + b" " * (200 << 20)}
    for extra, words in [
        (bomb, "would unpack 'config.json'"), ({"../../evil": b"x"}, "a path out of the archive"),
        ({"/etc/evil": b"x"}, "a path out of the archive"), ({"config.json": b"[" * 100_000}, "too deep"),
        ({"config.json": b'{"a": 1}'}, "no model's"), ({"model.weights.h5": b"nonsense"}, "damaged"),
        ({"config.json": b"[]"}, "no model's"), ({"config.json": b"\xff\xfe"}, "damaged"),
    ]:  # fmt: skip
        with pytest.raises(ArtifactError, match=words):
            read_file(packed(tmp_path / "m.keras", parts | extra))
    del parts["config.json"]
    with pytest.raises(ArtifactError, match=r"expected config.json and model.weights.h5"):
        read_file(packed(tmp_path / "m.keras", parts))


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize(
    ("index", "key", "value", "words"),
    [(1, "units", 10**9, "weights and holds"), (1, "units", 3, "fit each other|weights and holds"),
     (1, "units", 10**30, "cannot be loaded"), (1, "units", "many", "cannot be loaded"),
     (1, "units", -1, "cannot be loaded"), (2, "n", 10**9, "numbers for one sample"),
     (0, "batch_shape", [None, 10**6, 10**5, 3], "one sample|cannot be loaded")],
)  # fmt: skip
def test_configurations_that_lie(
    tmp_path: Path, suffix: str, index: int, key: str, value: Any, words: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["config"]["layers"][index]["config"][key] = value
        config["config"]["layers"][index].get("build_config", {}).clear()

    path = saved(tmp_path / f"m.{suffix}", kl.Dense(2), kl.RepeatVector(2), shape=(4,))
    with pytest.raises(ArtifactError, match=words):
        read_file(reconfigured(path, change))


def test_hdf5_files_that_lie_about_their_weights(tmp_path: Path) -> None:
    def damage(name: str, change: Callable[[Any], None]) -> Path:
        path = saved(tmp_path / f"{name}.h5", kl.Dense(2))
        with h5py.File(path, "r+") as file:
            change(file["model_weights"])
        return path

    def virtual(group: Any) -> None:
        layout = h5py.VirtualLayout((4,), "float32")
        layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (4,))
        group.create_virtual_dataset("v", layout)

    changes: dict[str, Callable[[Any], Any]] = {
        "are stored": lambda g: g.create_dataset("x", (1 << 20, 1 << 12), "float32", chunks=(1, 1 << 12)),
        "link out of its place": lambda g: g.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/")),
        "a link": lambda g: g.__setitem__("x", h5py.SoftLink("/nowhere")),
        "of another file": virtual,
        "data or data": lambda g: g.create_dataset("x", (4,), "float32", external=[("/etc/passwd", 0, 16)]),
    }
    for number, (words, change) in enumerate(changes.items()):
        with pytest.raises(ArtifactError, match=words):
            read_file(damage(f"m{number}", change))


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.h5", kl.Dense(2))
    with h5py.File(path, "r+") as file:
        file["model_weights"]["loop"] = file["model_weights"]
    assert is_linear(read_file(path))


def is_linear(gm: torch.fx.GraphModule) -> bool:
    return any(isinstance(part, torch.nn.Linear) for part in gm.modules())


def test_weights_inside_an_archive_are_looked_at_too(tmp_path: Path) -> None:
    parts = unpacked(saved(tmp_path / "m.keras", kl.Dense(2)))
    memory = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(memory, "r+") as file:
        file["x"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(ArtifactError, match="link out of its place"):
        read_file(packed(tmp_path / "m.keras", parts | {"model.weights.h5": memory.getvalue()}))


# what is left behind


def test_nothing_global_is_changed(tmp_path: Path) -> None:
    good = saved(
        tmp_path / "m.keras",
        kl.Dense(2),
        kl.Dropout(0.5),
        kl.ReLU(),
    )
    unreadable().save(tmp_path / "bad.keras")

    def state() -> tuple[Any, ...]:
        numbers = dict(global_state.get_global_attribute("object_name_uids"))
        arrays = np.random.get_state()[1].tolist()
        scope = keras.src.saving.serialization_lib.in_safe_mode()
        return (random.getstate(), arrays, torch.get_rng_state().tolist(), keras.config.floatx(), numbers, scope,
                keras.config.dtype_policy().name, keras.config.image_data_format())  # fmt: skip

    before = state()
    read_file(good)
    with pytest.raises(ModelError):
        read_file(tmp_path / "bad.keras")
    assert state() == before


def test_keras_is_not_imported_to_recognise_its_models() -> None:
    assert (
        is_keras_model(keras.Sequential())
        and not is_keras_model(torch.nn.Linear(1, 1))
        and not is_keras_model(None)
    )
    code = """
import sys, pathlib, torch
from fewbit.model.readers.keras import is_keras_model, read_file
assert not is_keras_model(torch.nn.Linear(1, 1))
assert "keras" not in sys.modules and "h5py" not in sys.modules
sys.modules["keras"] = None  # as where it is not installed
try:
    read_file(pathlib.Path("m.keras"))
except Exception as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("MissingExtraError")
    assert "pip install 'fewbit[keras]'" in run.stdout
