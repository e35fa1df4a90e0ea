"""What a recipe may say: every setting with its type, unit, bounds and default.

Each part checks itself; a rule that joins two parts stands in `Recipe`. `peftzoo.train.recipe_file` reads recipes from
YAML and turns pydantic's complaints into one line per problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self, TypedDict

from peftzoo.core.registry import find_method, get_method
from peftzoo.train.files import READERS, SUFFIXES
from peftzoo.train.recipe_method import MethodSettings
from peftzoo.train.recipe_part import STRICT, Count, Part, Seed, Text, wrong

RETIRED = {"warmup_ratio": "Write warmup_steps: below 1 it is a fraction of all steps."}
"""Names that upstream dropped, each with what to write now."""


class ModelSettings(Part):
    """The base model, and the adapter to go on from."""

    name_or_path: Text = Field(description="builtin/..., a folder, or a name on the Hub")
    revision: Text | None = Field(default=None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto (as the model was saved), float32, bfloat16 or float16"
    )
    attn_implementation: Text | None = Field(default=None, description="as in transformers, such as sdpa or eager")
    adapter_name_or_path: Text | None = Field(
        default=None, description="saved adapter to start from, zoo or stock LoRA"
    )


class DataSource(Part):
    """Rows from a file or from the Hub."""

    path: Text | None = Field(default=None, description=f"a {SUFFIXES} file, relative to the working directory")
    hub: Text | None = Field(default=None, description="a data set on the Hub")
    name: Text | None = Field(default=None, description="the configuration of a data set on the Hub")
    split: Text | None = Field(default=None, description="the split of a data set on the Hub; none: train")
    max_rows: Count | None = Field(default=None, description="use only the first so many rows")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"give exactly one of path (a {SUFFIXES} file) and hub (a data set on the Hub)")
        if self.path is not None:
            if Path(self.path).suffix not in READERS:
                raise wrong("path", f"{self.path!r} is no {SUFFIXES} file", self.path)
            for key in ("name", "split"):
                if getattr(self, key) is not None:
                    raise wrong(key, "is for data from the Hub; a file has none", getattr(self, key))
        return self


def _builtin_data(text: str) -> str:
    family, _, rest = text.partition("/")
    name, _, split = rest.partition(":")
    if family != "builtin" or not name or not split:
        raise ValueError(
            f"{text!r} is not built-in data such as builtin/iso-dates:train; "
            "write {path: FILE.jsonl}, or {hub: NAME, split: SPLIT} for data from the Hub"
        )
    return text


Source = Annotated[
    Annotated[str, AfterValidator(_builtin_data), Tag("text")] | Annotated[DataSource, Tag("section")],
    Discriminator(lambda value: "section" if isinstance(value, (Mapping, DataSource)) else "text"),
]


class Columns(TypedDict, total=False):
    """Our field -> its column in the data, where the two differ."""

    __pydantic_config__ = STRICT  # type: ignore[misc]  # pydantic reads it, and it is no key of the dictionary

    prompt: Text
    completion: Text
    text: Text


class DataSettings(Part):
    """What is learnt from, what is evaluated on, and how a row becomes tokens."""

    train: Source = Field(description="builtin/NAME:SPLIT, or a section with path or hub")
    eval: Source | None = Field(default=None, description="like train; none: no evaluation")
    format: Literal["prompt-completion", "text"] = Field(
        default="prompt-completion", description="the fields of a row: prompt-completion or text"
    )
    mask_prompt: bool = Field(default=True, description="leave the prompt out of the loss (text has no prompt)")
    max_length: Count = Field(default=512, description="tokens of a row, prompt and completion together")
    columns: Columns = Field(default_factory=Columns, description="our field -> column, where they differ")

    @model_validator(mode="after")
    def _columns_of_format(self) -> Self:
        for key, column in self.columns.items():
            if key not in self.format.split("-"):
                raise wrong(("columns", key), f"format {self.format} has no field {key}", column)
        return self

    @model_validator(mode="after")
    def _eval_is_chosen(self) -> Self:
        # the split defaults to train, which nobody means to evaluate on
        if isinstance(self.eval, DataSource) and self.eval.hub is not None and self.eval.split is None:
            raise wrong(("eval", "split"), f"name the split of {self.eval.hub} to evaluate on", None)
        return self


class TrainSettings(Part):
    """How long, how fast, and in which precision."""

    max_steps: Count | None = Field(default=None, description="optimizer steps; wins over num_train_epochs")
    num_train_epochs: float = Field(default=1.0, gt=0, le=1e6, description="passes over the training rows")
    per_device_train_batch_size: Count = Field(default=8, description="rows per device and forward pass")
    gradient_accumulation_steps: Count = Field(default=1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="the peak rate, absolute; auto: lora_learning_rate times the method's factor"
    )
    lora_learning_rate: float = Field(default=2.0e-4, gt=0, description="the peak rate that suits LoRA on this task")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="linear, cosine, constant or constant_with_warmup"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0, description="optimizer steps, or a fraction of them when below 1"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW, per step and unit of learning rate")
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradients are clipped to this norm; 0: no clipping")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="no, bf16 or fp16 autocast")
    activation_checkpointing: bool = Field(
        default=False, description="compute each block anew in the backward: less memory, more time"
    )
    seed: Seed = Field(default=0, description="of data order, dropout and the adapter's start")
    logging_steps: Count = Field(default=10, description="optimizer steps between two lines of the log")

    @model_validator(mode="before")
    @classmethod
    def _name_of_before(cls, settings: object) -> object:
        """Take transformers' name of before 5.23 for activation_checkpointing."""
        old, new = "gradient_checkpointing", "activation_checkpointing"
        if isinstance(settings, Mapping) and old in settings and new not in settings:
            return {new if key == old else key: value for key, value in settings.items()}
        return settings

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise wrong("warmup_steps", f"must be below max_steps {self.max_steps}", self.warmup_steps)
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise wrong("warmup_steps", "needs lr_scheduler_type constant_with_warmup", self.warmup_steps)
        return self


