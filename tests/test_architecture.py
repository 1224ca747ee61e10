"""The rules that hold the package together, read off the sources without importing them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "seer_compile": ROOT / "seer_compile",
    "seer_compile.passes": ROOT / "passes",
    "seer_compile.kernels": ROOT / "kernels",
    "seer_compile.calibration": ROOT / "calibration",
}


def read_layers() -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return layer -> layers it may import, and file stem -> layer, from ARCHITECTURE.md."""
    may_import, layer_of_stem = {}, {}
    rows = re.findall(
        r"^\| (\w+) \| (.+?) \| (.+?) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE
    )
    layers = [row[0] for row in rows if row[0] != "layer"]
    for layer, where, allowed in rows[1:]:
        may_import[layer] = set(layers if allowed == "everything" else allowed.split(", "))
        stems = re.search(r"\{(.+)\}", where)
        for stem in stems.group(1).split(",") if stems else ():
            layer_of_stem[stem] = layer
    return may_import, layer_of_stem


MAY_IMPORT, LAYER_OF_STEM = read_layers()
LAZY_LIBRARIES = {"triton", "transformers", "matplotlib", "huggingface_hub", "tokenizers"}
FILE_LINES, PASS_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 250, 60, 130
FORBIDDEN_CALLS = {
    "print",
    "eval",
    "exec",
    "__import__",
    "compile",
    "breakpoint",
    "torch.load",
    "torch.save",
    "yaml.load",
    "os.system",
    "torch.manual_seed",
    "torch.set_default_dtype",
    "torch.set_default_device",
    "torch.set_float32_matmul_precision",
    "torch.use_deterministic_algorithms",
    "np.random.seed",
    "random.seed",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def package_files() -> dict[str, Path]:
    """Return import name -> file for every module of the package, links not followed."""
    files = {}
    own = sorted((ROOT / "seer_compile").glob("*.py"))
    for path in own:
        files[f"seer_compile.{path.stem}" if path.stem != "__init__" else "seer_compile"] = path
    for package, folder in list(FOLDERS.items())[1:]:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((package, *parts))] = path
    return files


FILES = package_files()
TREES = {name: ast.parse(path.read_text(), filename=str(path)) for name, path in FILES.items()}
every_module = pytest.mark.parametrize("module", sorted(FILES))


def layer_of(module: str) -> str:
    """Return the layer of an import name of ours."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in ("passes", "kernels", "calibration"):
        return parts[1]
    if len(parts) > 1 and parts[1] in LAYER_OF_STEM:
        return LAYER_OF_STEM[parts[1]]
    return "facade"


def imports_of(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """Return (absolute module or module.name, statement) for every import anywhere in a file."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def module_imported(name: str) -> str:
    """Return the module of ours that ``name`` (module, or module.attribute) loads."""
    if name in FILES or name in FOLDERS or name == "seer_compile.kernels.triton":
        return name
    return name.rpartition(".")[0]


def is_module_level(tree: ast.Module, statement: ast.stmt) -> bool:
    """Whether a statement runs on import: not in a function, not under TYPE_CHECKING."""
    for node in ast.walk(tree):
        is_lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if is_lazy and any(child is statement for child in ast.walk(node)):
            return False
    return True


def call_name(node: ast.Call) -> str:
    """Return ``a.b`` for a call of ``a.b(...)``, else an empty string."""
    try:
        return ast.unparse(node.func)
    except ValueError:  # pragma: no cover
        return ""


def test_table_of_layers_is_the_one_intended():
    assert set(MAY_IMPORT) == {"core", "kernels", "gate", "passes", "calibration", "facade"}
    assert "calibration" not in MAY_IMPORT["passes"]
    assert "passes" not in MAY_IMPORT["calibration"]
    assert MAY_IMPORT["kernels"] == {"core", "kernels"}
    for stem in LAYER_OF_STEM:
        assert (ROOT / "seer_compile" / f"{stem}.py").exists(), f"{stem} is listed and is no file"


def test_scan_finds_every_layer():
    layers = {layer_of(name) for name in FILES}
    assert layers == set(MAY_IMPORT), "a layer has no file: the other tests would prove nothing"


@every_module
def test_imports_point_down_only(module):
    allowed = MAY_IMPORT[layer_of(module)]
    for name, statement in imports_of(TREES[module]):
        if name.split(".")[0] == "seer_compile":
            target = module_imported(name)
            assert layer_of(target) in allowed, f"{module}:{statement.lineno} imports {target}"


@every_module
def test_package_imports_its_own_modules_in_full(module):
    for name, statement in imports_of(TREES[module]):
        head = name.split(".")[0]
        assert head not in ("passes", "kernels", "calibration"), f"line {statement.lineno}: {name}"
        is_public_name = head == "seer_compile" and module_imported(name) == "seer_compile"
        assert not is_public_name, f"line {statement.lineno}: import its module, not {name}"


