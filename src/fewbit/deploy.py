"""Writes a model for a runtime, and keeps the file only if the runtime computes what was evaluated."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.errors import ArtifactError, FewbitError, ModelError, TargetError
from fewbit.evaluation.latency import Latency, latency, ratio
from fewbit.gate import Verification, check_file, refuse_if_wrong
from fewbit.model.lowering import lower
from fewbit.model.program import Op, Program
from fewbit.model.readers import as_module
from fewbit.model.readers.torch import read
from fewbit.model.simulate import QuantizedModel, without_quantizers
from fewbit.plan import Plan
from fewbit.targets import Target, get_target, refuse_tables
from fewbit.targets import registry as targets
from fewbit.training.model import TrainableModel

if TYPE_CHECKING:
    from fewbit.fleet import Fleet

_SAMPLES = 16
_LARGEST_INPUT = 2**28  # numbers: more than that is no model's input, but a file's lie


@dataclass
class Artifact:
    """A file that was written. ``verification`` is None where the user asked for none."""

    path: Path
    target: str
    size: int
    verification: Verification | None = None
    latency: dict[str, Latency] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "target": self.target,
            "size": self.size,
            "verification": self.verification.to_json() if self.verification else None,
            "latency": {name: value.to_json() for name, value in self.latency.items()},
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.target}, {self.size:,} bytes"]
        lines.append(str(self.verification) if self.verification else "  not verified (on request)")
        lines += [f"  latency {name}: {value}" for name, value in self.latency.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@overload
def export(
    model: Any, path: str | Path, *, target: str | None = None, targets: None = None,
    example: Tensor | tuple[Tensor, ...] | None = None, verify: bool = True, time: bool = True, io: str = "float32",
) -> Artifact: ...  # fmt: skip
@overload
def export(
    model: Any, path: str | Path, *, targets: Sequence[str], test: object = None, verify: bool = True,
    time: bool = True,
) -> "Fleet": ...  # fmt: skip
def export(
    model: Any,
    path: str | Path,
    *,
    target: str | None = None,
    targets: Sequence[str] | None = None,
    test: object = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    verify: bool = True,
    time: bool = True,
    io: str = "float32",
) -> "Artifact | Fleet":
    """Write ``model`` to ``path``; the target follows from the suffix unless named.

    The file is run in its runtime on ``example`` (by default the inputs the model was read with) and compared with the
    reference; a file that differs, or that runs no integer kernel, is not kept. ``verify=False`` skips that, and the
    file says so. ``time=False`` skips comparing its latency with float. A float ``nn.Module`` (with ``example``) or
    Keras model is written in float; a trainable model is converted first. ``io``: how the file itself takes its inputs
    and gives its outputs, for targets that can choose: "float32", or codes as "int8" or "uint8".

    With ``targets``, a list of names, ``path`` is a folder that gets a file for each; ``test``, labelled data, is then
    run in each runtime. The ``Fleet`` that comes back prints as one table.

    Raises ``TargetError``, ``VerificationError``, or ``ArtifactError`` where the file cannot be written.
    """
    if targets is not None:
        from fewbit.fleet import export_all

        return export_all(_as_quantized(model, example), path, targets, test=test, verify=verify, time=time)
    path = Path(path)
    quantized = _as_quantized(model, example)
    key = target or _chosen_target(quantized, path)
    runtime = get_target(key)
    if io not in getattr(runtime, "IO", ("float32",)):
        raise TargetError(f"{path}: target {key!r} cannot hand over {io!r}; leave io='float32'")
    inputs = (example,) if isinstance(example, Tensor) else example or quantized.example
    inputs = tuple(x[:_SAMPLES] for x in inputs)
    lowered = lower(quantized)
    refuse_tables(lowered, runtime, key)
    program = dataclasses.replace(runtime.prepare(lowered), io=io)
    metadata = _metadata(quantized, key, verify)
    with _Staging(path) as staged:
        runtime.write(program, staged.file, metadata)
        artifact = Artifact(path, key, staged.size())
        if verify:
            codes = runtime.describe(staged.file).codes
            fitting = fitting_inputs(program, inputs)
            artifact.verification = check_file(runtime, staged.file, program, codes, fitting)
            artifact.verification.path = str(path)
            refuse_if_wrong(artifact.verification, program, "; the file was not kept")
            if time and quantized.integer:
                artifact.latency, notes = _time(runtime, quantized, staged.file, inputs)
                artifact.notes += notes
        staged.keep()
    return artifact


def verify(
    path: str | Path,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    model: QuantizedModel | None = None,
) -> Verification:
    """Run an exported file in its own runtime again and compare it with the integer program that it carries.

    ``inputs``: by default random ones that cover the file's input range. ``model``: the quantized model that the file
    was exported from, to be compared instead; formats that carry no program (``.pte``, ``.xml``) need it. Raises
    ``ArtifactError`` for a damaged file and ``VerificationError`` where it differs.
    """
    path = Path(path)
    described = get_target(target_of(path)).describe(path)
    facts = _facts(path, described.properties)
    runtime = get_target(str(facts.get("target", target_of(path))))
    program = described.program if model is None else runtime.prepare(lower(model))
    if program is None:
        raise ArtifactError(
            f"{path}: a {path.suffix} file carries no integer program to compare with: give the quantized model that "
            "it was exported from, verify(path, model=quantized), or --model and its saved folder"
        )
    try:
        given = (inputs,) if isinstance(inputs, Tensor) else inputs or random_inputs(program)
        result = check_file(runtime, path, program, described.codes, fitting_inputs(program, given))
    except FewbitError as error:
        raise type(error)(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except Exception as error:  # the program comes from the file: whatever it breaks is the file's fault
        raise ArtifactError(
            f"{path}: its program does not fit its graph ({type(error).__name__}: {error!s:.200})"
        ) from error
    if facts.get("verified") is False:
        result.notes.append("this file was exported with verify=False")
    refuse_if_wrong(result, program)
    return result


def describe(path: str | Path) -> dict[str, Any]:
    """What is inside a file that fewbit exported, as JSON types: its operations, their formats and their kernels."""
    path = Path(path)
    runtime = get_target(target_of(path))
    described = runtime.describe(path)
    program = described.program
    facts = _facts(path, described.properties)
    if program is None:
        return {"path": str(path), "bytes": path.stat().st_size, "facts": facts, "operations": []}
    kernels = {k.layer: k for k in runtime.coverage(path, program, described.codes)}
    rows = []
    for op in program.ops:
        coding = program.codings.get(op.output)
        kernel = kernels.get(op.layer)
        how = op.domain if kernel is None or kernel.integer else f"{op.domain}: {kernel.cause}"
        rows.append(
            {
                "layer": op.layer,
                "kind": op.attrs["type"] if op.kind == "module" else op.kind,
                "weights": _weights(op),
                "output": "float" if coding is None else f"{coding.scheme.format}, scale {coding.scale:.4g}",
                "computes": how,
            }
        )
    return {"path": str(path), "bytes": path.stat().st_size, "facts": facts, "operations": rows}


def _weights(op: Op) -> str:
    """An operation's weights in a few words, as far as the file says."""
    stored, shapes = op.attrs.get("schemes"), op.attrs.get("shapes")
    if isinstance(stored, dict) and isinstance(shapes, dict) and isinstance(stored.get("weight"), dict):
        return f"{stored['weight'].get('format')!s:.40} {tuple(shapes.get('weight', ()))!s:.80}"
    if op.domain != "integer" or "weight" not in op.constants:
        return ""
    powers = ", zero or powers of two" if op.attrs.get("shifts") else ""
    return f"{tuple(op.constants['weight'].shape)}{powers}"


