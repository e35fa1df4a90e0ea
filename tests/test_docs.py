"""The documentation against the code: settings, exit codes, examples."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftzoo import errors
from peftzoo.train import recipe

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "model": recipe.ModelSettings,
    "data": recipe.DataSettings,
    "data.train, data.eval": recipe.DataSource,
    "train": recipe.TrainSettings,
    "eval": recipe.EvalSettings,
    "output": recipe.OutputSettings,
}


def shown(field):
    """Return a default as the tables write it."""
    if field.is_required():
        return "required"
    default = field.default_factory() if field.default_factory else field.default
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, recipe.GenerateSettings):
        default = default.model_dump()
    return re.sub(r"'", "", str(default))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_documented_as_it_is(section):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text.split(f"### `{section}`")[1].split("###")[0]
    rows = [f"| `{name}` | {shown(f)} | {f.description} |" for name, f in SECTIONS[section].model_fields.items()]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


def test_exit_codes_are_documented():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ZooError)]
    assert len(classes) == 8
    for error in classes:
        assert f"| {error.exit_code} |" in text
        assert f"| {error.exit_code} |" in (errors.__doc__ or "")


def test_readme_python_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_opens_with_exactly_two_commands():
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [line.split("#")[0].strip() for line in first[1].strip().splitlines()] == ["make quickstart", "make test"]


def test_readme_recipe_is_valid(tmp_path):
    from peftzoo.train.recipe_file import load_recipe

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block, encoding="utf-8")
    assert load_recipe(str(path)).method.name == "lora"
