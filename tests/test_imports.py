"""What importing the package does to the process: as little as possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seer_compile.errors import VersionUnsupportedError
from seer_compile.model_loading import load_model

ROOT = Path(__file__).resolve().parent.parent

OBSERVE = """
import json, os, sys, torch
before = set(sys.modules)
state = (torch.get_rng_state().tolist(), dict(os.environ), torch.get_default_dtype(),
         torch.is_grad_enabled(), torch.get_num_threads(), sys.getrecursionlimit())
writes = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        writes.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
        writes.append(f"{event} {arguments[0]}")
    elif event in ("socket.connect", "subprocess.Popen"):
        writes.append(event)
sys.addaudithook(watch)
import seer_compile
seen = list(writes)
after = (torch.get_rng_state().tolist(), dict(os.environ), torch.get_default_dtype(),
         torch.is_grad_enabled(), torch.get_num_threads(), sys.getrecursionlimit())
print(json.dumps({
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "cuda": torch.cuda.is_initialized(),
    "writes": seen,
    "unchanged": state == after,
    "public": len(seer_compile.__all__),
}))
"""

WITHOUT_OPTIONAL = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "matplotlib", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib, json
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import torch
import seer_compile
tokens = torch.arange(32.0).reshape(1, 1, 16, 2)
print(torch.ops.seer_compile.pool_blocks.v1(tokens, 8, "mean", None).flatten().tolist())
"""


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """Run code in a fresh interpreter outside the repository and return its last line."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return json.loads(run_python(OBSERVE, cwd=tmp_path_factory.mktemp("elsewhere")))


def test_import_loads_neither_triton_nor_transformers(observed):
    optional = {"triton", "transformers", "matplotlib", "huggingface_hub", "tokenizers", "kernels"}
    assert observed["public"] > 0
    assert "seer_compile" in observed["loaded"]
    assert not optional & set(observed["loaded"])


def test_import_does_not_initialise_cuda(observed):
    assert observed["cuda"] is False


def test_import_writes_no_file_and_starts_no_process(observed):
    assert observed["writes"] == []


def test_import_leaves_global_state_alone(observed):
    assert observed["unchanged"]


def test_package_works_on_cpu_without_optional_libraries(tmp_path):
    modules = ["seer_compile"]
    for folder in ("passes", "kernels", "calibration"):
        modules += [f"seer_compile.{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")]
    modules += [
        f"seer_compile.{path.stem}"
        for path in (ROOT / "seer_compile").glob("*.py")
        if path.stem != "__init__"
    ]
    pooled = run_python(WITHOUT_OPTIONAL, json.dumps(modules), cwd=tmp_path)
    assert json.loads(pooled) == [7.0, 8.0, 23.0, 24.0]


def test_verbs_that_need_transformers_say_so_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VersionUnsupportedError, match="pip install 'transformers>="):
        load_model("any", device=torch.device("cpu"))
