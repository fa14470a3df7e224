"""fewbit.formats(): errors that are known from theory and tables, and the drawing."""

import xml.etree.ElementTree as ElementTree
from math import pi

import pytest
import torch

import fewbit
from fewbit.errors import ArtifactError, FormatError
from fewbit.numerics import QTensor, Scheme, format_names, get_format


@pytest.fixture(scope="module")
def table():
    return fewbit.formats()


@pytest.fixture(scope="module")
def rows(table):
    return {row.name: row for row in table}


def test_all_formats_are_listed(table, rows):
    assert [row.name for row in table] == format_names()
    lines = str(table).splitlines()
    assert lines[0].split() == ["format", "bits", "levels", "bits", "stored", "Gaussian", "Laplace"]
    assert len(lines) == 1 + len(table)
    assert (rows["mxfp4"].levels, rows["int4"].levels, rows["codebook3"].levels) == (15, 16, 8)


@pytest.mark.parametrize(
    ("name", "kind", "known"),
    [
        ("binary", "gaussian", 1 - 2 / pi),  # E|x| as scale
        ("binary", "laplace", 0.5),
        ("ternary", "gaussian", 0.1902),  # Max (1960), table I, 3 and 7 levels
        ("pow2_2", "gaussian", 0.1902),
        ("ternary", "laplace", 0.2642),  # Noll and Zelinski (1979)
        ("float8_e4m3", "gaussian", 7.0e-4),  # 2**-8 / 12 times E[2**(2 * exponent)] / E[x**2], about 0.55
    ],
)
def test_errors_are_the_known_ones(rows, name, kind, known):
    assert getattr(rows[name], kind) == pytest.approx(known, rel=0.02)


def test_each_bit_helps_and_codebooks_are_best(rows):
    for kind in ("gaussian", "laplace"):
        for family in ("int{}", "codebook{}", "apot_{}"):
            errors = [getattr(rows[family.format(bits)], kind) for bits in range(2, 9)]
            assert errors == sorted(errors, reverse=True)
        best = getattr(rows["codebook4"], kind)
        free = [row for row in rows.values() if row.bits == 4 and get_format(row.name).block is None]
        assert all(getattr(row, kind) >= 0.999 * best for row in free)


@pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "exp_3", "apot_5"])
def test_errors_are_those_of_a_real_tensor(rows, name):
    """Of a million random numbers, at the scale of the MSE observer or a plain grid of scales."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(name)
    bounds = torch.linspace(0.5, 6, 111)
    errors = [(QTensor.quantize(x, scheme, -b, b).dequantize() - x).square().mean() for b in bounds]
    assert min(map(float, errors)) / float(x.square().mean()) == pytest.approx(rows[name].gaussian, rel=0.02)


@pytest.mark.parametrize(
    "name", ["codebook4", "codebook3_shared", "mxfp4", "nvfp4", "int5", "binary", "float16"]
)
def test_stored_bits_are_those_of_a_tensor(rows, name):
    spec = get_format(name)
    scheme = Scheme(name, "group", group_size=spec.block) if spec.block else Scheme(name, "channel")
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    if spec.learned:
        tables = 1 if name.endswith("_shared") else 256
        q = QTensor.from_codes(
            torch.zeros(256, 1024),
            torch.ones(256),
            torch.zeros(256),
            scheme,
            torch.zeros(tables, 2**spec.bits),
        )
    else:
        q = QTensor.quantize(w, scheme)
    assert rows[name].stored_bits == pytest.approx(8 * q.nbytes / w.numel(), rel=1e-6)


def test_levels_are_drawn(table, tmp_path):
    path = table.plot(tmp_path / "levels.svg", ["ternary", "mxfp4", "codebook2", "uint4"])
    root = ElementTree.parse(path).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:4] == ["ternary", "mxfp4", "codebook2", "uint4"]
    strokes = [e for e in root.iter("{http://www.w3.org/2000/svg}line") if e.get("stroke") == "#d62728"]
    assert len(strokes) == 3 + 15 + 4 + 16
    assert table.plot(tmp_path / "all.svg").is_file()


def test_what_cannot_be_drawn_is_refused(table, tmp_path):
    with pytest.raises(FormatError, match="unknown format 'int44x'"):
        table.plot(tmp_path / "a.svg", ["int44x"])
    with pytest.raises(FormatError, match="'int16' has too many levels to draw"):
        table.plot(tmp_path / "a.svg", ["int16"])
    with pytest.raises(ArtifactError, match="svg"):
        table.plot(tmp_path / "a.png")