@every_module
def test_heavy_libraries_are_imported_inside_functions(module):
    tree = TREES[module]
    allowed = {"triton"} if module.startswith("seer_compile.kernels.triton.") else set()
    for name, statement in imports_of(tree):
        library = name.split(".")[0]
        if library in LAZY_LIBRARIES - allowed:
            assert not is_module_level(tree, statement), f"line {statement.lineno}: {name}"


def test_reference_imports_core_only():
    for name, statement in imports_of(TREES["seer_compile.kernels.reference"]):
        if name.startswith("seer_compile"):
            assert layer_of(module_imported(name)) == "core", f"line {statement.lineno}: {name}"


def test_every_launch_goes_through_one_function():
    # A recorded call repeats the launches that were seen there: others would be missed.
    for module in (name for name in FILES if name.startswith("seer_compile.kernels.triton.")):
        if module.endswith(".launching"):
            continue
        for node in ast.walk(TREES[module]):
            where = f"{module}:{getattr(node, 'lineno', 0)} {ast.unparse(node)[:80]}"
            if isinstance(node, ast.Call):
                # A kernel with its grid, called.
                assert not isinstance(node.func, ast.Subscript), where
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"run", "warmup", "preload"}, where
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
                # started = kernel[grid], to be called later: a grid is a tuple with a comma.
                grid = node.value.slice
                assert not (isinstance(grid, ast.Tuple) and len(grid.elts) == 1), where


def test_triton_kernels_import_core_and_siblings_only():
    kernels = [name for name in FILES if name.startswith("seer_compile.kernels.triton.")]
    assert kernels
    for module in kernels:
        for name, statement in imports_of(TREES[module]):
            if name.startswith("seer_compile"):
                target = module_imported(name)
                is_sibling = target.startswith("seer_compile.kernels.triton")
                assert is_sibling or layer_of(target) == "core", f"{module}:{statement.lineno}"


def test_linked_folders_are_namespace_packages():
    for folder in (*list(FOLDERS.values())[1:], ROOT / "kernels" / "triton"):
        assert not (folder / "__init__.py").exists(), f"{folder} would shadow an installed package"
    for name in ("passes", "kernels", "calibration"):
        link = ROOT / "seer_compile" / name
        assert link.is_symlink(), f"{link} is not a link"
        assert str(link.readlink()) == f"../{name}"


@every_module
def test_file_keeps_its_line_budget(module):
    limit = PASS_LINES if layer_of(module) == "passes" else FILE_LINES
    num_lines = len(FILES[module].read_text().splitlines())
    assert num_lines <= limit, f"{FILES[module]}: {num_lines} lines, at most {limit}"


@every_module
def test_functions_keep_their_line_budget(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("jit" in ast.unparse(item) for item in node.decorator_list)
            limit = KERNEL_LINES if is_kernel else FUNCTION_LINES
            num_lines = body_lines(node)
            assert num_lines <= limit, f"{node.name}: {num_lines} lines, at most {limit}"


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


@every_module
def test_nothing_prints_runs_code_from_data_or_changes_global_state(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            name = call_name(node)
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno}: {name}"
    for name, statement in imports_of(TREES[module]):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"line {statement.lineno}: {name}"


@every_module
def test_warnings_point_to_the_caller(module):
    """A level counted by hand is wrong once another function calls."""
    if module == "seer_compile.callers":
        return
    for node in ast.walk(TREES[module]):
        is_warning = isinstance(node, ast.Call) and call_name(node).startswith("warnings.warn")
        assert not is_warning, f"line {node.lineno}: use callers.warn_caller"


def narrows_a_type(node: ast.Assert) -> bool:
    """Whether an assert only tells the type checker what our own code guarantees."""
    text = ast.unparse(node.test)
    return node.msg is None and (text.endswith(" is not None") or text.startswith("isinstance("))


@every_module
def test_no_assert_for_user_input_and_no_bare_except(module):
    for node in ast.walk(TREES[module]):
        is_check = isinstance(node, ast.Assert) and not narrows_a_type(node)
        assert not is_check, f"line {node.lineno}: python -O removes this check"
        is_bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not is_bare, f"line {node.lineno}: bare except"


@every_module
def test_compiler_settings_are_never_assigned(module):
    pattern = re.compile(r"^(torch\.)?_?(dynamo|inductor|functorch)\w*\.config\.")
    for node in ast.walk(TREES[module]):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            text = ast.unparse(target)
            assert not pattern.match(text.removeprefix("torch.")), f"line {node.lineno}: {text}"
            assert not text.startswith("os.environ"), f"line {node.lineno}: {text}"


@every_module
def test_module_and_public_definitions_are_documented(module):
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{FILES[module]} has no docstring"
    for node in tree.body:
        is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_sources_speak_of_no_machine():
    pattern = re.compile(r"/(work|opt|tmp|root|home)/")
    files = [*FILES.values(), *(ROOT / "examples").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for path in files:
        if path != Path(__file__).resolve():
            found = pattern.search(path.read_text())
            assert not found, f"{path}: {found and found.group()}"
