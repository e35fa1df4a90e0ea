"""ZooConfig: the settings every method of the zoo shares, under one spelling."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from peft import PeftConfig
from typing_extensions import Self

from peftzoo.core.peft_type import ZOO_TYPE
from peftzoo.core.registry import get_method, unknown_setting


@dataclass
class ZooConfig(PeftConfig):
    """Settings of a zoo adapter; each method's config adds its own.

    `ZooConfig(method="sorsa", ...)` returns a `SorsaConfig`, so that whatever reads an `adapter_config.json` gets the
    right class.

    Attributes:
        method: name of the method; set by the class.
        r: rank, >= 1.
        alpha: the update is scaled by alpha / r; None scales by 1.
        dropout: share of the adapter's inputs dropped in training, 0 <= dropout < 1.
        target_modules: names, or ends of names, of the layers to adapt, a regular expression for whole names, or
            "all-linear": every linear layer but the output head.
        exclude_modules: names, ends of names, or a regular expression, of layers to leave alone.
        modules_to_save: names of modules trained and saved whole beside the adapter.
        layers_to_transform: indices of the blocks to adapt; None means all.
        layers_pattern: name of the list of blocks that the indices count in.
        rank_pattern: ranks of single layers, by their names or ends of names; 0 adapts none.
        alpha_pattern: alphas of single layers, likewise.
        lr_ratios: learning rates of single trained tensors relative to the others', by the tensor's name in the
            method, such as {b: 16}.
        seed: seed of the method's random draws.
        base_fingerprint: samples of the base the adapter was made on; filled in by the library.

    Raises:
        ValueError: an unknown setting or a value out of range.
    """

    method: str | None = None
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lr_ratios: dict[str, float] | None = None
    seed: int = 0
    base_fingerprint: dict[str, list[float]] | None = None

    method_name: ClassVar[str]

    def __new__(cls, *args: Any, method: str | None = None, **settings: Any) -> ZooConfig:
        """Return an instance of the class that `method` names; unknown settings are refused, not dropped."""
        if cls is ZooConfig:
            if method is None:
                raise ValueError("ZooConfig needs method=...; or use a method's own config, such as SorsaConfig")
            try:
                chosen = get_method(method).config
            except KeyError as error:
                raise ValueError(error.args[0]) from None
            if not issubclass(chosen, ZooConfig):
                raise ValueError(f"{method} is peft's own method; use {chosen.__name__}")
            cls = chosen
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise ValueError(unknown_setting(cls.method_name, name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ZOO_TYPE
        if self.method not in (None, self.method_name):
            raise ValueError(f"{type(self).__name__} is the config of {self.method_name}, not of {self.method}")
        self.method = self.method_name
        # a fingerprint given at construction comes from a file: the tensors will come from one too
        self.from_file = self.base_fingerprint is not None
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # what peft works on
        self._require("r", isinstance(self.r, int) and not isinstance(self.r, bool) and self.r >= 1, "an integer >= 1")
        self._require("alpha", self.alpha is None or 0 < self.alpha < math.inf, "a finite number > 0, or none")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    self._require(name, False, f"a list of names or a regular expression: {error}")
        for name, choices in _choices(type(self)).items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(str, choices))}")
        for name, least in {"rank_pattern": 0, "alpha_pattern": math.ulp(0), "lr_ratios": math.ulp(0)}.items():
            values = (getattr(self, name) or {}).values()
            bound = "at least 0" if name == "rank_pattern" else "finite and above 0"
            self._require(name, all(least <= value < math.inf for value in values), f"names with numbers {bound}")
        self._require("target_modules", bool(self.target_modules), 'names of layers or "all-linear"')

    @property
    def scale(self) -> float:
        """Factor of the update: alpha / r, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def needs_data(self) -> bool:
        """Whether the start is taken from data: then `calibrate` has to fill in what `init` left open."""
        return False

    def for_layer(self, name: str) -> Self | None:
        """Return the settings of the layer `name`, its rank and alpha looked up; None if it gets no adapter."""
        r, alpha = (_of_layer(pattern, name) for pattern in (self.rank_pattern, self.alpha_pattern))
        if r == 0:
            return None
        if r is None and alpha is None:
            return self
        own = copy.copy(self)
        own.r, own.alpha = r or self.r, alpha or self.alpha
        return own

    def refusal(self, kind: str) -> str | None:
        """Return why these settings do not fit a kind of layer that the method adapts otherwise, and which would."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for a file, sets as sorted lists so that equal configs make equal files."""
        return {
            name: sorted(value) if isinstance(value, (set, frozenset)) else value
            for name, value in super().to_dict().items()
        }

    def _require(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise ValueError(f"{self.method_name}: {name}={getattr(self, name)!r} must be {bound}")


def _choices(config: type[ZooConfig]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that are declared as a Literal, with their values."""
    hints = get_type_hints(config)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _of_layer(pattern: dict[str, Any] | None, name: str) -> Any:
    """Return what `pattern` says about a layer, by the longest of its keys that the name ends in."""
    fitting = [key for key in pattern or {} if name == key or name.endswith(f".{key}")]
    return pattern[max(fitting, key=len)] if pattern and fitting else None
