"""The command line: every command, what it prints, and the code it ends with."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from helpers import assert_close, assert_differs, logits
from peft import PeftModel, get_peft_model
from processes import PEFTZOO, environment, start
from train_helpers import builtin_model, small_recipe
from transformers import AutoModelForCausalLM

import peftzoo
from peftzoo import cli, errors
from peftzoo.core.resources import find_recipe, list_recipes
from peftzoo.train.recipe_file import load_recipe

EXECUTABLE = Path(sys.executable).with_name("peftzoo")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a call of the whole program in this process: exit code, what it said, what it complained of."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["peftzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


@pytest.fixture
def done(run):
    """Return a call that must succeed without a complaint: what it said, spaces between words made one."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return " ".join(out.split())

    return call


@pytest.fixture
def refusal(run):
    """Return a call that must end with `code` and one line of complaint: that line."""

    def call(code, *arguments):
        ended, out, err = run(*arguments)
        assert (ended, out) == (code, "")
        assert re.fullmatch(r"error: [^\n]+\n", err)
        return err.removeprefix("error: ").rstrip()

    return call


# ---------------------------------------------------------------- help


def commands():
    """Return every command there is, as it is typed."""

    def walk(command, path):
        yield path
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, (*path, name))

    return list(walk(typer.main.get_command(cli.app), ()))


def test_the_commands_are_these():
    assert {" ".join(path) for path in commands()} == {
        "", "train", "check", "methods", "recipes", "recipes list", "recipes show", "recipes copy", "inspect",
        "export", "bench", "bench kernels", "bench step", "bench tune",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help(done, command):
    said = done(*command, "--help")
    assert said.startswith(f"Usage: {' '.join(('peftzoo', *command))} ")
    assert "--help Show this message and exit." in said
    assert not re.search(r"[A-Z]\w+: None|:param|Args:", said)


def test_help_names_every_exit_code(done):
    listed = dict(re.findall(r"(\d+) ([a-z ]+)[;,]", done("--help").split("Exit codes: ")[1]))
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert set(map(int, listed)) == {c.exit_code for c in classes} - {1} | {0, 130}


def test_version(done):
    assert done("--version") == f"peftzoo {peftzoo.__version__}"


def test_module_and_command_are_one_program():
    outputs = []
    for command in ([EXECUTABLE], PEFTZOO):
        ran = start(*command, "train", "--help")
        assert (ran.returncode, ran.stderr) == (0, "")
        outputs.append(ran.stdout)
    assert outputs[0] == outputs[1]
    assert "Usage: peftzoo train" in outputs[0]


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["train", "x", "--bogus"], ["recipes", "bogus"], []])
def test_wrong_arguments_end_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert "Usage: peftzoo" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["RecipeError", "DataError", "ModelError", "MemoryLimitError", "NonFiniteError"])
def test_each_error_ends_with_its_code(refusal, monkeypatch, name):
    error = getattr(errors, name)

    def fail(recipe):
        raise error("this is why")

    monkeypatch.setattr(cli, "train_recipe", fail)
    assert refusal(error.exit_code, "train", "quickstart/dates") == "this is why"


def test_interruption_ends_with_130(run, monkeypatch):
    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_recipe", interrupt)
    assert run("train", "quickstart/dates") == (130, "", "")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(recipe):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "train_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["peftzoo", "train", "quickstart/dates"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("key", ["train.learning_rte", "train.learningRate", "train.Learning-Rate"])
@pytest.mark.parametrize("command", ["train", "check"])
def test_misspelt_setting_is_refused_with_the_nearest(refusal, command, key):
    message = refusal(2, command, "quickstart/dates", f"{key}=1e-3")
    assert "did you mean train.learning_rate?" in message.lower()
    assert not list(Path().iterdir())


