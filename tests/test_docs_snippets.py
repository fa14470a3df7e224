"""Examples of the README and of docs/ run: python blocks in order in one namespace, and each `$ fewbit` line.

`<!-- not run: reason -->` above a block leaves it out. `<!-- needs data -->` runs it only with FEWBIT_DATA, and
`<!-- needs keras, ai_edge_litert -->` only where these packages are installed.
What a console block prints is not compared: figures differ from machine to machine.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if path.is_file()
]
FENCE = re.compile(
    r"(?P<marks>(?:^<!--.*?-->[ \t]*\n\s*)*)^```(?P<language>python|console)[ \t]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """One fenced block: ``line`` is where its code starts in the file, counted from 1."""

    language: str
    code: str
    line: int
    not_run: bool
    needs: tuple[str, ...]


def snippets(text: str) -> list[Snippet]:
    found = []
    for match in FENCE.finditer(text):
        marks = match["marks"]
        line = text.count("\n", 0, match.start("code")) + 1
        not_run = re.search(r"<!-- not run: (?!-->)\S", marks) is not None
        needs = tuple(re.findall(r"\w+", " ".join(re.findall(r"<!-- needs ([\w, ]+?) -->", marks))))
        found.append(Snippet(match["language"], match["code"], line, not_run, needs))
    return found


def commands(code: str) -> list[list[str]]:
    """The arguments of each ``$ fewbit ...`` line of a console block; a backslash continues a line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True)[1:] for line in lines if line.startswith("$ fewbit")]


def run_command(arguments: list[str], where: str) -> None:
    """A command in this process: a new one for each would spend most of its time on imports."""
    from fewbit.cli import main

    code: Any = 0
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["fewbit", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert not code, f"{where}: fewbit {shlex.join(arguments)} gave {code}\n{output.getvalue()}"


def is_there(need: str, has_data: bool) -> bool:
    return has_data if need == "data" else importlib.util.find_spec(need) is not None


def run_document(name: str, text: str, has_data: bool) -> int:
    """Run a document's snippets in the working directory; returns how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for snippet in snippets(text):
        if snippet.not_run or not all(is_there(need, has_data) for need in snippet.needs):
            continue
        ran += 1
        where = f"{name}:{snippet.line}"
        if snippet.language == "console":
            for arguments in commands(snippet.code):
                run_command(arguments, where)
            continue
        # Blank lines before the code make a traceback show the line of the document.
        exec(compile("\n" * (snippet.line - 1) + snippet.code, name, "exec"), namespace)
    return ran


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ.get("FEWBIT_DATA", ROOT.parent / "shared" / "data"))
    text = path.read_text(encoding="utf-8")
    if path.name == "README.md":
        assert [s for s in snippets(text) if s.language == "python"], "the README shows no Python"
        assert [s for s in snippets(text) if s.language == "console"], "the README shows no command"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEWBIT_DATA", str(data))
    run_document(str(path.relative_to(ROOT)), text, (data / "datasets.py").is_file())


def test_snippets_are_found_with_their_marks() -> None:
    text = (
        "a\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nx = 2\n```\n"
        "<!-- needs data, keras -->\n\n```console\n$ fewbit inspect \\\n   a.onnx  # a comment\n$ make demo\n```\n"
        "```toml\nx = 3\n```\n<!-- not run: -->\n```python\nx = 4\n```\n"
    )
    found = snippets(text)
    assert [(s.language, s.line, s.not_run, s.needs) for s in found] == [
        ("python", 3, False, ()),
        ("python", 8, True, ()),
        ("console", 13, False, ("data", "keras")),
        ("python", 22, False, ()),
    ]
    assert commands(found[2].code) == [["inspect", "a.onnx"]]


def test_a_failing_snippet_fails_and_names_its_line() -> None:
    text = "one\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as failure:
        run_document("page.md", text, has_data=False)
    assert (str(failure.traceback[-1].path), failure.traceback[-1].lineno + 1) == ("page.md", 8)


def test_what_needs_data_runs_only_with_data() -> None:
    text = "<!-- needs data -->\n```python\nraise ValueError('ran')\n```\n"
    assert run_document("page.md", text, has_data=False) == 0
    with pytest.raises(ValueError, match="ran"):
        run_document("page.md", text, has_data=True)


def test_what_needs_a_package_runs_only_with_it() -> None:
    text = "<!-- needs {} -->\n```python\nraise ValueError('ran')\n```\n"
    assert run_document("page.md", text.format("torch, no_such_package"), has_data=True) == 0
    with pytest.raises(ValueError, match="ran"):
        run_document("page.md", text.format("torch, numpy"), has_data=False)


def test_a_failing_command_fails_and_shows_what_it_said() -> None:
    text = "```console\n$ fewbit formats\n$ fewbit verify nothing.onnx\n```\n"
    with pytest.raises(
        AssertionError, match=r"page.md:2: fewbit verify nothing\.onnx gave 1\n +error: nothing\.onnx"
    ):
        run_document("page.md", text, has_data=False)
