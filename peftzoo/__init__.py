"""peftzoo: adapter layers, their kernels and one trainer.

Importing it makes peft and transformers know the zoo: `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter`
and `load_adapter` work on zoo adapters from then on.
"""

import logging as _logging
import os as _os
import sys as _sys

if "torch" not in _sys.modules:
    # OpenMP threads that spin while they wait take a small machine's cores from each other; read when torch loads
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# peft imports bitsandbytes, which on some CPUs warns that a package of optional kernels is not installed
_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(_logging.ERROR)

from importlib.metadata import version as _version

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.attach import attach
from peftzoo.core.calibrate import calibrate
from peftzoo.core.config import ZooConfig
from peftzoo.core.fuse import FuseReport, fuse, unfuse
from peftzoo.core.groups import parameter_groups
from peftzoo.core.hooks import after_step, penalty, regularizer
from peftzoo.core.layer import ZooLinear
from peftzoo.core.model import ZooModel
from peftzoo.core.registry import Method, adopt, get_method, list_methods, register
from peftzoo.core.storage import load_adapter, save_adapter
from peftzoo.methods.dora import DoraConfig
from peftzoo.methods.eva import EvaConfig
from peftzoo.methods.loldu import LolduConfig
from peftzoo.methods.lora import LoraConfig
from peftzoo.methods.lora_fa import LoraFaConfig
from peftzoo.methods.lora_plus import LoraPlusConfig
from peftzoo.methods.nola import NolaConfig
from peftzoo.methods.paca import PacaConfig
from peftzoo.methods.randlora import RandloraConfig
from peftzoo.methods.rslora import RsloraConfig
from peftzoo.methods.salt import SaltConfig
from peftzoo.methods.sorsa import SorsaConfig

__version__ = _version("peftzoo")

__all__ = [
    "DoraConfig",
    "EvaConfig",
    "Factors",
    "FuseReport",
    "LinearAdapter",
    "LolduConfig",
    "LoraConfig",
    "LoraFaConfig",
    "LoraPlusConfig",
    "Method",
    "NolaConfig",
    "PacaConfig",
    "RandloraConfig",
    "RsloraConfig",
    "SaltConfig",
    "SorsaConfig",
    "ZooConfig",
    "ZooLinear",
    "ZooModel",
    "__version__",
    "adopt",
    "after_step",
    "attach",
    "calibrate",
    "fuse",
    "get_method",
    "list_methods",
    "load_adapter",
    "parameter_groups",
    "penalty",
    "register",
    "regularizer",
    "save_adapter",
    "unfuse",
]
