"""Few bits: block reconstruction and fine-tuning beat nearest codes, repeat, resume, deploy, and say what they need."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import progress_file
from fewbit.demo.network import load
from fewbit.errors import ArtifactError, CalibrationError, DataError, RecipeError
from fewbit.model.simulate import QuantizedModel
from fewbit.pipeline import plan

NETWORK, DATA = load()
IMAGES = torch.from_numpy(DATA.calibration_images)
TEST = torch.from_numpy(DATA.test_images)
NEAREST = {"recipe": "w2a4", "rounding": "nearest", "finetune": 0}
FAST = {"recipe": "w2a4", "iterations": 60, "finetune": 0}


def quantized(calibration: object = IMAGES, **options: object) -> QuantizedModel:
    return fewbit.quantize(NETWORK, calibration, progress=False, **options)


def noise(model: nn.Module) -> float:
    """On images that calibration did not see."""
    with torch.no_grad():
        expected = NETWORK(TEST)
        return float((model(TEST) - expected).square().sum() / expected.square().sum())


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def reconstructed() -> QuantizedModel:
    return quantized(**FAST)


def test_reconstruction_beats_nearest_codes_and_fine_tuning_goes_further(
    reconstructed: QuantizedModel,
) -> None:
    nearest, tuned = quantized(**NEAREST), quantized(**FAST | {"finetune": 20})
    assert noise(reconstructed) < 0.6 * noise(nearest)
    assert noise(tuned) < 0.9 * noise(reconstructed)
    assert any("reconstructed" in note for note in reconstructed.facts["notes"])
    assert any("fine-tuned for 20 epochs" in note for note in tuned.facts["notes"])


def test_brecq_learns_too_and_adaround_and_gptq_do_layer_by_layer() -> None:
    nearest = noise(quantized(**NEAREST))
    for rounding in ("brecq", "adaround", "gptq"):
        found = quantized(**NEAREST | {"rounding": rounding, "iterations": 60})
        assert noise(found) < 0.8 * nearest, rounding


def test_codebooks_are_fine_tuned_and_still_deploy(tmp_path: Path) -> None:
    options = {
        "weights": "codebook2_shared",
        "activations": "float",
        "rounding": "weighted_kmeans",
        "ends": "int8",
    }
    rounded, tuned = quantized(**options), quantized(**options, finetune=10)
    assert noise(tuned) < 0.7 * noise(rounded)
    rows = [row for row in tuned.plan.weights() if row.scheme is not None]
    assert {row.scheme.format for row in rows[1:-1]} == {"codebook2_shared"}
    assert rows[0].scheme.format == rows[-1].scheme.format == "int8" and rows[0].rounding == "nearest"
    for row in rows:
        assert torch.equal(tuned.graph.get_parameter(row.site), tuned.qtensors[row.site].dequantize())
    fewbit.save(tuned, tmp_path / "tuned.fewbit")
    assert same(fewbit.load(tmp_path / "tuned.fewbit"), tuned)
    fewbit.export(tuned, tmp_path / "tuned.onnx", time=False)  # refused unless its answers are the same


def test_weights_stay_on_their_grid_and_the_plan_tells_what_was_spared(reconstructed: QuantizedModel) -> None:
    plan = reconstructed.plan
    weights = [row for row in plan.weights() if row.scheme is not None]
    assert [row.scheme.format for row in weights][1:-1] == ["int2"] * (len(weights) - 2)
    assert weights[0].scheme.format == weights[-1].scheme.format == "int8"
    assert weights[0].rounding == "nearest" and weights[1].rounding == "qdrop"
    for row in weights:
        q = reconstructed.qtensors[row.site]
        parameter = reconstructed.graph.get_parameter(row.site)
        assert torch.equal(parameter, q.dequantize())
        assert int(q.codes.min()) >= row.scheme.qmin and int(q.codes.max()) <= row.scheme.qmax


class Residual(nn.Module):
    """A branch that only a sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.branch(x)).mean((2, 3)))