def runner(path: str | Path) -> Callable[..., Tensor]:
    """A function from input tensors to the first output of an artifact, run in its own runtime on one thread."""
    path = Path(path)
    opened = get_target(target_of(path)).open(path)
    return lambda *inputs: opened(*inputs)[0]


def _facts(path: Path, properties: dict[str, str]) -> dict[str, Any]:
    """What export said of the file: version, target, recipe, verified."""
    try:
        facts = json.loads(properties.get("fewbit", "{}"))
    except ValueError as error:
        raise ArtifactError(f"{path}: its property 'fewbit' is damaged ({error})") from error
    return facts if isinstance(facts, dict) else {}


def target_of(path: Path) -> str:
    """The target that a file is for, by its suffix. Raises ``TargetError`` for an unknown one."""
    known = {get_target(name).SUFFIX: name for name in reversed(targets.names())}  # onnx before tensorrt
    key = known.get(path.suffix)
    if key is None:
        raise TargetError(
            f"{path}: no target has the suffix {path.suffix!r}; expected one of {', '.join(sorted(known))}"
        )
    return key


def _chosen_target(model: QuantizedModel, path: Path) -> str:
    """The target that the model was quantized for, where it writes files of this suffix too."""
    key = target_of(path)
    return "tensorrt" if key == "onnx" and model.target == "tensorrt" else key


