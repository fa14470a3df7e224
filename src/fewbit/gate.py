"""The export gate: the written file is run in its own runtime and compared with the reference, layer by layer."""

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import VerificationError
from fewbit.model.program import Op, Program
from fewbit.model.reference import Reference
from fewbit.numerics.scheme import Scheme
from fewbit.targets import Kernel, Target
from fewbit.targets._saturation import can_saturate

# Relative errors of the outputs that float operations may cause; each integer layer is exact all the same.
FLOAT_TOLERANCE = 1e-3
FEW_BITS_TOLERANCE = 2e-2  # ONNX Runtime's 4-bit matrix product rounds its float input to 8 bits by default
CODES_TOLERANCE = 5e-2  # a float's last place can decide a code, and one code of 256 shows in the output
# Of runtimes that may differ by a unit in each code and show none of them: the error's share of the outputs (RMS).
UNSEEN_TOLERANCE = 5e-2
# Of a runtime's faster kernels, beside those that agree exactly, as a share of the outputs' range (RMS): units of
# single layers add up to less, a wrong kernel to more.
FAST_TOLERANCE = 0.1


@dataclass(frozen=True)
class LayerCheck:
    """Codes of one operation: how many the runtime computed differently from the reference, given the same inputs."""

    layer: str
    kind: str
    differing: int
    total: int
    largest: int


@dataclass(frozen=True)
class FastKernels:
    """What the kernels that the runtime prefers answer, where those follow another rule than the reference's.

    ``codes_differing`` of ``codes`` differ in single layers, given the same inputs, by at most ``largest`` units. At
    the outputs, ``error`` is the root mean square, as a share of the range that their codes (or numbers) have.
    """

    codes_differing: int
    codes: int
    largest: int
    worst: str  # the layer where they differ most
    differing: int
    total: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.codes_differing} of {self.codes} codes differ in single layers, by at most {self.largest}"
            f"{f' ({self.worst})' if self.largest > 1 else ''}; "
            f"{self.differing} of {self.total} outputs differ, by {100 * self.error:.2g} % of their range (RMS)"
        )


@dataclass
class Verification:
    """What the gate found. ``str()`` is a table for people, ``to_json()`` the same for machines.

    ``whole_network``: "bit for bit" where every operation is integer; otherwise how the float parts were compared.
    ``output_differing`` of ``output_total`` numbers differ between the file's outputs and the reference's.
    """

    path: str
    runtime: str
    cpu: str
    samples: int
    layers: list[LayerCheck] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    whole_network: str = "bit for bit"
    output_differing: int = 0
    output_total: int = 0
    output_error: float = 0.0
    tolerance: int = 0
    float_tolerance: float = FLOAT_TOLERANCE
    fast: FastKernels | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether no integer differs by more than the target's tolerance (none, for a runtime with integer kernels)."""
        if any(c.largest > self.tolerance for c in self.layers):
            return False
        if self.tolerance and self.layers:
            return True  # differences of one unit add up on the way: only layers can be judged
        if self.whole_network == "bit for bit":
            return self.output_differing == 0
        return self.output_error <= self.float_tolerance

    def covered(self, kind: str) -> tuple[int, int]:
        """Operations of a kind in integer kernels, and all of that kind."""
        of_kind = [k for k in self.kernels if k.kind == kind]
        return sum(k.integer for k in of_kind), len(of_kind)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"exact": self.exact, "coverage": self.coverage_text()}

    def coverage_text(self) -> str:
        """Such as ``19/19 conv, 1/1 linear in integer kernels``."""
        kinds = dict.fromkeys(k.kind for k in self.kernels)
        if not kinds:
            return "no operation that could be integer"
        return (
            ", ".join(f"{self.covered(k)[0]}/{self.covered(k)[1]} {k}" for k in kinds) + " in integer kernels"
        )

    def short_coverage(self) -> str:
        """Such as ``20/20 integer``: operations that should be integer and are."""
        planned = [k for k in self.kernels if k.planned]
        return f"{sum(k.integer for k in planned)}/{len(planned)} integer" if planned else "float"

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.runtime} on {self.cpu}, {self.samples} samples",
            f"  integer layers: {len(self.layers)} compared with the reference on the runtime's own inputs, "
            f"{sum(c.differing for c in self.layers)} of {sum(c.total for c in self.layers)} codes differ",
            f"  whole network ({self.whole_network}): {self.output_differing} of {self.output_total} outputs differ"
            + (f", largest relative error {self.output_error:.2g}" if self.output_error else ""),
            f"  coverage: {self.coverage_text()}",
        ]
        if self.fast is not None:
            lines.insert(3, f"  with the runtime's fastest kernels: {self.fast}")
        lines += [f"    {k.layer} ({k.kind}): {k.cause}" for k in self.kernels if not k.integer]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def check_file(
    target: Target, path: Path, program: Program, codes: dict[str, str], inputs: tuple[Tensor, ...]
) -> Verification:
    """Run the file and compare it with ``program``: every integer operation on its own, then the whole network."""
    seen = target.probe(path, inputs, codes)
    outputs = target.open_exact(path)(*inputs)  # of the file as it is: a probed graph is fused differently
    reference = Reference(program, target.REQUANTIZATION)
    result = Verification(
        str(path),
        target.runtime(),
        cpu_name(),
        inputs[0].shape[0] if inputs[0].dim() else 1,
        tolerance=target.TOLERANCE,
    )
    given = dict(zip(program.inputs, inputs, strict=True))
    for op in program.ops:
        check = _check_op(op, program, reference, seen, given)
        if check is not None:
            result.layers.append(check)
    result.kernels = target.coverage(path, program, codes)
    _compare_outputs(result, program, reference, inputs, outputs)
    if target.open is not target.open_exact:
        fast_codes = target.fast_codes(program, seen)  # type: ignore[attr-defined]
        fast = target.open(path)(*inputs)
        result.fast = _fast_kernels(
            seen, fast_codes, outputs, fast, [_span(program, o) for o in program.output_names()]
        )
    return result


