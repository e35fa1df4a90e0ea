"""Which implementation of an op runs.

- `eager`: the reference in plain torch operators, differentiated by autograd.
- `cublas`: our order of library matrix products with our own backward; on a CPU the same calls go to its BLAS.
- `triton`: the same order, with our kernels for every product that has one.

`PEFTZOO_BACKEND` overrides the choice; `auto`, the default, takes for each product what is known to be faster (see
`dispatch`), which on a CPU is `cublas`.
"""

from __future__ import annotations

import os

BACKENDS = ("eager", "cublas", "triton")


def backend() -> str:
    """Return the backend that is asked for: one of `BACKENDS`, or "auto".

    Raises:
        ValueError: `PEFTZOO_BACKEND` names none.
    """
    chosen = os.environ.get("PEFTZOO_BACKEND", "auto")
    if chosen != "auto" and chosen not in BACKENDS:
        raise ValueError(f"PEFTZOO_BACKEND={chosen!r} is not a backend; choose auto, {', '.join(BACKENDS)}")
    return chosen
