"""Which implementation of an op runs.

- `eager`: the reference in plain torch operators, differentiated by autograd.
- `cublas`: our order of library matrix products with our own backward; on a CPU the same calls go to its BLAS.

`PEFTZOO_BACKEND` overrides the choice; `auto`, the default, is `cublas`.
"""

from __future__ import annotations

import os

BACKENDS = ("eager", "cublas")


def backend() -> str:
    """Return the backend that is in force.

    Raises:
        ValueError: `PEFTZOO_BACKEND` names none.
    """
    chosen = os.environ.get("PEFTZOO_BACKEND", "auto")
    if chosen == "auto":
        return "cublas"
    if chosen not in BACKENDS:
        raise ValueError(f"PEFTZOO_BACKEND={chosen!r} is not a backend; choose auto, {' or '.join(BACKENDS)}")
    return chosen
