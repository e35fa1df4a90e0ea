"""The command line: parse, call, print."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import peftzoo
from peftzoo.bench import kernels as bench_kernels
from peftzoo.bench import report as bench_report
from peftzoo.bench import step as bench_step
from peftzoo.bench import tune as bench_tune
from peftzoo.core.registry import Method, get_method, list_methods, list_peft_methods
from peftzoo.core.resources import find_recipe, list_recipes
from peftzoo.core.setting_help import setting_help
from peftzoo.errors import RecipeError, ZooError
from peftzoo.export import export_lora, export_merged
from peftzoo.inspection import inspect_adapter
from peftzoo.method_table import capabilities, layers_of
from peftzoo.train.check import check as check_recipe
from peftzoo.train.loop import train as train_recipe
from peftzoo.train.parameters import describe_model, parse_settings, trained_parameters
from peftzoo.train.recipe_file import load_recipe
from peftzoo.train.recipe_yaml import dump

EXIT_CODES = (
    "Exit codes: 0 done; 2 bad recipe or arguments; 3 data; 4 model or adapter; 5 out of memory; "
    "6 training not finite; 7 run folder; 8 wrong results in a benchmark; 130 interrupted, after a save."
)

app = typer.Typer(
    help="Adapter layers, their kernels and one trainer for fine-tuning.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The recipes that come with peftzoo.", no_args_is_help=False, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
bench_app = typer.Typer(
    help="Time a layer or a training step, ours beside peft's and other tools', over the frozen floor.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")
# what is not a terminal has no edge to wrap at
console = Console(soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 300)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a recipe, or path of a .yaml file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings to change, such as method.r=32")
]
BenchFolder = Annotated[Path, typer.Option("--out", help="folder of the results; FOLDER-2, ... where it has some")]
BenchOnly = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="an implementation beside the floor; repeatable")
]
BenchRounds = Annotated[int | None, typer.Option("--rounds", min=1, help="in which every implementation has its turn")]
AdapterFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="an adapter folder, such as RUN/final")]


@app.callback(invoke_without_command=True)
def _peftzoo(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        console.print(f"peftzoo {peftzoo.__version__}")
        raise typer.Exit


@app.command(epilog=EXIT_CODES)
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the complete recipe and train nothing")] = False,
) -> None:
    """Train what RECIPE describes and leave the adapter and its record in the run folder."""
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        console.print(dump(loaded.model_dump()), end="")
    else:
        train_recipe(loaded)


@app.command(epilog=EXIT_CODES)
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check RECIPE without loading weights: settings, target modules, one row with its trained tokens marked."""
    check_recipe(load_recipe(recipe, overrides or []))


@app.command(epilog=EXIT_CODES)
def methods(
    name: Annotated[str | None, typer.Argument(help="show what this method declares, and its settings")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="with --model: settings such as r=32")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="count what is trained of this model, from its config alone")
    ] = None,
) -> None:
    """List the methods and what each can do, or the settings of one; with --model, what they train of a model."""
    written = list(settings or [])
    if name is not None and "=" in name:
        written.insert(0, name)
        name = None
    if written and model is None:
        raise RecipeError(f"{written[0]} is for counting parameters; name the model with --model")
    given = parse_settings(written)
    base = None if model is None else describe_model(model)
    if name is None:
        _print_methods(base, given)
        return
    try:
        method = get_method(name)
    except KeyError as error:
        raise RecipeError(error.args[0]) from None
    count = None if base is None else trained_parameters(base, method, given)
    console.print(f"{method.name}: {method.summary} {method.paper}")
    console.print(f"trains {', '.join(method.trains)} of layers: {layers_of(method)}")
    console.print("; ".join(f"{what}: {says}" for what, says in capabilities(method).items()))
    if count is not None:
        console.print(f"{count:,} parameters of {model} {' '.join(written)}")
    console.print()
    config, meanings = method.make_config(), setting_help(method.config)
    table = _table("setting", "default", "meaning")
    for setting in method.settings:
        own = method.aliases.get(setting, setting)
        default = str(getattr(config, own)) if own == setting else ""
        table.add_row(setting, default, meanings.get(own, "") if own == setting else f"another name of {own}")
    console.print(table)


