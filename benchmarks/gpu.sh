#!/usr/bin/env bash
# The GPU list: measurements for a rented GPU, done in slices that may be stopped at any moment.
#
#   benchmarks/gpu.sh --bring          where the project is installed: pack what the rented machine lacks into .gpu/1,
#                                      .gpu/2, ... (data/prepared, AutoAttack, the commit), each below 64 MiB; copy them
#   benchmarks/gpu.sh --minutes 9      there: one slice; again and again, until it says that everything is measured
#   benchmarks/gpu.sh --miniature --state DIR --results FILE     the whole list, tiny, on a CPU
#
# It needs PyTorch 2.11 or later, torchvision, numpy and safetensors (and a C compiler, else it runs eagerly). Figures
# go into docs/results.md, which is to be copied back. What a slice leaves behind lies in --state (.gpu/state): finished
# epochs, attacked batches and shards, so that nothing but minutes is lost, whatever ends it.
#
# A machine that is given back loses its state. A training's state is too large to be copied often (about 250 MB for
# PreActResNet-18), so let one training run on one machine; what else is needed to go on elsewhere is small (weights
# that wait for the rest of their evaluation are 45 MB), here in pieces of 15 MiB:
#   tar -C .gpu/state --exclude training --exclude attacked --exclude finished -c . | split -b 15m - OUT/state-
#   mkdir -p .gpu/state && cat state-* | tar -C .gpu/state -x
# The weights of what is measured lie in .gpu/state/finished.
#
# Exit codes: 0 nothing is left to measure, 130 stopped with something left, 1 something is missing, and it says what.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)
PYTHONPATH=. PYTHONUNBUFFERED=1 exec "${PYTHON:-$python}" benchmarks/gpu.py "$@"