def _fast_kernels(
    seen: dict[str, Tensor],
    codes: dict[str, Tensor],
    exact: list[Tensor],
    fast: list[Tensor],
    spans: list[float],
) -> FastKernels:
    pairs = list(zip(exact, fast, strict=True))
    errors = [
        float((e.double() - f.double()).square().mean().sqrt()) / (span or float(e.abs().max()) or 1.0)
        for (e, f), span in zip(pairs, spans, strict=True)
    ]
    apart = {name: (codes[name] - seen[name].reshape(codes[name].shape)).abs() for name in codes}
    largest = {name: int(a.max()) for name, a in apart.items() if a.numel()}
    worst = max(largest, key=largest.__getitem__, default="")
    return FastKernels(
        sum(int((a > 0).sum()) for a in apart.values()),
        sum(a.numel() for a in apart.values()),
        largest.get(worst, 0),
        worst,
        sum(int((e != f).sum()) for e, f in pairs),
        sum(e.numel() for e, _ in pairs),
        max(errors),
    )


def _span(program: Program, name: str) -> float:
    """The range that an output's codes have; 0 for one that is computed in float."""
    op = next(o for o in program.ops if o.output == name)
    coding = program.codings.get(op.inputs[0]) if op.kind == "dequantize" else None
    return 0.0 if coding is None else float(coding.scheme.qmax - coding.scheme.qmin) * coding.scale


def _check_op(
    op: Op, program: Program, reference: Reference, seen: dict[str, Tensor], given: dict[str, Tensor]
) -> LayerCheck | None:
    if (op.domain not in ("integer", "shares") and op.kind != "quantize") or op.output not in seen:
        return None
    known = seen | given
    if any(name not in known for name in op.inputs):
        return None
    expected = reference.step(op, [known[name] for name in op.inputs])
    actual = seen[op.output].reshape(expected.shape)
    difference = (expected.to(torch.int64) - actual.to(torch.int64)).abs()
    return LayerCheck(
        op.node,
        op.kind,
        int((difference > 0).sum()),
        difference.numel(),
        int(difference.max()) if difference.numel() else 0,
    )


