"""The error tree: codes, builtins, texts, and that nothing in it is dead or undocumented."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import pickle
import re
import warnings
from pathlib import Path

import pytest

from seer_compile import errors
from seer_compile.errors import SeerError, SeerWarning

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple(
    path
    for folder in ("seer_compile", "passes", "kernels", "calibration")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "errors.py"
)
TESTS = tuple(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__).resolve())
CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass)]
ERRORS = sorted(
    (item for item in CLASSES if issubclass(item, SeerError)), key=lambda item: item.code
)
WARNINGS = [item for item in CLASSES if issubclass(item, SeerWarning)]
LEAVES = [item for item in ERRORS if not item.__subclasses__()]
BUILTINS = {
    "1": ValueError,
    "2": NotImplementedError,
    "3": RuntimeError,
    "5": OSError,
    "6": RuntimeError,
}
every_error = pytest.mark.parametrize("error", ERRORS, ids=lambda item: item.__name__)
every_leaf = pytest.mark.parametrize("error", LEAVES, ids=lambda item: item.__name__)


@functools.cache
def names_called_by_the_package() -> set[str]:
    """Return the last part of everything called anywhere."""
    return {
        ast.unparse(node.func).split(".")[-1]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }


def test_codes_are_unique_and_stable_in_form():
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"SEER-\d{3}", code) for code in codes)


@every_error
def test_error_is_caught_by_root_and_by_the_builtin_a_caller_expects(error):
    assert issubclass(error, SeerError)
    builtin = BUILTINS.get(error.code[5])
    assert builtin is None or issubclass(error, builtin)
    parent = error.__mro__[1]
    shares_hundred = parent.code[:6] == error.code[:6] if parent is not Exception else True
    assert shares_hundred or parent is SeerError


@every_error
def test_message_says_what_was_wrong_what_is_accepted_and_what_to_do(error):
    raised = error(
        "the block list is too short",
        argument="indices",
        got=(1, 2),
        expected="4 x 4 blocks",
        hint="Build it for block_size=64.",
        context={"site": "layers.0.attention"},
    )
    assert str(raised) == (
        f"[{error.code}] the block list is too short; indices=(1, 2); expected 4 x 4 blocks\n"
        "  site=layers.0.attention\n"
        "  Build it for block_size=64."
    )
    assert raised.argument == "indices"
    assert raised.got == (1, 2)
    assert raised.context == {"site": "layers.0.attention"}


@every_error
def test_error_survives_a_copy_and_another_process(error):
    raised = error("too short", argument="indices", got=1, hint="Build it again.")
    for twin in (copy.copy(raised), pickle.loads(pickle.dumps(raised))):
        assert type(twin) is error
        assert str(twin) == str(raised)
        assert (twin.argument, twin.got, twin.hint) == ("indices", 1, "Build it again.")


@every_error
def test_error_without_fields_reads_well(error):
    assert str(error("nothing to do")) == f"[{error.code}] nothing to do"


@pytest.mark.parametrize("category", WARNINGS, ids=lambda item: item.__name__)
def test_warning_can_be_filtered_by_root(category):
    assert issubclass(category, SeerWarning)
    with pytest.warns(SeerWarning, match="slow"):
        warnings.warn("slow", category, stacklevel=1)


@pytest.mark.parametrize("item", [*ERRORS, *WARNINGS], ids=lambda item: item.__name__)
def test_error_is_documented(item):
    text = (ROOT / "docs" / "errors.md").read_text()
    assert f"`{item.__name__}`" in text
    code = getattr(item, "code", None)
    assert code is None or re.search(rf"\| {code} \| `{item.__name__}` \|", text), code


def test_documentation_names_no_error_that_does_not_exist():
    text = (ROOT / "docs" / "errors.md").read_text()
    documented = set(re.findall(r"\| (SEER-\d{3}) \|", text))
    assert documented == {error.code for error in ERRORS}


@every_leaf
def test_error_is_raised_by_the_package(error):
    assert error.__name__ in names_called_by_the_package()


@every_leaf
def test_error_is_expected_by_a_test(error):
    assert any(re.search(rf"\b{error.__name__}\b", path.read_text()) for path in TESTS)
