#!/usr/bin/env bash
# The first run on a GPU, the surest first: build, tests, the convolutions, a step, the kernels, then
# the same bits alone and beside others, and what SIGTERM leaves.
#
#   bash bench/card.sh [FOLDER]     the log, step.json and what is run go to FOLDER [results/card]
#
# Each part ends with its status, and none stops the others.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
out=${1:-results/card}
for python in "${PYTHON-}" "${VIRTUAL_ENV:-.venv}/bin/python" python python3; do
    python=$(command -v "$python") && break
done
mkdir -p -- "$out" || exit

part() { # SECONDS COMMAND...
    printf '\n== %s s: %s\n' "$SECONDS" "${*:2}"
    timeout -k 10 "$@" 2>&1
    echo "-- status $?"
}

bits() { # NAME REPLICATES: trains them side by side in a process of its own; of each its bits
    part 120 "$python" imp.py --out "$out/$1" --replicate "$2" --subset all --rewind 0 --levels 0 \
        --fresh --quiet
    "$python" - "$out/$1" <<'PY'
import pathlib, sys, runs
for path in sorted(pathlib.Path(sys.argv[1]).glob("imp/*/*/rep*/level00.pt")):
    print(path.parent.name, runs.fingerprint(runs.load_tensors(path)["model"]))
PY
}

cifar_shaped() { # an .npz of random images of CIFAR's shape and layout, through a stage
    "$python" - "$out/random.npz" <<'PY'
import sys, numpy as np
draw = np.random.default_rng(0)
images = draw.integers(0, 256, (50000, 3, 32, 32), dtype=np.uint8).transpose(0, 2, 3, 1)
labels = np.arange(50000) % 10
np.savez(sys.argv[1], train_images=images, train_labels=labels, test_images=images[:10000],
         test_labels=labels[:10000])
PY
    part 240 "$python" imp.py --out "$out/cifar-shaped" --dataset "$out/random.npz" \
        --preset cifar10 --subset random --size 3200 --rewind 200 --steps 1000 --levels 1 \
        --replicate 0-3 --fresh
}

interrupted() { # SIGTERM half a minute into a run that would take hours: 143, and a checkpoint
    "$python" imp.py --out "$out/interrupted" --subset all --rewind 0 --levels 0 --steps 10000000 \
        --milestones 9000000 --checkpoint-every 9999 --fresh --quiet &
    sleep 30
    kill -TERM $!
    wait $!
    echo "-- status $? (143), checkpoints: $(find "$out/interrupted" -name checkpoint.pt | wc -l) (1)"
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    part 120 "$python" -m csrc
    part 240 "$python" -m pytest -m gpu -q -p no:cacheprovider
    part 60 "$python" bench/conv.py
    part 240 "$python" bench/step.py --rows 1,4 --repeats 3 --json "$out/step.json"
    part 120 env CUDA_DEVICE_MAX_CONNECTIONS=32 "$python" bench/step.py --rows 1,4,10 --repeats 3 \
        --only graph
    part 60 "$python" bench/csrc.py
    cifar_shaped
    echo "the bits of rep2 must be the same"
    bits together 0-3
    bits alone 2
    interrupted
} 2>&1 | tee -- "$out/card.log"
