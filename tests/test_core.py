"""What the suite over the methods does not see: targets, names, mixed adapters, the registry, bad files, randomness."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from train_helpers import small_recipe
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftzoo
from peftzoo import LinearAdapter, LoraConfig, PacaConfig, SorsaConfig, ZooConfig, registry_entry_points
