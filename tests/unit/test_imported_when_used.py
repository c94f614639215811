"""Public names are there as ever, but torch is imported only when one that needs it is used."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import offload


def public_imports() -> dict[str, str]:
    """What a type checker sees: public names and the modules that offload/__init__.py imports them from."""
    tree = ast.parse(pathlib.Path(offload.__file__).read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("offload."):
            found.update({alias.name: str(node.module) for alias in node.names})
    return found


def in_new_process(code: str) -> str:
    """What `code` prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_type_checkers_see_exactly_the_public_names():
    assert sorted(public_imports()) == offload.__all__


@pytest.mark.parametrize("name", offload.__all__)
def test_a_public_name_is_the_object_that_a_type_checker_sees(name):
    assert getattr(offload, name) is getattr(importlib.import_module(public_imports()[name]), name)


def test_a_star_import_gives_every_public_name():
    names: dict[str, object] = {}
    exec("from offload import *", names)
    assert {name: names[name] for name in offload.__all__} == {
        n: getattr(offload, n) for n in offload.__all__
    }


def test_public_names_are_listed_before_they_are_used():
    assert (
        in_new_process("import offload; print(set(offload.__all__) - set(dir(offload)))").strip() == "set()"
    )


def test_modules_of_the_package_are_there_without_importing_them():
    assert in_new_process("import offload; print(offload.checkpoint.directory.__name__)").strip() == (
        "offload.checkpoint.directory"
    )


@pytest.mark.parametrize("name", ["wraps", "_nothing", "__wrapped__"])
def test_a_name_that_does_not_exist_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=name):
        getattr(offload, name)


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in ("doctor", "plan", "finetune"))])
def test_help_is_printed_without_importing_torch(arguments):
    code = (
        "import sys; from offload.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert in_new_process(code).splitlines()[-1] == "False False"