@recipes_app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """List the recipes."""
    for name in list_recipes():
        console.print(name)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="name of a recipe")]) -> None:
    """Print a recipe."""
    console.print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="name of a recipe")],
    to: Annotated[Path | None, typer.Argument(help="file to write; default: its last name, here")] = None,
) -> None:
    """Copy a recipe to a file of your own."""
    source = find_recipe(name)
    target = to or Path(source.name)
    if target.exists():
        raise RecipeError(f"{target} exists; name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror}") from error
    console.print(f"{target}: train it with `peftzoo train {target}`")


@app.command(epilog=EXIT_CODES)
def inspect(adapter: AdapterFolder) -> None:
    """Show what is in an adapter folder: format, base, settings, tensors, norms, digest."""
    found = inspect_adapter(adapter)
    console.print(f"{adapter}: {found.format}")
    console.print(f"base: {found.config.get('base_model_name_or_path') or 'not named'}")
    shown = ("r", "alpha", "lora_alpha", "dropout", "lora_dropout", "seed", "task_type")
    console.print("  ".join(f"{key}={found.config[key]}" for key in shown if found.config.get(key) is not None))
    table = _table("tensor", "count", "shapes", "dtype", "parameters", "norm", "finite")
    for group in found.groups:
        shapes = ", ".join(str(list(shape)) for shape in group.shapes[:3]) + (" ..." if len(group.shapes) > 3 else "")
        row = [group.name, str(group.count), shapes, group.dtype, f"{group.parameters:,}", f"{group.norm:.4g}"]
        table.add_row(*row, "yes" if group.finite else "NO")
    console.print(table)
    console.print(f"{found.bytes:,} bytes, sha256 {found.sha256}")


@app.command(epilog=EXIT_CODES)
def export(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Option("--out", help="folder to write; must be new or empty")],
    merge: Annotated[bool, typer.Option("--merge", help="the base model with the adapter merged in")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="a stock peft LoRA folder with the same outputs")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="with --lora: the nearest plain LoRA of this rank instead")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="base model, if not the one the adapter names")] = None,
) -> None:
    """Write an adapter for use elsewhere, and check that what was written gives the same logits."""
    if merge == lora:
        raise RecipeError("give one of --merge and --lora")
    if merge and rank is not None:
        raise RecipeError("--rank goes with --lora; a merged model has no rank")
    done = export_merged(adapter, out, base) if merge else export_lora(adapter, out, base, rank)
    near = "" if rank is None else f"relative error {done.error:.2g} of the update's norm; "
    console.print(
        f"wrote {done.folder}; {near}its logits differ by {done.change:.2g}, the largest being {done.scale:.3g}"
    )


@bench_app.command("kernels", epilog=EXIT_CODES)
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="M,K,N", help="rows, in, out; M,K,N+N for layers on one input; repeatable"),
    ] = None,
    rank: Annotated[list[int] | None, typer.Option("--rank", help="repeatable")] = None,
    dropout: Annotated[list[float] | None, typer.Option("--dropout", help="repeatable")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="such as float32 or bfloat16; repeatable")] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="lora, dora, out_scale or group; repeatable")] = None,
    only: BenchOnly = None,
    rounds: BenchRounds = None,
    out: BenchFolder = Path("runs/bench"),
) -> None:
    """Time one adapted layer, forward and backward, against the frozen layer, peft and other tools' formulations.

    Without options: a few shapes on a CPU, in a few minutes; the full grid on a GPU. Every DoRA run counts as
    an optimizer step, so the norm of the rows, kept within a step, is paid each time.
    """
    settings = bench_kernels.KernelSettings(
        shape or (), rank or (), dropout or (), dtype or (), op or (), only or (), rounds or 0
    )
    device = _bench_device()
    bench_kernels.plan(settings, device)  # what cannot be is refused before anything is written
    path = bench_report.new_file(out, "kernels.jsonl")
    found = bench_kernels.run(settings, device, path, bench_report.environment(device), _show_rows)
    _end_bench(path, found, bench_kernels.bars(found), device)


