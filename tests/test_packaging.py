"""The wheel: everything that is needed is inside, nothing else is, and it works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from processes import ROOT, start

from peftzoo.builtin import model_path
from peftzoo.core.resources import list_recipes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel without network; return its path."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_two_packages_and_nothing_else(names, wheel):
    info = "-".join(wheel.stem.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"peftzoo", "peftzoo_kernels", info}
    assert not [name for name in names if name.startswith("kernels/") or "/kernels/" in name]
    assert not [name for name in names if name.endswith(".pyc")]
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/licenses/peftzoo/builtin/tiny-docs-1m/NOTICE" in names


def test_every_module_is_inside(names):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peftzoo").rglob("*.py")}
    ops = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels/peftzoo_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | ops
    assert {"peftzoo/py.typed", "peftzoo_kernels/py.typed"} < names


def test_recipes_configs_and_the_model_are_inside(names):
    for kind in ("recipes", "configs"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / kind).rglob("*.yaml")}
        assert files
        assert {f"peftzoo/_data/{name}" for name in files} == {
            n for n in names if n.startswith(f"peftzoo/_data/{kind}/")
        }
    model = model_path("tiny-docs-1m")
    assert {f"peftzoo/builtin/tiny-docs-1m/{path.name}" for path in model.iterdir()} < names


def test_it_works_away_from_the_checkout(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    def run(*arguments):
        done = start(sys.executable, *arguments, PYTHONPATH=str(tmp_path / "site"))
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import peftzoo, peftzoo_kernels; print(peftzoo.__file__, peftzoo_kernels.__file__)"
    names = "from peftzoo.core.resources import list_recipes; print(*list_recipes())"
    modules = [str(tmp_path / "site" / package / "__init__.py") for package in ("peftzoo", "peftzoo_kernels")]
    assert run("-c", f"{where}; {names}").split() == modules + list_recipes()
    said = run("-m", "peftzoo", "check", "quickstart/dates")
    assert "model: LlamaForCausalLM, 984,192 parameters" in said
