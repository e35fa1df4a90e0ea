"""The table of methods: on the command line and in the docs it is what the methods declare."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from processes import ROOT
from train_helpers import builtin_model

import peftzoo
from peftzoo import cli, method_table
from peftzoo.core.counts import count_trained
from peftzoo.core.registry import list_peft_methods
from peftzoo.method_table import BEGIN, END, capabilities, pages, with_table
from peftzoo.train.parameters import describe_model, trained_parameters

MODEL = "builtin/tiny-docs-1m"


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a call of the whole program in this process: exit code, what it said, what it complained of."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["peftzoo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def rows(out):
    """Return {first cell: the other cells} of a printed table; columns are two spaces apart, or more."""
    head, *lines = out.split("\n\n")[0].splitlines()
    columns = re.split(r"\s{2,}", head.strip())
    table = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert all(len(row) == len(columns) for row in table)
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in table}


def test_the_pages_are_current():
    """`make methods-table` would change nothing."""
    found = pages(ROOT)
    assert [page.relative_to(ROOT).as_posix() for page in found] == ["README.md", "docs/methods/README.md"]
    for page, text in found.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is stale: run `make methods-table`"


def test_the_docs_table_says_what_each_declares(method):
    text = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in cells if row[0] == f"[{method.name}]({method.name}.md)"]
    said = dict(zip(cells[0], row, strict=True))
    assert said["rate"] == f"x{method.lr_factor:g}"
    assert said["trained tensors"] == ", ".join(f"`{name}`" for name in method.trains)
    assert said["FSDP"] == ("yes" if method.fsdp else "no")
    assert said["compile"] == ("yes" if method.compile else "no")
    assert said["edits base"] == (method.edits_base or "no")
    assert said["as LoRA"] == ("is one" if method.stock_lora else method.to_lora or "no")
    assert ("4bit" in said["quantised"], "8bit" in said["quantised"]) == tuple(
        f"bnb-{bits}bit" in method.layers for bits in (4, 8)
    )
    assert (said["data"] == "no") == (method.calibrate is None)
    assert method.paper.removeprefix("arXiv:") in said["paper"]
    assert said["parameters"] == f"{trained_parameters(describe_model(MODEL), method, {'r': 16}):,}"


def test_a_start_from_data_is_told_from_an_option():
    assert capabilities(peftzoo.get_method("eva"))["data"] == "yes"
    assert capabilities(peftzoo.get_method("lora"))["data"] == "option"
    assert capabilities(peftzoo.get_method("sorsa"))["data"] == "no"


def test_with_table_keeps_the_page_around_it():
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert with_table(page, "new\n") == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"
    for broken in ("no marks", BEGIN, END):
        with pytest.raises(ValueError, match="the page has no"):
            with_table(broken, "new\n")


def test_every_page_of_the_table_exists():
    for line in method_table.full_table().splitlines()[2:]:
        name = re.match(r"\| \[(\w+)\]", line)[1]
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


# ---------------------------------------------------------------- on the command line


def test_the_list_says_what_each_declares(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    table = rows(out)
    assert list(table) == peftzoo.list_methods()
    for name, said in table.items():
        method = peftzoo.get_method(name)
        assert said == capabilities(method) | {"summary": method.summary}
    others = out.strip().splitlines()[-1]
    assert others == f"peft's other types, by name and untested here: {', '.join(list_peft_methods())}"


def test_parameters_of_a_model(run):
    code, out, err = run("methods", "--model", MODEL, "r=4", "target_modules=[q_proj, v_proj]")
    assert (code, err) == (0, "")
    base = describe_model(MODEL)
    for name, said in rows(out).items():
        method = peftzoo.get_method(name)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        config = method.make_config(**{k: v for k, v in settings.items() if k in method.settings})
        assert said["parameters"] == f"{count_trained(base, config):,}"


def test_parameters_of_one_method(run):
    code, out, err = run("methods", "sorsa", "r=4", "--model", MODEL)
    assert (code, err) == (0, "")
    want = 4 * sum(sum(m.weight.shape) + 1 for n, m in builtin_model().named_modules() if n.endswith("_proj"))
    assert f"\n{want:,} parameters of {MODEL} r=4\n" in out


def test_a_model_in_a_folder_needs_its_config_alone(run, tmp_path):
    (tmp_path / "config.json").write_bytes(
        (Path(peftzoo.builtin.model_path("tiny-docs-1m")) / "config.json").read_bytes()
    )
    assert run("methods", "paca", "--model", str(tmp_path))[1].count(" parameters of ") == 1


def test_a_terminal_gets_one_line_a_method(run, monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 90)
    table = run("methods")[1].split("\n\n")[0].splitlines()
    assert len(table) == 1 + len(peftzoo.list_methods())
    assert max(map(len, table)) <= 90


def test_a_setting_that_one_method_lacks_counts_for_the_others(run):
    table = rows(run("methods", "--model", MODEL, "gamma=0.1", "r=2")[1])
    assert list(table) == peftzoo.list_methods()
    assert all(re.fullmatch(r"[\d,]+", said["parameters"]) for said in table.values())


def test_a_method_that_does_not_fit_says_why_in_its_row(run):
    code, out, _ = run("methods", "--model", MODEL, "r=1000")
    assert code == 0
    assert "exceeds the rank" in rows(out)["sorsa"]["parameters"]
    assert re.fullmatch(r"[\d,]+", rows(out)["lora"]["parameters"])


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, ["r=4"], "r=4 is for counting parameters; name the model with --model"),
        (2, ["lora", "r", "--model", MODEL], "'r' is not of the form setting=value"),
        (2, ["lora", "rr=4", "--model", MODEL], "rr is not a setting of lora; did you mean r?"),
        (2, ["lora", "r=0", "--model", MODEL], "r=0 must be an integer >= 1"),
        (2, ["lora", "r=[", "--model", MODEL], "r: "),
        (2, ["prefix_tuning"], "peft's prefix_tuning trains tokens before the input"),
        (4, ["--model", "builtin/huge"], "builtin/huge"),
        (4, ["--model", "no/such-model"], "no/such-model"),
        (4, ["lora", "target_modules=[qq]", "--model", MODEL], "qq matches no layer"),
        (4, ["shira", "--model", MODEL], "shira cannot be counted without weights"),
    ],
)
def test_what_cannot_be_counted(run, code, arguments, says):
    ended, out, err = run("methods", *arguments)
    assert (ended, out) == (code, "")
    assert err.startswith("error: ")
    assert says in err


def test_a_type_of_pefts_is_shown_by_name(run):
    code, out, _ = run("methods", "boft")
    assert code == 0
    assert out.startswith("boft: peft's own BOFT, by the name of its type.")
    assert re.search(r"^dropout +another name of boft_dropout", out, re.MULTILINE)