@bench_app.command("step", epilog=EXIT_CODES)
def step(
    method: Annotated[list[str] | None, typer.Option("--method", help="of `peftzoo methods`; repeatable")] = None,
    rank: Annotated[int, typer.Option("--rank", min=1)] = 16,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="rows of a step")] = None,
    sequence: Annotated[int | None, typer.Option("--sequence", min=2, help="tokens of a row")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="blocks of the random model on a GPU")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="such as float32 or bfloat16")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute each block")] = False,
    only: BenchOnly = None,
    rounds: BenchRounds = None,
    out: BenchFolder = Path("runs/bench"),
) -> None:
    """Time a training step of the built-in model, on a GPU of random weights in the shape of Llama-3-8B."""
    settings = bench_step.StepSettings(
        method or ("lora",), rank, batch or 0, sequence or 0, layers or 0, dtype or "", checkpointing, only or (),
        rounds or 0,
    )  # fmt: skip
    device = _bench_device()
    bench_step.plan(settings, device)
    path = bench_report.new_file(out, "step.jsonl")
    found = bench_step.run(settings, device, path, bench_report.environment(device), _show_rows)
    _end_bench(path, found, bench_step.bars(found), device)


@bench_app.command("tune", epilog=EXIT_CODES)
def tune(
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="M,K,N", help="rows, in, out of a layer; repeatable")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option("--rank", help="repeatable")] = None,
    dropout: Annotated[list[float] | None, typer.Option("--dropout", help="beside 0; repeatable")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="such as bfloat16; repeatable")] = None,
    rounds: BenchRounds = None,
    out: Annotated[Path | None, typer.Option("--out", help="table to write instead of this machine's own")] = None,
) -> None:
    """Measure which kernels are faster than the library's products on this GPU; training goes by it from then on.

    Without options: the layers of Llama-3-8B in bfloat16. Give the shapes of your own model and its tokens per step
    where they differ much: what was not measured takes the library's product.
    """
    default = bench_tune.TuneSettings()
    settings = bench_tune.TuneSettings(
        shape or default.shapes, rank or default.ranks, dropout or default.dropouts, dtype or default.dtypes,
        rounds or default.rounds,
    )  # fmt: skip
    device = _bench_device()
    found = bench_tune.tune(settings, device, console.print)
    path = bench_tune.store(found, device, out)
    kernels = sum(one.tiles is not None for one in found)
    console.print(f"{kernels} of {len(found)} products are faster by a kernel; wrote them to {path}")


def main() -> None:
    """Run the command line; a problem of the user's becomes one message on stderr and its exit code.

    An interruption (130) and a reader of the output that goes away are typer's to handle, without a word.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for its developers
    try:
        app(prog_name="peftzoo")
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _show_rows(text: str, rows: list[dict[str, Any]]) -> None:
    if text:
        console.print(text)
    for title, of_case in bench_report.cases(rows).items():
        console.print(bench_report.table(title, of_case))
        console.print()


def _end_bench(path: Path, rows: list[dict[str, Any]], bars: list[str], device: torch.device) -> None:
    """Draw the picture and say what was left where; bars are for a CPU."""
    picture = path.with_suffix(".png")
    try:
        bench_report.draw(rows, picture)
    except ImportError:
        console.print(f"{picture.name} was not drawn: `pip install 'peftzoo[plot]'` installs what it takes")
    for line in bars if device.type == "cpu" else ():
        console.print(line)
    console.print(f"wrote {len(rows)} rows to {path}")


def _print_methods(base: PreTrainedModel | None, settings: dict[str, Any]) -> None:
    rows = []
    for name in list_methods():
        method = get_method(name)
        count = {} if base is None else {"parameters": _count(base, method, settings)}
        rows.append({"method": name} | count | capabilities(method) | {"summary": method.summary})
    table = _table(*rows[0])
    for column in table.columns:  # one line a method, the end of its summary cut off where the terminal ends
        column.no_wrap = True
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print("\nrate: usual learning rate, relative to LoRA's. `peftzoo methods NAME` shows paper and settings.")
    console.print(f"peft's other types, by name and untested here: {', '.join(list_peft_methods())}")


def _count(base: PreTrainedModel, method: Method, settings: dict[str, Any]) -> str:
    own = {name: value for name, value in settings.items() if name in method.settings}
    try:
        return f"{trained_parameters(base, method, own):,}"
    except ZooError as error:
        return str(error)


def _table(*columns: Any) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold")
