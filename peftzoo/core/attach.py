"""attach: adapters on any torch module, without transformers' or peft's model classes."""

from __future__ import annotations

from peft import inject_adapter_in_model
from torch import nn

from peftzoo.core.base_layer import layer_kind
from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear


def attach(module: nn.Module, config: ZooConfig, adapter_name: str = "default") -> nn.Module:
    """Put an adapter on the layers of `module` that `config` names and freeze the rest.

    Args:
        module: any torch module, changed in place; a single linear layer is wrapped instead.
        config: the method's config.
        adapter_name: name of the adapter.

    Returns:
        The module to use from here on.

    Raises:
        ModelError: nothing matches, or a layer cannot be adapted.
    """
    if isinstance(module, ZooLinear):
        return _on(module, config, adapter_name)
    if layer_kind(module) is None:
        return inject_adapter_in_model(config, module, adapter_name)
    return _on(ZooLinear(module.requires_grad_(False)), config, adapter_name)


def _on(layer: ZooLinear, config: ZooConfig, adapter_name: str) -> ZooLinear:
    layer.add_adapter(adapter_name, config)
    layer.set_adapter([adapter_name])
    return layer
