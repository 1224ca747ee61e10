"""The package installs whole: from a wheel, from an sdist and editable, beside transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import seer_compile

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("passes", "kernels", "calibration")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORT_ALL = """
import importlib, importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
found = {}
for name in json.loads(sys.argv[1]):
    found[name] = importlib.import_module(name).__file__
shadowed = [
    name for name in ("kernels", "passes", "calibration", "triton.primitives")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None
    and "seer" in spec.origin
]
config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, intermediate_size=32, vocab_size=16)
AutoModelForCausalLM.from_config(config)
print(json.dumps({"found": found, "shadowed": shadowed}))
"""

BACKEND_BY_NAME = """
import json, sys, torch, warnings
from torch.nn import functional as F

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        query, key, value = self.project(x).reshape(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

torch.manual_seed(0)
model, x = Attention().eval(), torch.randn(1, 130, 32)
assert "seer_compile" not in sys.modules
compiled = torch.compile(model, backend="seer", options={"inner": "eager"})
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    difference = (compiled(x) - model(x)).abs().max().item()
print(json.dumps({
    "backends": torch._dynamo.list_backends(),
    "difference": difference,
    "origin": sys.modules["seer_compile.backend"].__file__,
    "warnings": [type(item.message).__name__ for item in caught],
}))
"""


def modules_of_tree(root: Path = ROOT) -> list[str]:
    """Return the import name of every module that an install must hold."""
    names = [
        f"seer_compile.{path.stem}"
        for path in (root / "seer_compile").glob("*.py")
        if path.stem != "__init__"
    ]
    for folder in LINKED:
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            names.append(".".join(("seer_compile", *parts)))
    return sorted(names)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without input or network and return its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of the sources, links kept: building writes into its folder."""
    copy = tmp_path_factory.mktemp("source") / "seer_compile"
    copy.mkdir()
    for name in ("seer_compile", *LINKED):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def archives(source, tmp_path_factory) -> dict[str, Path]:
    """Return an sdist of the tree and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("archives")
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])({}))"
    code = build.format("sys.argv[2]")
    run(sys.executable, "-c", code, "build_sdist", out, cwd=source)
    sdist = next(out.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    unpacked = next((out / "unpacked").iterdir())
    run(sys.executable, "-c", code, "build_wheel", out, cwd=unpacked)
    return {"sdist": sdist, "wheel": next(out.glob("*.whl"))}


def make_environment(folder: Path) -> Path:
    """Return the interpreter of a fresh environment that sees our dependencies, but not us."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # As paths, not as site folders: an editable install of ours in there stays inactive.
    (Path(where.strip()) / "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n")
    return python


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installed(request, source, archives, tmp_path_factory) -> tuple[Path, Path]:
    """Return the interpreter of an environment with us installed, and where our files lie."""
    folder = tmp_path_factory.mktemp(request.param)
    python = make_environment(folder / "environment")
    what = ["--editable", source] if request.param == "editable" else [archives[request.param]]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=folder)
    return python, source if request.param == "editable" else folder / "environment"


def test_package_list_equals_tree():
    folders = {"seer_compile"}
    for name in modules_of_tree():
        folders.add(name.rpartition(".")[0])
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert set(mapping) == folders
    for package, folder in mapping.items():
        assert (ROOT / folder).resolve() == (ROOT / package.replace(".", "/")).resolve()


def test_version_is_stated_once_in_effect():
    assert seer_compile.__version__ == PYPROJECT["project"]["version"]


def test_links_are_relative_and_reach_the_real_folders():
    for name in LINKED:
        link = ROOT / "seer_compile" / name
        assert link.is_symlink()
        assert not Path(os.readlink(link)).is_absolute()
        assert link.resolve() == ROOT / name


def test_wheel_holds_every_module_once_and_nothing_else(source, archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    expected = {name.replace(".", "/") + ".py" for name in modules_of_tree(source)}
    sources = [name for name in names if name.endswith(".py")]
    assert len(sources) == len(set(sources))
    assert set(sources) == expected | {"seer_compile/__init__.py"}
    assert "seer_compile/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"seer_compile"}


def test_sdist_holds_no_module_twice(archives):
    with tarfile.open(archives["sdist"]) as sdist:
        members = sdist.getmembers()
    paths = [member.name.split("/", 1)[1] for member in members if member.name.endswith(".py")]
    assert len(paths) == len(set(paths))
    assert {"passes", "kernels", "calibration"} <= {path.split("/")[0] for path in paths}


@pytest.mark.slow
def test_install_imports_every_module_beside_transformers(source, installed, tmp_path):
    python, home = installed
    modules = modules_of_tree(source)
    result = json.loads(
        run(python, "-c", IMPORT_ALL, json.dumps(modules), cwd=tmp_path).strip().splitlines()[-1]
    )
    assert result["shadowed"] == []
    assert set(result["found"]) == set(modules)
    for name, file in result["found"].items():
        assert Path(file).resolve().is_relative_to(home.resolve()), f"{name} comes from {file}"


@pytest.mark.slow
def test_compile_finds_backend_by_name_without_importing_us(installed, tmp_path):
    python, home = installed
    result = json.loads(run(python, "-c", BACKEND_BY_NAME, cwd=tmp_path).strip().splitlines()[-1])
    assert "seer" in result["backends"]
    assert result["difference"] == 0.0
    assert Path(result["origin"]).resolve().is_relative_to(home.resolve())
    assert "DenseFallbackWarning" in result["warnings"]


@pytest.mark.slow
def test_command_line_is_installed(installed, tmp_path):
    python, _ = installed
    assert "explain" in run(python.parent / "seer-compile", "--help", cwd=tmp_path)
