"""The `method:` section of a recipe: a method's name and its settings, checked against the method's own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import InitErrorDetails, to_json, to_jsonable_python
from typing_extensions import Self

from peftzoo.core.registry import Method, find_method, get_method, list_methods
from peftzoo.train.recipe_part import STRICT, Part, Text, problem, refusal, wrong


class MethodSettings(Part):
    """The adapter method and its settings, checked against the method's own config; complete after checking."""

    model_config = ConfigDict(extra="allow")

    name: Text = Field(description="a name of `peftzoo methods`")

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the method, in the spelling of its config: what `Method.make_config` takes."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _name_of_method(cls, block: object) -> object:
        if not isinstance(block, Mapping) or find_method(block.get("name")):
            return block
        # a key that no method has may be the missing name, misspelt
        unknown = [key for key in block if key not in ("name", *settings_of(None))]
        problems = [InitErrorDetails(type="extra_forbidden", loc=(key,), input=block[key]) for key in unknown]
        if "name" not in block:
            problems.append(InitErrorDetails(type="missing", loc=("name",), input=block))
        else:
            try:
                get_method(str(block["name"]))
            except KeyError as error:
                problems.append(problem("name", str(error.args[0]), block["name"]))
        raise refusal(problems)

    @model_validator(mode="after")
    def _settings_of_method(self) -> Self:
        method = get_method(self.name)
        # as JSON, because a strict tuple or set is a list there, as it is in YAML
        _settings_model(method.name).model_validate_json(to_json(self.settings, inf_nan_mode="constants"))
        _check_values(method, self.settings)
        # past the freeze: a section is complete before anybody sees it
        object.__setattr__(self, "__pydantic_extra__", _complete(method, self.settings))
        return self


def settings_of(method: object) -> list[str]:
    """Return the settings of the method of this name, or of every listed one where there is none of this name."""
    found = find_method(method)
    chosen = [found] if found else [get_method(name) for name in list_methods()]
    return list(dict.fromkeys(key for one in chosen for key in one.settings))


@cache
def _settings_model(name: str) -> type[BaseModel]:
    """Return a model with every setting of the method, in each accepted spelling, of the type its config declares."""
    method = get_method(name)
    hints = get_type_hints(method.config)
    fields: dict[str, Any] = {key: (hints[field.name], None) for key, field in method.settings.items()}
    return create_model(name, __config__=ConfigDict(**STRICT, arbitrary_types_allowed=True), **fields)


def _check_values(method: Method, settings: dict[str, Any]) -> None:
    """Raise what the config itself refuses: at each setting that is wrong alone, or else at the method."""
    try:
        method.make_config(**settings)
    except ImportError as error:  # some of peft's need a package of their own
        raise wrong("name", str(error), method.name) from None
    except (ValueError, TypeError) as joint:
        alone: list[InitErrorDetails] = []
        for key, value in settings.items():
            try:
                method.make_config(**{key: value})
            except (ValueError, TypeError) as error:
                alone.append(problem(key, str(error), value))
        raise refusal(alone) if alone else ValueError(str(joint)) from None


def _complete(method: Method, settings: dict[str, Any]) -> dict[str, Any]:
    """Return every setting once, in the config's own spelling, with the config's defaults for those not given."""
    given = {method.settings[key].name: value for key, value in settings.items()}
    defaults: dict[str, Any] = {}
    for field in method.settings.values():
        if field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not MISSING:
            defaults[field.name] = field.default
    complete: dict[str, Any] = to_jsonable_python(defaults | dict(method.preset) | given)
    return complete
