"""The documents hold: examples run or bind, names are public, and one idea has one word."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import seer_compile
from seer_compile.types import SkipCode
from support.inputs import generator
from support.models import architecture, excused_where_inductor_cannot_decode, token_ids

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted(
    path
    for folder in ("seer_compile", "passes", "kernels", "calibration")
    for path in (ROOT / folder).rglob("*.py")
)
# Part of an identifier -> the word to use instead. Only words that mean one thing.
FORBIDDEN = {
    "naive": "reference",
    "vanilla": "dense",
    "golden": "reference",
    "predictor": "gate",
    "router": "gate",
    "lut": "selection",
    "cdf": "mass",
    "nz": "density",
    "bos": "sink",
    "sparsity": "density",
    "downsample": "pool",
    "compress": "pool",
    "compressed": "pool",
    "bsz": "batch",
    "seqlen": "q_len, k_len",
}
BANNED_PROSE = re.compile(
    r"\b(blazing|state-of-the-art|seamless\w*|effortless\w*|game.chang\w+|cutting.edge|leverag\w+)\b",
    re.IGNORECASE,
)


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """Return (line, code) of every fenced python block."""
    text = path.read_text()
    return [
        (text[: match.start()].count("\n") + 2, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [(path, line, code) for path in DOCUMENTS for line, code in python_blocks(path)]
every_block = pytest.mark.parametrize(
    ("path", "line", "code"), BLOCKS, ids=[f"{path.name}:{line}" for path, line, _ in BLOCKS]
)


def import_name(path: Path) -> str:
    """Return the name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "seer_compile" else ("seer_compile", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_readme_has_an_example():
    assert any(path.name == "README.md" for path, _, _ in BLOCKS)


@every_block
def test_example_calls_what_exists_with_arguments_that_bind(path, line, code):
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.startswith("seer_compile."):
            function = getattr(seer_compile, name.removeprefix("seer_compile."))
            has_stars = any(isinstance(item, ast.Starred) for item in node.args)
            keywords = {item.arg: None for item in node.keywords if item.arg}
            if not has_stars:
                inspect.signature(function).bind(*node.args, **keywords)


@pytest.mark.slow
def test_readme_example_runs(tmp_path, monkeypatch):
    """With few steps on short text: that it runs, in this order, is the claim."""
    monkeypatch.chdir(tmp_path)
    code = next(code for path, _, code in BLOCKS if path.name == "README.md")
    short = "density=0.1, config=seer_compile.CalibrationConfig(steps=3, holdout_batches=1)"
    assert "density=0.1" in code
    tokens = torch.randint(0, 100, (1, 192), generator=generator())
    names = {
        "name": str(ROOT / "examples" / "small_lm"),
        "tokens": tokens,
        "data": [tokens.roll(shift) for shift in range(5)],
    }
    with excused_where_inductor_cannot_decode():
        exec(compile(code.replace("density=0.1", short), "README.md", "exec"), names)
    assert names["output"].shape == (1, 192 + 20)
    assert (tmp_path / "gates.safetensors").stat().st_size > 0
    assert "<html" in (tmp_path / "report.html").read_text()
    seer_compile.restore(names["model"])


@pytest.mark.slow
@torch.no_grad()
def test_readme_ways_to_load_gates_run(tmp_path, monkeypatch):
    """On a Hugging Face model, as the model of the first example is one."""
    monkeypatch.chdir(tmp_path)
    code = next(code for _, _, code in BLOCKS if "torch.export.Dim" in code)
    model, tokens = architecture("llama"), token_ids(192)
    seer_compile.optimize(model, inner="eager")
    short = seer_compile.CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1)
    data = [token_ids(128, seed=seed) for seed in range(3)]
    seer_compile.calibrate(model, data, config=short, progress=False)
    seer_compile.save_gates(model, "gates.safetensors")
    seer_compile.restore(model)

    names = {"seer_compile": seer_compile, "torch": torch, "model": model, "tokens": tokens}
    exec(compile(code, "README.md", "exec"), names)
    program = names["program"]
    assert sum("gated_attention" in str(node.target) for node in program.graph.nodes) == 2
    seer_compile.set_budget(program, mass=1.0)
    longer = token_ids(300)
    got = program.module()(longer, use_cache=False).logits
    expected = seer_compile.restore(model)(longer, use_cache=False).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_readme_names_only_public_names():
    for path in DOCUMENTS:
        for name in re.findall(r"\bseer_compile\.([a-zA-Z_]\w*)\(", path.read_text()):
            assert name in seer_compile.__all__, f"{path.name}: seer_compile.{name}"


