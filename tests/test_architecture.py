"""The shape of the code: which way imports go, what loads late, what nobody may call, how long files are."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"

# A module may import modules of lower layers and of its own unit, never sideways. In "together" layers the
# units may also import each other.
LAYERS: list[set[str]] = [
    {"errors", "registry", "extras", "data", "progress", "tables", "charts"},
    {"numerics"},
    {"plan"},
    {"model"},
    {"passes", "observers", "rounding", "pruning", "training", "targets", "evaluation"},
    {"search"},
    {"pipeline"},  # and every other file directly under src/fewbit that has no layer of its own
    {"report"},
    {"demo"},
    {"cli"},
]
TOGETHER = [0, 6]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
LEVEL |= {path.stem: LEVEL["pipeline"] for path in SOURCE.glob("fewbit/[!_]*.py") if path.stem not in LEVEL}

# Folders in which a file is a plug-in, unless its name starts with an underscore: its neighbours share that.
PLUG_INS = [
    "numerics.formats", "numerics.coding", "passes", "observers", "rounding", "targets", "training.estimators",
    "training.losses", "pruning.criteria",
]  # fmt: skip

HEAVY = {
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "scipy",
    "torchmetrics",
    "rich",
    "typer",
    "matplotlib",
    "keras",
    "h5py",
    "ai_edge_litert",
    "openvino",
    "executorch",
}
# Units that may load heavy modules at once, because nothing loads them before they are needed.
LATE_UNITS = {"targets", "evaluation", "gate", "deploy", "report", "demo", "cli"}

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load"}


def module_name(path: Path) -> str:
    """``src/fewbit/plan/plan.py`` -> ``fewbit.plan.plan``; a package's ``__init__`` is the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(tree: ast.AST, top_level: bool = False) -> Iterator[str]:
    """Dotted names imported, ``from a import b`` as ``a.b``; ``top_level``: those that loading imports."""
    for node in ast.iter_child_nodes(tree):
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, top_level)


def unit(name: str) -> str:
    """``fewbit.plan.recipe`` -> ``plan``; empty for ``fewbit`` itself."""
    return (name.split(".") + [""])[1]


def wrong_way(module: str, tree: ast.AST) -> list[str]:
    """Imports of our own that go up or sideways."""
    if module == "fewbit":
        return []  # the public names; test_import_time checks that they load late
    here, found = unit(module), []
    for name in imports(tree):
        if name.split(".")[0] != "fewbit" or name == "fewbit.__version__":
            continue
        there = unit(name)
        if there not in LEVEL:
            found.append(
                f"{module} imports {name}: import from a layer, not from the package of public names"
            )
        elif here != there:
            lower = LEVEL[there] < LEVEL[here]
            together = LEVEL[there] == LEVEL[here] and LEVEL[here] in TOGETHER
            if not (lower or together):
                found.append(f"{module} imports {name}: '{here}' may not import '{there}'")
    return found


def sibling_plug_ins(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    """Imports of one plug-in by another of the same folder."""
    found = []
    for folder in (f"fewbit.{name}" for name in PLUG_INS):
        if not module.startswith(folder + "."):
            continue
        own = module.removeprefix(folder + ".").split(".")[0]
        for name in imports(tree):
            other = name.removeprefix(folder + ".").split(".")[0] if name.startswith(folder + ".") else own
            if other != own and not other.startswith("_") and f"{folder}.{other}" in known:
                found.append(f"{module} imports {name}: plug-ins of one folder do not know each other")
    return found


def unsafe(tree: ast.AST) -> list[str]:
    """Code that could run what a file says: pickle, eval, a shell, unguarded loads."""
    found = [f"imports {name}" for name in imports(tree) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"line {node.lineno}: {called}"
        if called in UNSAFE_CALLS | UNSAFE_METHODS:
            found.append(where)
        if keywords.get("shell", "False") != "False":
            found.append(f"{where} with shell")
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{where} without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{where} with allow_pickle")
    return found


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def loaded_by(start: str) -> set[str]:
    """Modules of ours that ``import start`` loads, as far as top-level imports tell."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        if not name or name in seen:
            continue
        seen.add(name)
        todo += imports(parsed(name), top_level=True)
        todo.append(name.rpartition(".")[0])
    return seen


def heavy_at_load(tree: ast.AST) -> list[str]:
    return sorted({name for name in imports(tree, top_level=True) if name.split(".")[0] in HEAVY})


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    assert module == "fewbit" or unit(module) in LEVEL, (
        f"give the new unit '{unit(module)}' a layer in LAYERS"
    )
    assert not wrong_way(module, parsed(module))


@pytest.mark.parametrize("module", FILES)
def test_plug_ins_do_not_know_each_other(module: str) -> None:
    assert not sibling_plug_ins(module, parsed(module), set(FILES))


@pytest.mark.parametrize("module", FILES)
def test_nothing_runs_what_a_file_says(module: str) -> None:
    assert not unsafe(parsed(module))


@pytest.mark.parametrize("module", FILES)
def test_heavy_modules_load_late(module: str) -> None:
    if module in loaded_by("fewbit") | loaded_by("fewbit.pipeline") or unit(module) not in LATE_UNITS:
        assert not heavy_at_load(parsed(module)), "import it inside the function that needs it"


@pytest.mark.parametrize("module", FILES)
def test_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(parsed(module)), f"{FILES[module].relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize(
    "path",
    [p for folder in ("src", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < 400, f"{path.relative_to(ROOT)} has {lines} lines: split it"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fewbit.numerics.scheme", "from fewbit.plan import Plan"),
        ("fewbit.numerics.scheme", "import fewbit.model.graph"),
        ("fewbit.observers.minmax", "from fewbit.rounding import nearest"),
        ("fewbit.model.graph", "def f():\n    from fewbit.pipeline import quantize"),
        ("fewbit.plan.plan", "from fewbit import Scheme"),
        ("fewbit.report.table", "import fewbit.cli"),
    ],
)
def test_wrong_way_is_seen(module: str, source: str) -> None:
    assert wrong_way(module, ast.parse(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fewbit.plan.plan", "from fewbit.numerics.scheme import Scheme"),
        ("fewbit.observers.mse", "from fewbit.observers import base\nfrom fewbit.numerics import scheme"),
        ("fewbit.calibrate", "from fewbit.pipeline import quantize\nimport torch"),
    ],
)
def test_right_way_is_allowed(module: str, source: str) -> None:
    assert not wrong_way(module, ast.parse(source))


def test_sibling_plug_in_is_seen() -> None:
    known = {"fewbit.observers.mse", "fewbit.observers.minmax", "fewbit.observers._range"}
    tree = ast.parse(
        "from fewbit.observers.minmax import Observer\nfrom fewbit.observers._range import widen"
    )
    assert len(sibling_plug_ins("fewbit.observers.mse", tree, known)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
    ],
)
def test_unsafe_is_seen(source: str) -> None:
    assert unsafe(ast.parse(source))


def test_harmless_is_allowed() -> None:
    source = "model.eval()\nsubprocess.run(['ls'])\ntorch.load('a', weights_only=True)\nre.compile('a')"
    assert not unsafe(ast.parse(source))


def test_heavy_is_seen_at_load_and_not_in_a_function() -> None:
    assert heavy_at_load(ast.parse("try:\n    import onnx\nexcept ImportError:\n    onnx = None"))
    assert heavy_at_load(ast.parse("from rich.table import Table"))
    assert not heavy_at_load(ast.parse("def f():\n    import onnx"))
    assert not heavy_at_load(ast.parse("if TYPE_CHECKING:\n    import onnx"))
