#!/usr/bin/env bash
# On a GPU: run the tests of the kernels on it, measure its table of choices, then layers and steps; leaves the table in
# kernels/peftzoo_kernels/tables/ and the rows, with pictures and Markdown, in kernels/results/NAME/, ready to commit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

name=$($python -c '
import torch
from peftzoo_kernels.dispatch import slug
print(slug(torch.cuda.get_device_name()))')
results=kernels/results/$name
mkdir -p "$results"

TRITON_INTERPRET=0 $python -m pytest -q tests/test_ops.py tests/test_triton.py tests/test_out_scale.py
$python -m peftzoo bench tune --out "kernels/peftzoo_kernels/tables/$name.json" | tee "$results/tune.txt"
$python -m peftzoo bench kernels --rank 16 --dropout 0 --dropout 0.05 --out "$results" \
  --shape 8192,4096,4096 --shape 8192,4096,14336 --shape 8192,14336,4096 \
  --shape 8192,4096,4096+1024+1024 --shape 8192,4096,14336+14336
$python -m peftzoo bench step --method lora --method dora --layers 8 --out "$results"
for kind in kernels step; do
  $python -m peftzoo.bench.report "$results/$kind.jsonl" > "$results/$kind.md"
done
