"""The registry: the one place where a method's name is written, with what it can and cannot do.

Own methods enter by `@register` on their adapter class, peft's by `adopt`, third-party packages through the entry
point group `peftzoo.methods` (a module that registers when it is imported). Every other type of peft's answers to its
own name without being registered.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from peft import PeftConfig

from peftzoo.core import peft_methods
from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.stock_lora import StockLora
from peftzoo.core.suggest import nearest

Adapter = TypeVar("Adapter", bound=type[LinearAdapter])

# plumbing that the loaders fill in; a user never sets it by hand
_NOT_SETTINGS = frozenset({"base_fingerprint", "inference_mode", "method", "base_model_name_or_path", "revision"}) | {
    f.name for f in dataclasses.fields(PeftConfig)
}
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """One method and its declared capabilities.

    Attributes:
        name: name in recipes, files and commands.
        config: its settings, a peft config dataclass.
        adapter: its adapter class; None when peft's own tuner is adopted.
        paper: where it was published.
        summary: what it is, in one sentence.
        lr_factor: its usual learning rate as a multiple of LoRA's.
        trains: names of the trained tensors of a layer.
        layers: kinds of layers it adapts, of `core.base_layer.KINDS`.
        injectable: works without peft's model class, through transformers' `add_adapter` and `load_adapter`.
        to_lora: whether it can be written as a plain LoRA: exactly, as the nearest of a given rank, or not at all.
        stock_lora: how stock peft knows it, if its folders are stock peft LoRA folders.
        calibrate: takes the start from data: (model, adapters by layer name, batches) -> `calibrate.Start` by layer
            name. Called where the config says `needs_data`.
        edits_base: the setting under which it writes into the base weight, undone on unloading; None if none does.
        keeps_base: disabling or unloading it gives the base back as it was.
        fsdp: trains under FSDP2.
        compile: a layer compiles to one graph.
        aliases: settings accepted under a second name, second name -> own name.
        offers: of an adopted method: the settings of its config that a recipe may give; none named: all.
        preset: of an adopted method: values that make it out of a config several methods share; never null.
        regularizer: of an adopted method: (peft's tuner) -> the extra term of the loss that peft leaves to trainers.
        reads: readers of folders of peft's own types: peft type -> ((folder, make_config) -> config and tensors).
        tiny: settings under which a small test sees every part of it.
    """

    name: str
    config: type[PeftConfig]
    adapter: type[LinearAdapter] | None
    paper: str
    summary: str
    lr_factor: float = 1.0
    trains: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("linear", "conv1d", "bnb-4bit", "bnb-8bit")
    injectable: bool = True
    to_lora: Literal["exact", "approximate"] | None = None
    stock_lora: StockLora | None = None
    calibrate: Callable[..., Any] | None = None
    edits_base: str | None = None
    keeps_base: bool = True
    fsdp: bool = True
    compile: bool = True
    aliases: Mapping[str, str] = field(default_factory=lambda: _NONE)
    offers: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    regularizer: Callable[[Any], Any] | None = None
    reads: Mapping[str, Callable[..., Any]] = field(default_factory=lambda: _NONE)
    tiny: Mapping[str, Any] = field(default_factory=lambda: _NONE)

    @property
    def adopted(self) -> bool:
        """Whether peft's own tuner runs it."""
        return self.adapter is None

    @property
    def settings(self) -> dict[str, dataclasses.Field[Any]]:
        """Every setting a recipe may give, by each accepted name."""
        own = {f.name: f for f in dataclasses.fields(self.config) if f.init and f.name not in _NOT_SETTINGS}
        own = {name: own[name] for name in self.offers} if self.offers else own
        return own | {alias: own[name] for alias, name in self.aliases.items()}

    def make_config(self, **settings: Any) -> PeftConfig:
        """Return the config for `settings`, given by own names or aliases.

        Raises:
            ValueError: an unknown setting, one given twice, or a bad value.
        """
        resolved: dict[str, Any] = {}
        known = self.settings
        for name, value in settings.items():
            if name not in known and name not in _NOT_SETTINGS:
                raise ValueError(unknown_setting(self.name, name, known))
            own = self.aliases.get(name, name)
            if own in resolved:
                other = next(alias for alias, of in self.aliases.items() if of == own)
                raise ValueError(f"{self.name}: {other} is another name of {own}; give one of them")
            resolved[own] = value
        for name in self.preset:
            if resolved.get(name, ...) is None:
                raise ValueError(f"{self.name}: {name} cannot be null; it is what makes {self.name}")
        return self.config(**{**self.preset, **resolved})

    def made(self, config: PeftConfig | Mapping[str, Any]) -> bool:
        """Whether an adopted method made this config, given as such or as the contents of an adapter_config.json."""
        settings = config if isinstance(config, Mapping) else vars(config)
        kind = peft_methods.type_of(self.config) if self.adopted else None
        return settings.get("peft_type") == kind and all(settings.get(key) is not None for key in self.preset)


_methods: dict[str, Method] = {}


def register(name: str, *, config: type[PeftConfig], paper: str, **capabilities: Any) -> Callable[[Adapter], Adapter]:
    """Register the decorated adapter class as method `name`; the first line of its docstring is the summary.

    Args:
        name: name in recipes, files and commands; a taken name is refused.
        config: its `ZooConfig` dataclass.
        paper: where it was published.
        **capabilities: the further attributes of `Method`.

    Raises:
        ValueError: the name is taken, or the config belongs to another method.
    """

    def decorate(adapter: Adapter) -> Adapter:
        summary = (adapter.__doc__ or "").strip().split("\n")[0]
        if name not in _methods and "method_name" in vars(config):
            raise ValueError(f"{config.__name__} belongs to {config.method_name}; give {name} a config of its own")
        _add(Method(name, config, adapter, paper, summary, **capabilities))
        config.method_name = name
        return adapter

    return decorate


def adopt(name: str, *, config: type[PeftConfig], paper: str, summary: str, **capabilities: Any) -> None:
    """List a method of peft's under `name`: peft's tuner, peft's file format, our recipes, table and tests.

    Raises:
        ValueError: the name is taken.
    """
    _add(Method(name, config, None, paper, summary, **capabilities))


def get_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        KeyError: there is none; names the nearest, or says why a type of peft's cannot be trained here.
    """
    _load_plugins()
    if name not in _methods:
        if peft_methods.is_peft_name(name):
            return _by_peft_name(name)
        guess = nearest(name, [*_methods, *peft_methods.peft_names()])
        hint = f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(_methods))}"
        raise KeyError(f"unknown method {name!r}; {hint}")
    return _methods[name]


def list_methods() -> list[str]:
    """Return the names of all registered methods, sorted."""
    _load_plugins()
    return sorted(_methods)


def list_peft_methods() -> list[str]:
    """Return the names of peft's further types, sorted: `get_method` knows them too, unregistered and untested."""
    _load_plugins()
    return sorted(set(peft_methods.peft_names()) - set(_methods))


def adopting(config: PeftConfig | Mapping[str, Any]) -> Method | None:
    """Return the registered adopted method that made a config, or the contents of an adapter_config.json; or None."""
    return next((method for name in list_methods() if (method := _methods[name]).made(config)), None)


def reading(peft_type: object) -> Callable[..., Any] | None:
    """Return what reads folders of a type of peft's as a zoo adapter, (folder) -> config and tensors; or None."""
    for name in list_methods():
        method = _methods[name]
        if peft_type in method.reads:
            return partial(method.reads[str(peft_type)], make_config=method.make_config)
    return None


def find_method(name: object) -> Method | None:
    """Return the method of this name, or None where there is none."""
    try:
        return get_method(name) if isinstance(name, str) else None
    except KeyError:
        return None


def unknown_setting(method: str, name: str, known: Mapping[str, Any]) -> str:
    """Return the message for a setting that `method` does not have."""
    guess = nearest(name, known)
    return f"{name} is not a setting of {method}" + (f"; did you mean {guess}?" if guess else "")


@cache
def _by_peft_name(name: str) -> Method:
    why_not = peft_methods.refusal(name)
    if why_not is not None:
        raise KeyError(why_not)
    return Method(name, adapter=None, **peft_methods.describe(name))


def _add(method: Method) -> None:
    if method.name in _methods:
        raise ValueError(f"method name {method.name!r} is taken by {_methods[method.name].config.__module__}")
    _methods[method.name] = method


@cache
def _load_plugins() -> None:
    for plugin in entry_points(group="peftzoo.methods"):
        try:
            plugin.load()
        except Exception as error:  # a broken third-party package must not take the zoo down with it
            warnings.warn(f"method plugin {plugin.name} ({plugin.value}) failed to load: {error}", stacklevel=2)
