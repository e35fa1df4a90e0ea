"""The folder a run leaves behind: whose it is, what is written into it, each part whole or not at all.

| name | what |
|---|---|
| run.json | the manifest: status, versions, machine, sizes, time, memory, metrics before and after |
| recipe.resolved.yaml | the recipe with every default spelled out; it alone repeats the run |
| metrics.jsonl | one JSON object per event |
| final/ | the trained adapter; interrupted/ instead, where training ended early |
| loss.png | the picture of metrics.jsonl |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel

from peftzoo.core.storage import save_adapter
from peftzoo.errors import CheckpointError
from peftzoo.train.recipe import Recipe
from peftzoo.train.recipe_file import write_resolved

MANIFEST = "run.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.resolved.yaml"


class RunFolder:
    """A folder that belongs to one run.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def claim(cls, wanted: str) -> RunFolder:
        """Return ``wanted`` as this run's folder or, where that holds something, the first free of ``wanted-2``, ...

        The manifest is created at once and by one run only, so two that start together get two folders.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        number = 1
        while True:
            path = Path(wanted) if number == 1 else Path(f"{Path(wanted)}-{number}")
            try:
                path.mkdir(parents=True, exist_ok=True)
                if not any(path.iterdir()):
                    (path / MANIFEST).open("x").close()
                    return cls(path)
            except FileExistsError as error:
                if not path.is_dir():
                    raise CheckpointError(f"output.dir={wanted}: {path} is a file; name a folder") from error
            except OSError as error:
                raise CheckpointError(f"output.dir={wanted}: {path} cannot be written: {error.strerror}") from error
            number += 1

    def release(self) -> None:
        """Give the folder back, for a run that ended before its first step and has nothing to show."""
        for name in (MANIFEST, RECIPE, METRICS):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            self.path.rmdir()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe, complete; like every write here it raises CheckpointError where it cannot."""
        with _writing(self.path / RECIPE):
            write_resolved(recipe, self.path / RECIPE)

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Replace the manifest."""
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
        staged = self.path / f".{MANIFEST}"
        with _writing(self.path / MANIFEST):
            staged.write_text(text, encoding="utf-8")
            staged.replace(self.path / MANIFEST)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to the metrics: the kind of event and its finite values."""
        line = json.dumps({"event": event} | values, allow_nan=False) + "\n"
        with _writing(self.path / METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind, train or eval, in order."""
        lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def save(self, model: PeftModel, name: str) -> Path:
        """Save the adapter under ``name``, which appears once everything is on the disk; return where it is.

        Raises:
            CheckpointError: it cannot be written.
        """
        staged, place = self.path / f".{name}", self.path / name
        with _writing(place):
            save_adapter(model, staged)
            for written in (*staged.iterdir(), staged):
                _to_disk(written)
            staged.rename(place)
            _to_disk(self.path)
        return place


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written: {error.strerror or error}") from error


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
