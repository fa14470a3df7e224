"""Every kind of data that users have gives the same batches, and every bad one a clear error."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fewbit.data import Batches, InputSpec, as_batches
from fewbit.errors import DataError

X = torch.arange(10 * 3 * 2, dtype=torch.float32).reshape(10, 3, 2)
Y = torch.arange(10)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        return X[i], int(Y[i])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def pairs() -> list[Any]:
    return [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]


def check(batches: Batches, *, labelled: bool = True) -> None:
    got = list(batches)
    assert [len(inputs[0]) for inputs, _ in got] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs[0] for inputs, _ in got]), X)
    assert all(inputs[0].dtype == torch.float32 for inputs, _ in got)
    if labelled:
        assert torch.equal(torch.cat([target for _, target in got if target is not None]), Y)
    else:
        assert all(target is None for _, target in got)


LABELLED: dict[str, Any] = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "float64": (X.double().numpy(), Y.numpy().astype(np.int64)),
    "big endian": (X.numpy().astype(">f8"), Y.numpy()),
    "label list": (X, Y.tolist()),
    "mapping": {"x": X, "y": Y},
    "mapping, other names": {"labels": Y.numpy(), "pixels": X.numpy()},
    "list of tuples": pairs(),
    "list of lists": [list(each) for each in pairs()],
    "list of nested": [((x,), y) for x, y in pairs()],
    "list of mappings": [{"image": x, "label": y} for x, y in pairs()],
    "mapping and label": [({"image": x}, y) for x, y in pairs()],
    "dataset": Samples(),
    "tensor dataset": TensorDataset(X, Y),
    "iterable dataset": Stream(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "batches": as_batches((X, Y), what="test", batch_size=4),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled_sources_give_the_same_batches_again_and_again(kind: str) -> None:
    batches = as_batches(LABELLED[kind], what="test", batch_size=4, labels=True)
    check(batches)
    check(batches)
    check(as_batches(LABELLED[kind], what="test", batch_size=4, like=(X[:1],), labels=False), labelled=False)


@pytest.mark.parametrize("source", [X, X.numpy(), X.numpy()[::-1][::-1], list(X.split(4)), {"images": X}])
def test_unlabelled_sources(source: Any) -> None:
    check(as_batches(source, what="calibration", batch_size=4), labelled=False)


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.numpy())
    check(as_batches(tmp_path / "a.npy", what="calibration", batch_size=4), labelled=False)
    check(as_batches(str(tmp_path / "a.npy"), what="calibration", batch_size=4), labelled=False)
    spec = (InputSpec("pixels", (None, 3, 2), torch.float32),)
    for keys in ("x y", "images labels", "pixels target", "other y", "x_test y_test"):
        x, y = keys.split()
        np.savez(tmp_path / "a.npz", **{y: Y.numpy(), x: X.numpy(), "x_train": X.numpy() * 0})
        check(as_batches(tmp_path / "a.npz", what="test", batch_size=4, labels=True, like=spec))
    np.savez_compressed(tmp_path / "b.npz", X.numpy(), Y.numpy())
    check(as_batches(tmp_path / "b.npz", what="calibration", batch_size=4), labelled=False)


def test_length_and_samples_where_known() -> None:
    def known(source: Any) -> tuple[int | None, int | None, bool]:
        batches = as_batches(source, what="test", batch_size=4)
        return batches.length, batches.samples, batches.one_shot

    assert known((X, Y)) == (3, 10, False)
    assert known(Samples()) == (3, 10, False)
    assert known(pairs()) == (3, None, False)
    assert known(DataLoader(Samples(), batch_size=5)) == (2, None, False)
    assert known(Stream()) == (None, None, False)
    assert known(iter(pairs())) == (None, None, True)


def test_a_generator_gives_one_pass_and_peek_loses_nothing() -> None:
    batches = as_batches((each for each in pairs()), what="calibration")
    assert torch.equal(batches.peek()[0][0], X[:4])
    assert torch.equal(batches.peek()[0][0], X[:4])
    check(batches)
    with pytest.raises(
        DataError, match="a generator that has already been read, and a second pass is needed"
    ):
        list(batches)


def test_several_inputs_are_told_from_labels_by_their_number() -> None:
    two = as_batches((X, X + 1), what="test", n_inputs=2)
    ((a, b), target) = two.peek()
    assert torch.equal(b, a + 1) and target is None
    three = as_batches([(X, X + 1, Y)], what="test", like=(X, X))
    ((a, b), target) = three.peek()
    assert torch.equal(b, a + 1) and target is not None and torch.equal(target, Y)
    ((a, b), target) = as_batches({"q": X, "k": X + 1, "y": Y}, what="test", names=("k", "q")).peek()
    assert torch.equal(a, b + 1) and target is not None
    ((a, b), target) = as_batches({"x": X, "target": X + 1}, what="test", names=("x", "target")).peek()
    assert torch.equal(b, a + 1) and target is None
    ((a, b), target) = as_batches(((X, X + 1), Y), what="test", n_inputs=2).peek()
    assert torch.equal(b, a + 1) and target is not None
    with pytest.raises(
        DataError, match="test data holds 3 elements, and which of them are inputs is unknown"
    ):
        as_batches((X, X, Y), what="test")
    with pytest.raises(DataError, match=re.escape("test data holds 1 input(s), but the model takes 2")):
        as_batches(X, what="test", n_inputs=2)


def test_integers_are_kept_and_converted_between_integer_types_only() -> None:
    tokens = np.array([[1, 2], [3, 4]], dtype=np.int32)
    assert as_batches(tokens, what="test").peek()[0][0].dtype == torch.int32
    like = (torch.zeros(1, 2, dtype=torch.int64),)
    assert as_batches(tokens, what="test", like=like).peek()[0][0].dtype == torch.int64
    narrow = (torch.zeros(1, 2, dtype=torch.uint8),)
    with pytest.raises(DataError, match=re.escape("holds 300 at index (1, 0), which uint8 cannot hold")):
        as_batches(torch.tensor([[1, 2], [300, 4]]), what="test", like=narrow).peek()
    half = as_batches(X.double(), what="test", like=(X[:1].half(),)).peek()[0][0]
    assert half.dtype == torch.float16
    with pytest.raises(DataError, match=re.escape("holds 1e+300 at index (0,), which float32 cannot hold")):
        as_batches(torch.tensor([1e300], dtype=torch.float64), what="test").peek()


def test_a_model_that_works_in_place_does_not_change_the_users_data() -> None:
    for source in (X.clone(), X.numpy().copy(), [X.clone()]):
        as_batches(source, what="test").peek()[0][0].add_(1)
        kept = source[0] if isinstance(source, list) else torch.as_tensor(source)
        assert torch.equal(kept, X)


def test_reading_a_dataset_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(as_batches(Samples(), what="test"))
    assert torch.equal(torch.get_rng_state(), before)


def _with(value: float) -> torch.Tensor:
    x = X.clone()
    x[7, 2, 1] = value
    return x


LIKE = {"like": (torch.zeros(1, 3, 2),)}
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (
        None,
        {},
        "calibration data is a NoneType, expected a tensor, an array, a tuple (x, y), an iterable of "
        "batches, "
        "a Dataset, a DataLoader or a path to .npy or .npz",
    ),
    (3, {}, "calibration data is a int, expected a tensor"),
    (X, {"batch_size": 0}, "batch_size for the calibration data is 0, expected at least 1"),
    (
        X,
        {"like": ()},
        "the example for the calibration data is empty: give one tensor for each input of the model",
    ),
    ([], {}, "calibration data is empty: the list holds nothing"),
    ((), {}, "calibration data is empty"),
    ({}, {}, "calibration data is empty"),
    (iter([]), {}, "calibration data is empty: the list_iterator yielded no batch"),
    (X[:0], {}, "calibration data is empty: input 0 has shape (0, 3, 2)"),
    (torch.tensor(1.0), {}, "calibration data is empty: input 0 has shape ()"),
    ([X[:, :0]], {}, "calibration data: batch 0 is empty, its shape is (10, 0, 2)"),
    (np.zeros((0, 3)), {}, "calibration data is empty: input 0 has shape (0, 3)"),
    (X, {"labels": True}, "calibration data has no labels: give (x, y), or name the labels one of y, labels"),
    ({"x": X, "z": Y}, {"labels": True}, "calibration data has no labels (its keys are x, z): give (x, y)"),
    ([X], {"labels": True}, "calibration data: batch 0 has no labels: give (x, y)"),
    (
        (X, Y[:9]),
        {},
        "calibration data holds arrays of different lengths [10, 9]: inputs and labels need one entry "
        "per sample (a tuple holds arrays; give batches as a list)",
    ),
    (
        [(X, Y[:9])],
        {},
        "batch 0 has labels of shape (9,) for inputs of shape (10, 3, 2): expected one label for each",
    ),
    ([(X, 3)], {}, "batch 0 has labels of shape () for inputs of shape (10, 3, 2)"),
    ((X, X, Y), LIKE, "calibration data holds 3 elements, expected 1 input(s) and at most one label array"),
    (
        X.transpose(1, 2),
        LIKE,
        "calibration data: input 0 (batch 0) has shape (10, 2, 3), but the model expects (N, 3, 2)",
    ),
    (X[:, :2], LIKE, "input 0 (batch 0) has shape (10, 2, 2), but the model expects (N, 3, 2)"),
    (
        list(X),
        LIKE,
        "input 0 (batch 0) has shape (3, 2), but the model expects (N, 3, 2): if these are single samples, "
        "add a batch dimension or use a DataLoader",
    ),
    (
        X,
        {"like": (InputSpec("pixels", (None, None, 5), torch.float32),)},
        "calibration data: input 'pixels' (batch 0) has shape (10, 3, 2), but the model expects (N, any, 5)",
    ),
    (
        X.to(torch.uint8),
        LIKE,
        "calibration data: input 0 (batch 0) holds uint8, but the model expects float32: "
        "convert and scale it as in training, for example x.float() / 255",
    ),
    (
        X,
        {"like": (torch.zeros(1, 3, 2, dtype=torch.int64),)},
        "input 0 (batch 0) holds float32, but the model expects integers (int64): give indices, for "
        "example x.long()",
    ),
    (
        _with(float("nan")),
        {"batch_size": 4},
        "calibration data: input 0 holds nan at index (3, 2, 1) of batch 1: remove or repair that sample",
    ),
    (
        _with(float("-inf")),
        {"batch_size": 4, "names": ("pixels",)},
        "calibration data: input 'pixels' holds -inf at index (3, 2, 1) of batch 1",
    ),
    (
        (X, _with(float("inf"))[:, 2, 1]),
        {},
        "calibration data: the label array holds inf at index (7,) of batch 0",
    ),
    (
        [X, Y],
        {},
        "calibration data: batch 1 is int64 (10,), unlike the first batch: a list or iterable holds batches; "
        "give arrays of inputs and labels as a tuple (x, y)",
    ),
    (["a", "b"], {}, "calibration data: input 0 is a str, expected a tensor or an array"),
    ([{"y": Y}], {}, "calibration data: batch 0 has the keys y, expected 1 input array(s)"),
    ({"a": X}, {"names": ("q", "k"), "n_inputs": 2}, "calibration data has the keys a, expected q, k"),
    (
        np.array([object()]),
        {},
        "calibration data: input 0 has dtype object, expected real numbers of at most 64 bits",
    ),
    (
        np.array(["a"]),
        {},
        "calibration data: input 0 has dtype <U1, expected real numbers of at most 64 bits",
    ),
    (
        X.to_sparse(),
        {},
        "calibration data: input 0 is a sparse_coo float32 tensor, expected a dense tensor of real",
    ),
    (
        X + 1j,
        {},
        "calibration data: input 0 is a strided complex64 tensor, expected a dense tensor of real numbers",
    ),
    ((X, [[1], [2, 3]]), {}, "calibration data: the label array is a list of mixed content: give an array"),
    ([([[1], [2, 3]], Y)], {}, "calibration data: input 0 is a list of mixed content: give an array"),
]


@pytest.mark.parametrize(("source", "options", "message"), BAD, ids=range(len(BAD)))
def test_bad_data_says_what_was_found(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        list(as_batches(source, what="calibration", **options))


def test_samples_that_do_not_stack_are_an_error() -> None:
    ragged: Any = TensorDataset(X)
    ragged.__class__ = type(
        "Ragged", (Dataset,), {"__len__": lambda _: 2, "__getitem__": lambda _, i: X[0, : i + 1]}
    )
    with pytest.raises(DataError, match=r"samples do not stack into a batch .*: return tensors of one shape"):
        list(as_batches(ragged, what="test"))


class Trap:
    """Would leave a file behind if anybody unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_hostile_and_damaged_files(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            list(as_batches(tmp_path / name, what="calibration"))

    refused("no.npy", "calibration file '.*no.npy' does not exist")
    (tmp_path / "model.pt").write_bytes(b"x")
    refused("model.pt", r"calibration file '.*model\.pt' is not \.npy or \.npz: save it with numpy\.save")
    np.save(tmp_path / "trap.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    refused("trap.npy", "trap.npy' is damaged or holds no plain numbers .*: save it again")
    np.savez(tmp_path / "trap.npz", x=np.array([Trap(tmp_path / "sprung")], dtype=object))
    refused("trap.npz", "trap.npz' is damaged or holds no plain numbers .*: save it again")
    assert not (tmp_path / "sprung").exists()
    np.save(tmp_path / "empty.npy", np.zeros((0, 3), dtype=np.float32))
    refused("empty.npy", re.escape("calibration data is empty: input 0 has shape (0, 3)"))
    np.savez(tmp_path / "empty.npz")
    refused("empty.npz", "calibration file '.*empty.npz' is empty")
    for suffix, save in (("npy", np.save), ("npz", np.savez_compressed)):
        good = io.BytesIO()
        save(good, X.numpy())
        data = good.getvalue()
        for cut in range(0, len(data) - 1, 7):
            (tmp_path / f"cut.{suffix}").write_bytes(data[:cut])
            refused(f"cut.{suffix}", "damaged|empty")
    # A header that claims terabytes before a few bytes of data.
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "huge.npy").write_bytes(huge)
    refused("huge.npy", "damaged or holds no plain numbers")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", huge)
    refused("huge.npz", "damaged or holds no plain numbers")


def test_an_archive_larger_than_memory_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil  # type: ignore[import-untyped]

    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(100_000, dtype=np.float32))
    free = type("Free", (), {"available": 399_999})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        DataError, match=r"unpacks to 400,128 bytes, but 399,999 are free: save the inputs as \.npy"
    ):
        as_batches(tmp_path / "bomb.npz", what="calibration")
