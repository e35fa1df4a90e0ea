"""The shape of the repository: who imports whom, how long a file may be, what is documented, what may not be there."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import peft
import pytest
from processes import ROOT, start

import peftzoo

PACKAGES = (ROOT / "peftzoo", ROOT / "kernels" / "peftzoo_kernels")
FILES = {path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in sorted(package.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
METHOD_FILES = [name for name in FILES if re.fullmatch(r"peftzoo/methods/(?!__init__)\w+\.py", name)]

# floor by floor: what the files of a folder may import of ours; the first pattern that matches a file counts
FLOORS = {
    "kernels/*": ("peftzoo_kernels",),
    "peftzoo/errors.py": (),
    "peftzoo/builtin/*": ("peftzoo.builtin",),
    "peftzoo/core/*": ("peftzoo.core", "peftzoo.errors", "peftzoo_kernels"),
    "peftzoo/low_rank/*": ("peftzoo.low_rank", "peftzoo.core", "peftzoo.errors", "peftzoo_kernels"),
    "peftzoo/methods/__init__.py": (),
    "peftzoo/methods/*": ("peftzoo.low_rank", "peftzoo.core", "peftzoo_kernels"),
    "peftzoo/train/*": ("peftzoo.train", "peftzoo.builtin", "peftzoo.core", "peftzoo.errors", "peftzoo_kernels"),
    "peftzoo/bench/*": (
        *("peftzoo.bench", "peftzoo.builtin", "peftzoo.core", "peftzoo.errors", "peftzoo.train"),
        "peftzoo_kernels",
    ),
    "peftzoo/export.py": ("peftzoo.builtin", "peftzoo.core", "peftzoo.errors"),
    "peftzoo/inspection.py": ("peftzoo.core", "peftzoo.errors"),
    "peftzoo/method_table.py": ("peftzoo.core", "peftzoo.train"),
    "peftzoo/__init__.py": ("peftzoo.core", "peftzoo.methods"),
    "peftzoo/cli.py": (
        *("peftzoo.__version__", "peftzoo.bench", "peftzoo.core", "peftzoo.errors", "peftzoo.export"),
        *("peftzoo.inspection", "peftzoo.method_table", "peftzoo.train"),
    ),
    "peftzoo/__main__.py": ("peftzoo.cli",),
}


def imports(name):
    """Return every name that a file imports, as `package.module.name`, relative ones resolved."""
    package = FILES[name].relative_to(PACKAGES[0].parent if name.startswith("peftzoo/") else PACKAGES[1].parent).parent
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.parts[: len(package.parts) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def uses(name):
    """Return the imports of a file, with what it takes from a bare `import peftzoo` or `import peft`."""
    found = imports(name)
    for bare in {"peftzoo", "peft"} & found:
        taken = {
            f"{bare}.{node.attr}"
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == bare
        }
        found = found - {bare} | taken
    return found


def within(name, allowed):
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def test_the_walk_sees_the_imports():
    assert "peftzoo.core.adapter.Factors" in imports("peftzoo/methods/sorsa.py")
    assert "peftzoo.builtin.iso_dates" in imports("peftzoo/builtin/__init__.py")
    assert "peftzoo.core.config.ZooConfig" in imports("peftzoo/core/adapter.py"), "also those for the type checker"
    assert "peftzoo.__version__" in uses("peftzoo/cli.py")
    assert len(FILES) > 40


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_only(name):
    allowed = next(allowed for pattern, allowed in FLOORS.items() if fnmatch(name, pattern))
    own = {used for used in uses(name) if used.split(".")[0] in ("peftzoo", "peftzoo_kernels")}
    assert {used for used in own if not within(used, allowed)} == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kernels/")])
def test_kernels_need_torch_and_numpy_alone(name):
    foreign = {used.split(".")[0] for used in imports(name)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy", "triton", "peftzoo_kernels"}


def test_kernels_are_importable_alone():
    """Nothing comes in by a side door either."""
    script = "import sys, peftzoo_kernels; print(sorted({'peft', 'transformers', 'peftzoo'} & set(sys.modules)))"
    done = start(sys.executable, "-c", script, PYTHONPATH=str(ROOT / "kernels"))
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("peftzoo/core/")])
def test_internals_of_peft_are_cores_business(name):
    """Anything of peft but its public names may move in its next release; one floor then has to follow."""
    for used in uses(name):
        package, _, rest = used.partition(".")
        if package == "peft":
            assert "." not in rest
            assert not inspect.ismodule(getattr(peft, rest))


def test_nothing_of_ours_is_called_kernels(monkeypatch):
    """Transformers takes any importable package of this name for Hugging Face's, and breaks."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("kernels/__init__.py"))
    monkeypatch.syspath_prepend(ROOT)
    spec = importlib.util.find_spec("kernels")
    assert spec.origin is None or not Path(spec.origin).is_relative_to(ROOT / "kernels")
    assert "peftzoo" not in packages_distributions().get("kernels", [])


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_method_file_registers_one_method_of_its_name(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    registered = [call.args[0].value for call in calls if call.func.id in ("register", "adopt")]
    assert registered == [Path(name).stem]


def test_every_method_has_its_file():
    assert {Path(name).stem for name in METHOD_FILES} == set(peftzoo.list_methods())


LONGEST = {
    "peftzoo/methods/*": 120,
    "peftzoo/core/*": 300,
    "peftzoo/low_rank/*": 300,
    "peftzoo/train/*": 400,
    "peftzoo/bench/*": 400,
    "kernels/*": 400,
}


@pytest.mark.parametrize("name", [name for name in FILES if any(fnmatch(name, pattern) for pattern in LONGEST)])
def test_files_are_short(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= next(most for pattern, most in LONGEST.items() if fnmatch(name, pattern))


def test_every_method_is_documented():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} - {"README"}
    assert pages == set(peftzoo.list_methods())


def texts():
    """Yield every text file of the repository, without what git ignores."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in ignored):
            content = path.read_bytes()
            if b"\0" not in content:
                yield path.relative_to(ROOT).as_posix(), content.decode("utf-8")


def test_no_path_of_a_machine_is_written_anywhere():
    pattern = re.compile(r"(?<![\w.}~/-])/(work|root|tmp|home)\b")
    found = dict(texts())
    assert {"README.md", "pyproject.toml", "peftzoo/cli.py"} < found.keys()
    assert pattern.search("in /tmp/x")
    assert pattern.search("PATH=/home/me")
    for name, text in found.items():
        if not name.startswith("tests/"):
            hit = pattern.search(text)
            assert hit is None, f"{name}: {text[hit.start() : hit.start() + 40]!r}"