class GenerateSettings(Part):
    """How answers are generated for evaluation: greedily, up to a length."""

    max_new_tokens: Count = Field(default=16, description="tokens of an answer")


class EvalSettings(Part):
    """How the model is judged; always before and after training."""

    steps: Count | None = Field(default=None, description="also evaluate every so many optimizer steps")
    per_device_eval_batch_size: Count = Field(default=32, description="rows per device and forward pass")
    metrics: list[Literal["exact_match", "perplexity"]] = Field(
        default=["exact_match"], description="of exact_match and perplexity"
    )
    generate: GenerateSettings = Field(
        default=GenerateSettings(), description="max_new_tokens: tokens of an answer, 16 by default"
    )
    show_samples: int = Field(default=4, ge=0, le=1000, description="answers printed before and after")


class OutputSettings(Part):
    """Where the run is written."""

    dir: Text = Field(description="the run folder, relative to the working directory")
    plots: bool = Field(default=True, description="draw loss.png")


class Recipe(Part):
    """One run, complete: what to train, never where to run it."""

    version: int = Field(default=1, ge=1, le=1, description="of this schema")
    task: Literal["causal-lm"] = "causal-lm"
    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    output: OutputSettings

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the number given, or for auto the LoRA rate times the method's factor."""
        rate = self.train.learning_rate
        return self.train.lora_learning_rate * get_method(self.method.name).lr_factor if rate == "auto" else rate

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, recipe: object) -> object:
        """Let the run's seed be the adapter's, unless the method section names one."""
        if not isinstance(recipe, Mapping):
            return recipe
        method, train = recipe.get("method"), recipe.get("train") or {}
        found = find_method(method.get("name")) if isinstance(method, Mapping) else None
        if not isinstance(method, Mapping) or found is None:
            return recipe
        settings = found.settings
        given = {settings[key].name for key in method if key in settings}
        seed = train.get("seed", 0) if isinstance(train, Mapping) else 0
        if "seed" not in settings or settings["seed"].name in given or type(seed) is not int or seed < 0:
            return recipe
        return {**recipe, "method": {**method, "seed": seed}}

    @model_validator(mode="after")
    def _eval_fits_data(self) -> Self:
        if self.data.eval is None:
            if self.eval.steps is not None:
                raise wrong(("eval", "steps"), "needs rows to evaluate on: set data.eval", self.eval.steps)
        elif self.data.format == "text" and "exact_match" in self.eval.metrics:
            raise wrong(
                ("eval", "metrics"),
                "exact_match compares completions, and data.format text has none; write [perplexity]",
                self.eval.metrics,
            )
        return self
