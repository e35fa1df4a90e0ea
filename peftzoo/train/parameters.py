"""How many parameters a method would train on a model of which only the config is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from pydantic import ValidationError
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from peftzoo.core.counts import count_trained
from peftzoo.core.registry import Method, unknown_setting
from peftzoo.errors import RecipeError
from peftzoo.train.models import empty_base
from peftzoo.train.recipe import ModelSettings
from peftzoo.train.recipe_file import COMMAND_LINE
from peftzoo.train.recipe_method import MethodSettings
from peftzoo.train.recipe_yaml import NotYaml, parse


def describe_model(name_or_path: str) -> PreTrainedModel:
    """Return a model on the meta device: shapes without weights.

    Args:
        name_or_path: builtin/..., a folder with a config.json, or a name on the Hub.

    Raises:
        ModelError: there is no such model, or its config cannot be read.
    """
    return empty_base(_AnyModel, ModelSettings(name_or_path=name_or_path))


def trained_parameters(model: PreTrainedModel, method: Method, settings: Mapping[str, Any]) -> int:
    """Return the number of parameters that `method` trains on `model`, on all linear layers unless `settings` differ.

    Raises:
        RecipeError: `settings` are not the method's, or have bad values.
        ModelError: they do not fit the model, or the method cannot be built without weights.
    """
    for name in settings:
        if name not in method.settings:
            raise RecipeError(unknown_setting(method.name, name, method.settings))
    if "target_modules" in method.settings:
        settings = {"target_modules": "all-linear", **settings}
    try:
        checked = MethodSettings(name=method.name, **settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return count_trained(model, method.make_config(**checked.settings))


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Return settings written as on the command line, such as ``r=32``, their values in YAML.

    Raises:
        RecipeError: one is not of this form, or its value is no YAML.
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RecipeError(f"{text!r} is not of the form setting=value")
        try:
            settings[name], problems = parse(value, lambda line: COMMAND_LINE)
        except NotYaml as error:
            raise RecipeError(f"{name}: {error.reason}") from None
        if problems:
            raise RecipeError("\n".join(problems))
    return settings


class _AnyModel:
    """Stands where one of transformers' auto classes does, for a model of any task."""

    @staticmethod
    def from_config(config: PreTrainedConfig) -> PreTrainedModel:
        for name in config.architectures or []:
            if isinstance(own := getattr(transformers, name, None), type):
                return own(config)
        return AutoModel.from_config(config)