def fitting_inputs(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As many of the samples as the program takes at once."""
    fixed = next((shape[0] for shape in program.input_shapes if shape and shape[0] is not None), None)
    return inputs if fixed is None else tuple(x[:fixed] for x in inputs)


def random_inputs(program: Program, samples: int = 8) -> tuple[Tensor, ...]:
    """Inputs that cover the codes of every input of a program (seeded); token inputs stay below the smallest table.

    Free sizes are those of the model's example, which every runtime takes, or else 16.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    examples = program.example_shapes or [(16,) * len(shape) for shape in program.input_shapes]
    for name, shape, dtype, example in zip(
        program.inputs, program.input_shapes, program.input_dtypes, examples, strict=True
    ):
        sizes = [(samples if i == 0 else example[i]) if s is None else s for i, s in enumerate(shape)]
        if prod(sizes) > _LARGEST_INPUT:
            raise ArtifactError(
                f"input {name!r} has {prod(sizes):,} numbers for {samples} samples; give inputs of your own"
            )
        if not dtype.startswith("float"):
            found.append(torch.zeros(sizes, dtype=getattr(torch, dtype)))
            continue
        coding = next(
            (
                program.codings[op.output]
                for op in program.ops
                if op.inputs == [name] and op.kind == "quantize"
            ),
            None,
        )
        lo, hi = (-1.0, 1.0)
        if coding is not None:
            lo, hi = (
                (q - coding.zero_point) * coding.scale for q in (coding.scheme.qmin, coding.scheme.qmax)
            )
        found.append(torch.rand(sizes, generator=generator) * (hi - lo) + lo)
    return tuple(found)


def _as_quantized(model: Any, example: Any) -> QuantizedModel:
    if isinstance(model, TrainableModel):
        return model.convert()
    if isinstance(model, QuantizedModel):
        return model
    module = as_module(model, example)
    if example is None and isinstance(module, GraphModule):
        example = module.meta.get("example")
    if example is None:
        raise ModelError("a float model is exported with an example input: export(model, path, example=x)")
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    return QuantizedModel(read(module, inputs).eval(), Plan(()), {}, frozenset(), inputs)


def _metadata(model: QuantizedModel, target: str, verified: bool) -> dict[str, str]:
    from fewbit import __version__

    facts = {"version": __version__, "target": target, "recipe": model.plan.recipe, "verified": verified}
    return {"fewbit": json.dumps(facts)}


def _time(
    runtime: Target, model: QuantizedModel, path: Path, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, Latency], list[str]]:
    """The file and its float twin in the same runtime, one sample at a time, in turn; and what there is to note."""
    one, notes = tuple(x[:1] for x in inputs), []
    with tempfile.TemporaryDirectory() as folder:
        floating = Path(folder) / f"float{runtime.SUFFIX}"
        runs = {"quantized": partial(runtime.open(path), *one)}
        try:
            runtime.write(runtime.prepare(lower(without_quantizers(model))), floating, {})
            runs = {"float": partial(runtime.open(floating), *one)} | runs
        except TargetError as error:
            notes.append(f"not compared with float, which cannot be written: {str(error).splitlines()[0]}")
        times = latency(runs, repeat=15, seconds=3.0)
    return times, notes + _slower(times)


def _slower(times: dict[str, Latency]) -> list[str]:
    if "float" not in times:
        return []
    r = ratio(times["quantized"], times["float"])
    if r.median <= 1:
        return []
    return [
        f"quantized is not faster than float here ({r}): small tensors, float layers in between, or a CPU "
        "without VNNI"
    ]


class _Staging:
    """A folder beside ``path`` for the files that a target writes; gone afterwards, whatever happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(f".{path.name}.{os.getpid()}.part")
        self.file = self.folder / path.name

    def size(self) -> int:
        """Bytes of everything written."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def keep(self) -> None:
        """Move everything into place, the file that was asked for last."""
        for file in sorted(self.folder.iterdir(), key=lambda f: f == self.file):
            file.replace(self.path.with_name(file.name))

    def __enter__(self) -> "_Staging":
        if not self.path.parent.is_dir():
            raise ArtifactError(f"{self.path}: the folder {self.path.parent} does not exist; create it first")
        try:
            self.folder.mkdir()
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ArtifactError(f"{self.path}: cannot be written ({error.strerror or error})") from error