def test_ends_and_addends() -> None:
    x = torch.randn(8, 3, 8, 8)
    options = {"weights": "int4", "activations": "int4", "weight_symmetric": False}
    found = plan(Residual().eval(), x, ends="int8", addends="int6", **options)
    formats = {row.site: row.scheme.format for row in found.rows if row.scheme is not None}
    assert formats["branch.output"] == formats["stem.output"] == formats["add.output"] == "uint6"
    assert (
        formats["relu_narrow.output"] == "uint4"
    )  # what the branch multiplies; the sum reads more bits of it
    assert formats["branch.weight"] == "int4"
    assert formats["stem.weight"] == formats["head.weight"] == "int8"
    assert formats["input:x"] == formats["mean.output"] == formats["head.output"] == "uint8"
    mine = plan(Residual().eval(), x, ends="int8", rules=[{"match": "head", "weights": "int5"}], **options)
    assert mine.row("head.weight").scheme.format == "int5"  # the user's rule comes last


def test_the_same_seed_gives_the_same_bits_and_another_one_others(reconstructed: QuantizedModel) -> None:
    assert same(quantized(**FAST), reconstructed)
    assert not same(quantized(**FAST, seed=1), reconstructed)


def test_an_interrupted_reconstruction_goes_on_with_the_same_result(
    reconstructed: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, saves = tmp_path / "state", []
    save = progress_file.ProgressFile.save

    def interrupted(self: progress_file.ProgressFile, parts: progress_file.Parts) -> None:
        save(self, parts)
        saves.append(len(parts))
        if len(parts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress_file.ProgressFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(**FAST, resume=state)
    assert saves == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == ["state.blocks"]
    resumed = quantized(**FAST, resume=state)
    assert saves[3] == 4  # finished blocks are not learned again
    assert same(resumed, reconstructed) and not list(tmp_path.iterdir())


def test_an_interrupted_fine_tuning_goes_on_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"weights": "int3", "weight_symmetric": False, "finetune": 4}
    through, epochs = quantized(**options), []
    save = progress_file.ProgressFile.save

    def interrupted(self: progress_file.ProgressFile, parts: progress_file.Parts) -> None:
        save(self, parts)
        epochs.append(int(parts["finetune"]["epochs"]))
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress_file.ProgressFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(**options, resume=tmp_path / "state")
    with pytest.raises(CalibrationError, match="the state of another"):
        quantized(**options | {"finetune": 5}, resume=tmp_path / "state")
    resumed = quantized(**options, resume=tmp_path / "state")
    assert epochs == [1, 2, 3, 4] and same(resumed, through) and not list(tmp_path.iterdir())


def test_a_state_of_another_job_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = progress_file.ProgressFile(tmp_path / "s.blocks", [{"seed": 1}, torch.zeros(2)])
    file.save({"0": {"a:codes": torch.ones(3)}})
    assert torch.equal(file.load()["0"]["a:codes"], torch.ones(3))
    with pytest.raises(CalibrationError, match=r"s\.blocks: the state of another"):
        quantized(**FAST, resume=tmp_path / "s")
    (tmp_path / "s.blocks").write_bytes(b"no state")
    with pytest.raises(ArtifactError, match=r"s\.blocks: damaged state"):
        quantized(**FAST, resume=tmp_path / "s")


def test_the_file_computes_what_was_learned(reconstructed: QuantizedModel, tmp_path: Path) -> None:
    artifact = fewbit.export(reconstructed, tmp_path / "m.onnx")  # refused unless bit for bit
    from fewbit.deploy import runner

    found = runner(artifact.path)(TEST)
    expected = reconstructed(TEST).detach()
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.97


def test_weights_alone_are_reconstructed_without_any_activation_steps() -> None:
    options = {"weights": "int2", "activations": "float", "weight_symmetric": False, "weight_observer": "mse"}
    nearest = quantized(**options)
    learned = quantized(**options, rounding="brecq", iterations=60)
    assert noise(learned) < 0.7 * noise(nearest)


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ({"time": "10 min", "activations": "int4", "weights": "int4"}, "qdrop"),
        ({"time": "10 min", "activations": "int8", "weights": "int3"}, "qdrop"),
        ({"time": 600, "activations": "float", "weights": "int3"}, "brecq"),
        ({"time": "10 min", "activations": "int8", "weights": "int4"}, "gptq with 20 epochs"),
        ({"time": "0.01 s", "activations": "int8", "weights": "int3"}, "gptq, since 0 s"),
    ],
)
def test_the_best_rounding_for_the_time(options: dict[str, object], rounding: str) -> None:
    from fewbit.effort import strongest
    from fewbit.model.readers.torch import read

    given = dict(options)
    time = given.pop("time")
    recipe = fewbit.Recipe.from_kwargs(rounding="best", **given)
    found, note = strongest(recipe, read(NETWORK, (IMAGES[:4],)), (IMAGES[:4],), 512, time)
    assert found.rounding in rounding and note.startswith(f"rounding: {rounding}")