def _compare_outputs(
    result: Verification,
    program: Program,
    reference: Reference,
    inputs: tuple[Tensor, ...],
    actual: list[Tensor],
) -> None:
    floats = sorted({op.layer for op in program.ops if op.domain == "float"})
    if floats and not program.complete():
        result.whole_network = (
            f"not compared: float in {len(floats)} places, whose weights this file keeps to itself"
        )
        return
    values = reference.run(*inputs)
    expected = [values[name] for name in program.output_names()]
    unseen = bool(result.tolerance) and not result.layers
    if unseen:
        result.float_tolerance = UNSEEN_TOLERANCE
        result.whole_network = f"layers not visible in this runtime; RMS tolerance {UNSEEN_TOLERANCE:g}"
    elif result.tolerance:
        result.whole_network = f"up to {result.tolerance} unit a layer, which adds up on the way"
    elif floats:
        result.float_tolerance = _float_tolerance(program)
        result.whole_network = (
            f"float in {len(floats)} places, such as {floats[0]}; tolerance {result.float_tolerance:g}"
        )
    for e, a in zip(expected, actual, strict=True):
        a = a.reshape(e.shape)
        result.output_total += e.numel()
        result.output_differing += int((e != a).sum())
        if e.numel():
            result.output_error = max(result.output_error, _error(e.double(), a.double(), rms=unseen))


def _error(expected: Tensor, actual: Tensor, rms: bool) -> float:
    """The largest error relative to the largest number, or the error's root mean square relative to the numbers'."""
    difference = expected - actual
    if rms:
        return float(difference.norm()) / (float(expected.norm()) or 1.0)
    return float(difference.abs().max()) / (float(expected.abs().max()) or 1.0)


def _float_tolerance(program: Program) -> float:
    """How far float operations may move the outputs of this program."""
    if program.integer_ops() or any(op.kind.startswith("dynamic_") for op in program.ops):
        return CODES_TOLERANCE
    schemes = [s for op in program.ops for s in op.attrs.get("schemes", {}).values()]
    specs = [Scheme.from_json(s).spec for s in schemes]
    few = any(spec.integer and spec.bits <= 4 for spec in specs)
    return FEW_BITS_TOLERANCE if few else FLOAT_TOLERANCE


def refuse_if_wrong(result: Verification, program: Program, consequence: str = "") -> None:
    """Raise ``VerificationError`` that names the first layer that differs, with the likely cause."""
    wrong = next((c for c in result.layers if c.largest > result.tolerance), None)
    if wrong is not None:
        raise VerificationError(
            f"{result.path}: {wrong.layer} ({wrong.kind}) is the first layer that differs from the reference in "
            f"{result.runtime}: {wrong.differing} of {wrong.total} codes, by up to {wrong.largest}"
            f"{_cause(wrong, program)}{consequence}"
        )
    if not result.exact:
        raise VerificationError(
            f"{result.path}: every integer layer agrees, but {result.output_differing} of {result.output_total} "
            "outputs "
            f"differ from the reference (largest relative error {result.output_error:.2g}){consequence}"
        )
    if result.fast is not None and (result.fast.error > FAST_TOLERANCE or result.fast.largest > 1):
        raise VerificationError(
            f"{result.path}: the reference kernels agree, but with the kernels that {result.runtime} prefers "
            f"{result.fast}{consequence}"
        )
    broken = next((k for k in result.kernels if k.kind == "structure"), None)
    if broken is not None:
        raise VerificationError(
            f"{result.path}: {broken.layer} breaks the rules of explicit quantization: {broken.cause}"
            f"{consequence}"
        )
    planned = [k for k in result.kernels if k.planned]
    if planned and not any(k.integer for k in planned):
        raise VerificationError(
            f"{result.path}: no operation runs in an integer kernel of {result.runtime}, so this is no int8 file "
            f"(first: {planned[0].layer}, {planned[0].cause}){consequence}"
        )


def _cause(wrong: LayerCheck, program: Program) -> str:
    op = next(o for o in program.ops if o.node == wrong.layer)
    weight = op.constants.get("weight")
    if weight is not None and can_saturate(weight) and not has_vnni():
        return (
            ": this CPU has no VNNI and its kernels saturate sums of two products; quantize with portable=True, or "
            "verify on the CPU that the file is meant for"
        )
    return ""


def cpu_flags() -> set[str]:
    """The CPU's feature flags (Linux; empty elsewhere)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((x for x in text.splitlines() if x.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit pairs into 32 bits without saturating (true where it is no x86)."""
    flags = cpu_flags()
    return not flags or "avx512_vnni" in flags or "avx_vnni" in flags


def cpu_name() -> str:
    """Such as ``x86_64 with AVX2``: what decides which kernels run."""
    flags = cpu_flags()
    best = next((n for f, n in _FEATURES if f in flags), "")
    return platform.machine() + (f" with {best}" if best else "")


_FEATURES = (
    ("avx512_vnni", "AVX512-VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512f", "AVX512"),
    ("avx2", "AVX2"),
)
