"""The tasks a recipe may name.

The loop asks a task for ``examples``, ``notes``, ``describe``, ``collate``, ``count``, ``load_model``, ``evaluate``
and ``peft_task_type``, the check also for ``empty_model``; they know nothing else of it.
"""

from __future__ import annotations

from peftzoo.train.causal_lm import CausalLM

TASKS = {"causal-lm": CausalLM}
