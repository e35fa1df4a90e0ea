"""The table of methods, from what each declares: for the command line and, written by this module, for the docs.

`python -m peftzoo.method_table` in a checkout writes it into README.md and docs/methods/README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from peftzoo.core.config import ZooConfig
from peftzoo.core.registry import Method, get_method, list_methods
from peftzoo.train.parameters import describe_model, trained_parameters

BEGIN, END = "<!-- methods: `make methods-table` -->", "<!-- end of methods -->"
COUNTED_ON, COUNTED_WITH = "builtin/tiny-docs-1m", {"r": 16}  # the model and the rank of quickstart/dates


def capabilities(method: Method) -> dict[str, str]:
    """Return what a method declares, each by the name of its column, in few words."""
    config = method.config() if method.calibrate is not None else None
    at_once = isinstance(config, ZooConfig) and config.needs_data
    packed = [kind.removeprefix("bnb-") for kind in method.layers if kind.startswith("bnb-")]
    return {
        "rate": f"x{method.lr_factor:g}",
        "data": "no" if config is None else "yes" if at_once else "option",
        "edits base": method.edits_base or "no",
        "quantised": ", ".join(packed) if packed else "no",
        "FSDP": "yes" if method.fsdp else "no",
        "compile": "yes" if method.compile else "no",
        "as LoRA": "is one" if method.stock_lora else method.to_lora or "no",
    }


def layers_of(method: Method) -> str:
    """Return the kinds of layers a method adapts, in a sentence's words."""
    return ", ".join(method.layers) or "every kind that peft's code for it knows"


def readme_table() -> str:
    """Return the short table: what is trained, and what it costs to choose it."""
    rows = [["method", "rate", "as LoRA", "summary", "paper"]]
    for method in map(get_method, list_methods()):
        says = capabilities(method)
        link = f"[{method.name}](docs/methods/{method.name}.md)"
        rows.append([link, says["rate"], says["as LoRA"], method.summary, _paper(method)])
    return _markdown(rows)


def full_table() -> str:
    """Return the long table: everything that is declared, and the parameters trained on the built-in model."""
    model = describe_model(COUNTED_ON)
    rows: list[list[str]] = []
    for method in map(get_method, list_methods()):
        says = capabilities(method)
        rows = rows or [["method", "trained tensors", *says, "layers", "parameters", "paper"]]
        trains = ", ".join(f"`{name}`" for name in method.trains)
        count = f"{trained_parameters(model, method, COUNTED_WITH):,}"
        link = f"[{method.name}]({method.name}.md)"
        rows.append([link, trains, *says.values(), layers_of(method), count, _paper(method)])
    return _markdown(rows)


def with_table(text: str, table: str) -> str:
    """Return a page with `table` between its two marks.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def pages(root: Path) -> dict[Path, str]:
    """Return the pages of a checkout that hold a table -> what they should say."""
    tables = {root / "README.md": readme_table(), root / "docs" / "methods" / "README.md": full_table()}
    return {page: with_table(page.read_text(encoding="utf-8"), table) for page, table in tables.items()}


def _paper(method: Method) -> str:
    number = re.fullmatch(r"arXiv:([\d.]+)", method.paper)
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else method.paper


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body]) + "\n"


if __name__ == "__main__":
    for page, text in pages(Path(__file__).parent.parent).items():
        page.write_text(text, encoding="utf-8")
