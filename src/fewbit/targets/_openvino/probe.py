"""What an IR file carries (the program, and where its constants lie), and what OpenVINO makes of it."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import ArtifactError
from fewbit.model.program import Op, Program
from fewbit.targets import Described, Kernel
from fewbit.targets._onnx.probe import DAMAGE, INTEGER_KERNELS, add_tables, packed, unpacked
from fewbit.targets._openvino.runtime import compiled, infer, read
from fewbit.targets._openvino.writer import IrWriter

_NARROW = ("i4", "u4")
_CAUSES = {
    "matmul": "OpenVINO multiplies two activations in float32; exact all the same",
    "softmax": "computed in float32",
}


# ---- what the file carries ------------------------------------------------------------------------------------------


def embed(model: Any, writer: IrWriter, metadata: dict[str, str]) -> None:
    """Put the program and ``metadata`` into the model's own properties (``rt_info``)."""
    program = writer.program
    tensors = {key: t for key, t in program.tensors().items() if key in writer.constants}
    by_content = {_content(a): name for name, a in _constants(model).items()}
    places: dict[str, Any] = {}
    for key, tensor in tensors.items():
        array = tensor.detach().cpu().numpy()
        name = by_content.get(_content(array))
        places[key] = {"dtype": array.dtype.str, "shape": list(array.shape)}
        places[key] |= {"name": name} if name else {"data": base64.b64encode(array.tobytes()).decode()}
    data = program.to_json()
    for op in data["ops"]:
        op["constants"] = [role for role in op["constants"] if f"{op['output']}.{role}" in tensors]
    description = {
        "program": data,
        "constants": places,
        "codes": _visible(model, writer),
        "nodes": writer.nodes,
    }
    model.set_rt_info(packed(description), ["fewbit", "program"])
    model.set_rt_info(json.dumps(metadata), ["fewbit", "properties"])


def _visible(model: Any, writer: IrWriter) -> dict[str, str]:
    """By value, the tensor of the model that holds its codes, or the floats that these stand for."""
    present = {name for node in model.get_ordered_ops() for out in node.outputs() for name in out.get_names()}
    program, found = writer.program, {}
    returned: dict[str, str] = {}
    for value, output in zip(program.output_names(), model.outputs, strict=True):
        returned |= {op.inputs[0]: output.any_name for op in program.ops if op.output == value and op.inputs}
    for value, coding in program.codings.items():
        codes = writer.names.get(value)
        view = writer.views.get((str(codes), coding.scale, coding.zero_point))
        for name in (returned.get(value), codes, view):  # a file keeps no other name of an output
            if isinstance(name, str) and name in present:
                found[value] = name
                break
    return found


def _constants(model: Any) -> dict[str, np.ndarray]:
    """The constants of a model by their friendly names; 4-bit numbers as int8."""
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            narrow = node.get_element_type().get_type_name() in _NARROW
            data = node.get_data(dtype=np.int32).astype(np.int8) if narrow else node.data
            found[node.get_friendly_name()] = data
    return found


def _content(array: np.ndarray) -> tuple[str, bytes]:
    return array.dtype.str, array.tobytes()


def describe(path: Path) -> Described:
    """The program of a file that fewbit wrote, its constants taken from the file's own weights."""
    model = read(path)
    data, properties = _embedded(model, path)
    try:
        constants = _constants(model)
        tensors = {key: _tensor(place, constants) for key, place in data["constants"].items()}
        program = Program.from_json(data["program"], tensors)
        add_tables(program)
        codes = {str(k): str(v) for k, v in data["codes"].items()}
    except DAMAGE as error:
        raise ArtifactError(f"{path}: its program is damaged ({type(error).__name__}: {error})") from error
    return Described(program, codes, properties)


def _embedded(model: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not model.has_rt_info(["fewbit", "program"]):
        raise ArtifactError(
            f"{path}: an OpenVINO file without fewbit's program; only files that fewbit exported can be verified"
        )
    try:
        data = unpacked(str(model.get_rt_info(["fewbit", "program"]).value))
        properties = json.loads(str(model.get_rt_info(["fewbit", "properties"]).value))
        return data, {str(k): str(v) for k, v in properties.items()}
    except DAMAGE as error:
        raise ArtifactError(f"{path}: its program is damaged ({type(error).__name__}: {error})") from error


def _tensor(place: dict[str, Any], constants: dict[str, np.ndarray]) -> Tensor:
    dtype = np.dtype(place["dtype"])
    if "data" in place:
        array = np.frombuffer(base64.b64decode(place["data"]), dtype)
    else:
        array = constants[place["name"]]
        if array.dtype != dtype:
            raise ValueError(f"{place['name']} is {array.dtype}, expected {dtype}")
    return torch.from_numpy(array.reshape(place["shape"]).copy())


# ---- what the runtime makes of it -----------------------------------------------------------------------------------


def probe(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
    """The codes (int32) of every value in ``codes``, from a model that gives them all as outputs.

    Its shapes stay free, as in the file: other kernels compute that, so between this and ``open`` both are seen.
    """
    model = read(path)
    program = describe(path).program
    ports = {n: out for node in model.get_ordered_ops() for out in node.outputs() for n in out.get_names()}
    codings = {} if program is None else program.codings
    wanted = {v: n for v, n in codes.items() if n in ports and v in codings}
    model.add_outputs([ports[name] for name in dict.fromkeys(wanted.values())])
    places = {name: i for i, out in enumerate(model.outputs) for name in out.get_names()}
    results = infer(compiled(model, path), inputs, path)
    found = {}
    for value, name in wanted.items():
        result = results[places[name]]
        if result.dtype.kind == "f":
            coding = codings[value]
            result = np.rint(result.astype(np.float64) / coding.scale) + coding.zero_point
        found[value] = torch.from_numpy(result.astype(np.int32))
    return found


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Which operations run in integer kernels, read from the graph that OpenVINO executes."""
    model = read(path)
    nodes = _embedded(model, path)[0].get("nodes", {})
    executed: dict[str, str] = {}
    for node in compiled(model, path).get_runtime_model().get_ordered_ops():
        info = {
            k: node.get_rt_info()[k].astype(str)
            for k in ("primitiveType", "layerType", "originalLayersNames")
        }
        for name in info["originalLayersNames"].split(","):
            executed[name] = f"{info['layerType']} {info['primitiveType']}"
    return [k for op in program.ops if (k := _kernel(op, nodes.get(op.output, ""), executed)) is not None]


def _kernel(op: Op, node: str, executed: dict[str, str]) -> Kernel | None:
    if op.kind == "table":
        function = op.attrs["function"]["target"].split(".")[1]
        return Kernel(op.layer, function, False, "no integer kernel; exact all the same", planned=False)
    if op.kind.startswith("dynamic_"):
        cause = "OpenVINO keeps its weights as integers, and does not show how it multiplies"
        return Kernel(op.layer, op.kind, False, cause, planned=False)
    if op.kind == "module" and op.attrs["type"].startswith(("Conv", "Linear", "LSTM", "GRU")):
        return Kernel(op.layer, op.attrs["type"], False, op.note or "planned as float", planned=False)
    if op.domain != "integer" or op.kind not in INTEGER_KERNELS:
        return None
    how = next((h for n, h in executed.items() if n == node or n.startswith(f"{node}/")), None)
    if how is not None and how.lower().endswith(("_i8", "_u8")):
        return Kernel(op.layer, op.kind, True)
    found = f"OpenVINO runs it as {how}" if how else "the graph that OpenVINO executes does not name it"
    return Kernel(op.layer, op.kind, False, _CAUSES.get(op.kind, found))
