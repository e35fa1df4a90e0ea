"""`python -m peftzoo`: the same program as `peftzoo`, for `accelerate launch -m peftzoo`."""

from peftzoo.cli import main

main()