def test_misspelt_setting_in_a_process_of_its_own():
    ran = start(*PEFTZOO, "train", "quickstart/dates", "train.learning_rte=1e-3")
    assert (ran.returncode, ran.stdout) == (2, "")
    says = "command line: train.learning_rte is not a setting. Did you mean train.learning_rate?"
    assert ran.stderr == f"error: {says}\n"


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, ["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (2, ["train", "quickstart/date"], "Did you mean quickstart/dates?"),
        (2, ["check", "quickstart/dates", "method.name=sorsaa"], "did you mean sorsa?"),
        (2, ["check", "quickstart/dates", "method.r=0"], "r=0 must be an integer >= 1"),
        (3, ["train", "quickstart/dates", "data.train={path: nowhere.jsonl}"], "nowhere.jsonl: cannot be read"),
        (3, ["train", "quickstart/dates", "data.train=builtin/iso-dates:tests"], "tests"),
        (4, ["train", "quickstart/dates", "model.name_or_path=builtin/huge"], "builtin/huge"),
        (4, ["train", "quickstart/dates", "model.adapter_name_or_path=nowhere"], "nowhere is no adapter folder"),
        (4, ["train", "quickstart/dates", "method.target_modules=[q_porj]"], "did you mean q_proj?"),
        (7, ["train", "quickstart/dates", "output.dir=/dev/null"], "output.dir=/dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_trained(refusal, code, arguments, says):
    assert says in refusal(code, *arguments)


@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_reader_that_goes_away(arguments):
    """As with `| head -1`: the reader closes the pipe before the first line is written."""
    pipe = subprocess.PIPE
    command = subprocess.Popen([*PEFTZOO, *arguments], env=environment(), stdout=pipe, stderr=pipe, text=True)
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() in (0, 1)
    command.stderr.close()


# ---------------------------------------------------------------- methods and recipes


def test_methods(run):
    code, out, _ = run("methods")
    table = out.split("\n\n")[0].splitlines()[1:]
    assert code == 0
    assert [line.split()[0] for line in table if not line.startswith(" ")] == peftzoo.list_methods()


def test_settings_of_a_method(method, run):
    code, out, _ = run("methods", method.name)
    assert code == 0
    head, trains, _, _, _, *table = out.splitlines()
    assert head == f"{method.name}: {method.summary} {method.paper}"
    assert trains.startswith(f"trains {', '.join(method.trains)} of layers: {', '.join(method.layers)}")
    rows = {cells[0]: cells[1:] for line in table if len(cells := re.split(r"\s{2,}", line.strip())) > 1}
    assert list(rows) == list(method.settings)
    for name, field in method.settings.items():
        own = field.name == name
        assert len(rows[name]) == 1 + own, f"{name} has no meaning"
        assert rows[name][0] == (str(getattr(method.make_config(), name)) if own else f"another name of {field.name}")


def test_unknown_method(refusal):
    assert refusal(2, "methods", "sorsaa") == "unknown method 'sorsaa'; did you mean sorsa?"


def test_recipes_are_listed_shown_and_copied(run, done, refusal):
    assert done("recipes").split() == done("recipes", "list").split() == list_recipes()
    original = find_recipe("quickstart/dates").read_text(encoding="utf-8")
    assert run("recipes", "show", "quickstart/dates") == (0, original, "")
    assert "peftzoo train dates.yaml" in done("recipes", "copy", "quickstart/dates")
    assert Path("dates.yaml").read_text(encoding="utf-8") == original
    assert refusal(2, "recipes", "copy", "quickstart/dates") == "dates.yaml exists; name another file"
    done("recipes", "copy", "quickstart/dates", "mine.yaml")
    assert load_recipe("mine.yaml") == load_recipe("quickstart/dates")
    assert "nowhere" in refusal(2, "recipes", "copy", "quickstart/dates", "nowhere/x.yaml")
    assert "Did you mean quickstart/dates?" in refusal(2, "recipes", "show", "quickstart/date")


def test_check(done):
    said = done("check", "quickstart/dates", "method.name=paca", "method.target_modules=[q_proj]")
    assert "model: LlamaForCausalLM, 984,192 parameters" in said
    assert "q_proj 128 x 128 4 8,192" in said
    assert "trained: 8,192 of " in said
    assert "[[1962-10-23<|end|>]]" in said
    assert not list(Path().iterdir())


@pytest.mark.parametrize("recipe", list_recipes())
def test_dry_run_loads_back(run, recipe):
    overrides = ["method={name: sorsa}", "train.warmup_steps=3", "train.lr_scheduler_type=linear"]
    overrides += ["train.mixed_precision=no", "model.revision=off"]
    code, out, err = run("train", recipe, "--dry-run", *overrides)
    assert (code, err) == (0, "")
    Path("again.yaml").write_text(out)
    assert load_recipe("again.yaml") == load_recipe(recipe, overrides)
    assert run("train", "again.yaml", "--dry-run") == (0, out, "")
    resolved = yaml.safe_load(out)
    assert resolved["method"] | {"gamma": 4e-4, "seed": resolved["train"]["seed"]} == resolved["method"]
    assert [path.name for path in Path().iterdir()] == ["again.yaml"]


def test_train(done):
    small_recipe()
    said = done("train", "x.yaml", "train.max_steps=1", "data.eval=null")
    assert "the run folder is runs/x" in said
    assert Path("runs/x/final/adapter_model.safetensors").is_file()


# ---------------------------------------------------------------- adapters

TOKENS = torch.arange(24)[None] * 37 % 1000


@pytest.fixture
def trained():
    """An adapter of the built-in model in the folder `adapter`; the base is named as a recipe names it."""

    def save(name, **settings):
        config = peftzoo.get_method(name).make_config(r=4, **settings)
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(builtin_model(), config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():  # little enough to stay clear of bfloat16's rounding, in which the base is stored
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.peft_config["default"].base_model_name_or_path = "builtin/tiny-docs-1m"
        peftzoo.save_adapter(model, "adapter")
        return model.eval()

    return save


def test_inspect(done, trained):
    trained("sorsa", alpha=6.0)
    said = done("inspect", "adapter")
    assert "adapter: sorsa, a peftzoo adapter: opens in peft after `import peftzoo`" in said
    assert "base: builtin/tiny-docs-1m" in said
    assert "r=4 alpha=6.0 dropout=0.0 seed=0 task_type=CAUSAL_LM" in said
    assert re.search(r" s 28 \[4\] float32 112 \S+ yes ", said)
    assert re.search(r" u0 28 \[128, 4\], \[384, 4\] float32 \S+ \S+ yes ", said)
    assert re.search(r" [\d,]+ bytes, sha256 [0-9a-f]{64}$", said)


def test_inspect_of_a_stock_folder(done, trained):
    trained("lora", alpha=6.0)
    said = done("inspect", "adapter")
    assert "adapter: LORA, a stock peft adapter: opens without peftzoo" in said
    assert re.search(r" lora_A 28 \[4, 384\], \[4, 128\] float32 ", said)
    assert "lora_alpha=6" in said


@pytest.mark.parametrize("name", ["lora", "paca", "sorsa"])
def test_export_as_lora(done, trained, name):
    want = logits(trained(name, alpha=6.0), TOKENS)
    assert_differs(want, logits(builtin_model(), TOKENS))
    assert "wrote plain; its logits differ by " in done("export", "adapter", "--lora", "--out", "plain")
    stock = PeftModel.from_pretrained(builtin_model(), "plain")
    assert type(stock.peft_config["default"]).__name__ == "LoraConfig"
    assert stock.peft_config["default"].peft_type == "LORA"
    assert_close(logits(stock.eval(), TOKENS), want)


@pytest.mark.parametrize("name", ["lora", "paca", "sorsa"])
def test_export_merged(done, trained, name):
    want = logits(trained(name, alpha=6.0), TOKENS)
    done("export", "adapter", "--merge", "--out", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert merged.dtype == torch.bfloat16, "as the base was saved"
    change = (want - logits(builtin_model(), TOKENS)).norm()
    assert (logits(merged.float(), TOKENS) - want).norm() < 0.1 * change
    assert {"tokenizer.json", "tokenizer_config.json"} < {path.name for path in Path("merged").iterdir()}


def test_export_names_what_it_cannot_do(refusal, trained):
    trained("lora")
    for flags in ([], ["--merge", "--lora"]):
        assert refusal(2, "export", "adapter", "--out", "x", *flags) == "give one of --merge and --lora"
    assert "adapter is not empty" in refusal(2, "export", "adapter", "--out", "adapter", "--lora")
    assert "no built-in model" in refusal(4, "export", "adapter", "--out", "x", "--lora", "--base", "builtin/other")
    assert "--base" in refusal(4, "export", "adapter", "--out", "x", "--merge", "--base", "no/such-model")
    assert not Path("x").exists()


def test_export_of_an_adopted_method(refusal, trained):
    trained("vera")
    message = refusal(4, "export", "adapter", "--out", "x", "--lora")
    assert message == "adapter: peft's VERA adapters are converted with peft"


@pytest.mark.parametrize(
    "command", [["inspect"], ["export", "--lora", "--out", "x"], ["export", "--merge", "--out", "x"]]
)
def test_bad_adapter_folder_ends_with_4(refusal, trained, command):
    assert "nowhere is no adapter folder" in refusal(4, *command, "nowhere")
    trained("sorsa")
    weights = Path("adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "adapter_model.safetensors: " in refusal(4, *command, "adapter")
    weights.unlink()
    assert "adapter has no adapter_model.safetensors" in refusal(4, *command, "adapter")
    assert not Path("x").exists()