def test_best_without_data_and_end_to_end() -> None:
    q = fewbit.quantize(
        NETWORK, example=IMAGES[:2], weights="int4", activations="float", rounding="best", progress=False
    )
    assert "without data" in q.facts["notes"][0]
    q = quantized(weights="int4", rounding="best", time="1 s")
    assert q.facts["notes"][0].startswith("rounding: ")


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ("codebook2_shared", "gptq with 20 epochs"),
        ("nf4", "gptq with 0"),
        ("int8", "gptq with 0"),
        ("ternary", "brecq"),
    ],
)
def test_the_best_rounding_for_a_format(weights: str, found: str) -> None:
    q = quantized(weights=weights, activations="float", rounding="best", time="20 s")
    assert q.facts["notes"][0].startswith(f"rounding: {found}")


def test_eight_bits_have_nothing_to_fine_tune() -> None:
    assert any("nothing was fine-tuned" in note for note in quantized(finetune=1).facts["notes"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "best", "time": "soon"}, RecipeError, "time is 'soon', expected a positive time"),
        ({"rounding": "gptq", "time": "1 min"}, RecipeError, "which only rounding='best' keeps to"),
        ({"iterations": 0}, RecipeError, "iterations is 0, expected at least 1"),
        ({"finetune": -1}, RecipeError, "finetune is -1, expected at least 0"),
        ({"ends": "int99"}, RecipeError, "ends: "),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantized(**options)


def test_too_few_samples_are_said_so() -> None:
    with pytest.warns(UserWarning, match="learns 40 samples by heart: give at least 256"):
        quantized(IMAGES[:40], recipe="w4a4", iterations=2, finetune=0)
    with pytest.raises(CalibrationError, match="needs at least 2 calibration samples"):
        quantized(IMAGES[:1], recipe="w4a4", iterations=2, finetune=0)
    with pytest.raises(DataError, match="a generator can be read once"):
        quantized((x for x in IMAGES.split(64)), recipe="w4a4", iterations=2, finetune=0)
    with pytest.raises(CalibrationError, match="rounding 'brecq' needs calibration data"):
        fewbit.quantize(NETWORK, example=IMAGES[:2], weights="int4", activations="float", rounding="brecq")


def test_dead_channels_and_a_block_without_any_output_are_no_obstacle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight.zero_()
        model[2].bias.fill_(-1.0)  # the block gives zeros only
    for rounding in ("qdrop", "adaround", "gptq"):
        q = fewbit.quantize(
            model, IMAGES, recipe="w4a4", rounding=rounding, iterations=5, finetune=1, progress=False
        )
        assert bool(torch.isfinite(q(TEST)).all())
        torch.testing.assert_close(q(TEST), model(TEST), rtol=0, atol=0.05)
