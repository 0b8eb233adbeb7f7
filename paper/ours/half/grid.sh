# shellcheck shell=bash disable=SC2034,SC2154
# Figures 2 and 5 scaled to two CPU cores: CIFAR-10 at half its size, half the channels, 4,000 steps
# of 32 images, 65 % of the weights pruned at each of three levels.
#
#   python paper/ours/half/halve.py cifar10-png half-cifar10
#   bash run_all.sh --grid paper/ours/half/grid.sh --jobs 2

use half-cifar10 cifar10
given+=(--width=8 --batch-size=32 --pad=2)
el2n fig2 --score-step=1000
scores=$made

all_six() { # STAGE FIGURE
    "$1" "$2" all 0 0
    "$1" "$2" all 0 400
    "$1" "$2" easy 3200 200
    "$1" "$2" random 3200 200
    "$1" "$2" hard 3200 200
    "$1" "$2" all 0 200
}

training=(--steps=4000 "--milestones=2000,3000" --pretrain-lr=0.1)
extra=("${training[@]}" --prune-fraction=0.65) levels=3 R=2-4 # 0 and 1 were the pilot's
all_six imp fig2
extra=("${training[@]}") R=2-3
all_six lmc fig5