def test_api_page_lists_every_public_name_and_no_other():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^### `([A-Za-z_]\w*)", text, re.MULTILINE))
    assert listed == set(seer_compile.__all__)


def test_api_page_shows_the_parameters_of_every_function():
    text = (ROOT / "docs" / "api.md").read_text()
    for name, shown in re.findall(r"^### `(\w+)\((.*)\)`$", text, re.MULTILINE):
        parameters = inspect.signature(getattr(seer_compile, name)).parameters
        documented = re.findall(r"(?:^|, )\*{0,2}(\w+)", re.sub(r"=(\([^)]*\)|[^,]*)", "", shown))
        assert documented == list(parameters), name


@pytest.mark.parametrize("name", sorted(seer_compile.__all__))
def test_public_name_is_documented_where_it_is_defined(name):
    item = getattr(seer_compile, name)
    if inspect.isclass(item) or inspect.isfunction(item):
        assert inspect.getdoc(item), name
    if inspect.isfunction(item):
        hints = inspect.signature(item)
        assert hints.return_annotation is not inspect.Signature.empty, name
        for parameter in hints.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter})"


def test_docstring_examples_run():
    with_examples = [import_name(path) for path in SOURCES if ">>> " in path.read_text()]
    for module in with_examples:
        results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
        assert results.attempted > 0, module
        assert results.failed == 0, module


@pytest.mark.parametrize("path", SOURCES, ids=[import_name(path) for path in SOURCES])
def test_identifiers_keep_to_the_vocabulary(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.arg():
                names.add(node.arg)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                names.add(node.attr)
    for name in names:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
        for word in set(words) & FORBIDDEN.keys():
            pytest.fail(f"{name}: say {FORBIDDEN[word]!r}")
        is_tile = "tile" in words or "tiles" in words
        assert not is_tile or "kernels" in path.parts, f"{name}: a tile exists in kernels only"


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_document_claims_nothing_it_cannot_show(path):
    text = path.read_text()
    found = BANNED_PROSE.search(text)
    assert found is None, f"{path.name}: {found and found.group()}"
    assert not re.search(r"\bTODO\b|\bTBD\b|\bXXX\b", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_between_documents_resolve(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not re.match(r"\w+://", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_reason_to_stay_dense_is_documented_and_given_by_a_pass():
    text = (ROOT / "docs" / "sites.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", text, re.MULTILINE))
    assert rows == {code.name: code.value for code in SkipCode}
    passes = "".join(path.read_text() for path in (ROOT / "passes").glob("*.py"))
    for code in SkipCode:
        assert f"SkipCode.{code.name}" in passes, f"no pass gives the reason {code.name}"


def test_readme_shows_only_results_that_are_recorded():
    """A number in the results section comes with its command and a file of raw lines."""
    text = (ROOT / "README.md").read_text()
    results = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if results is None:
        return
    files = re.findall(r"benchmarks/results/[\w./-]+", results.group(1))
    assert files, "results without raw lines"
    assert all((ROOT / file).exists() for file in files)


def test_make_targets_are_the_steps_of_the_script():
    script = (ROOT / ".ci" / "task").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    steps = re.search(r"^    (setup \| .+?)\) setup", script, re.MULTILINE)
    assert targets is not None
    assert steps is not None
    assert targets.group(1).split() == steps.group(1).split(" | ")
    documented = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= documented <= set(targets.group(1).split())
