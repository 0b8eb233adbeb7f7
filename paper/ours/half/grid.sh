# shellcheck shell=bash disable=SC2034,SC2154
# Figures 2 and 5 scaled to two CPU cores: CIFAR-10 at half its size, half the channels, 4,000 steps
# of 32 images, 65 % of the weights pruned at each of three levels.
#
#   python paper/ours/half/halve.py cifar10-jpeg half-cifar10
#   bash run_all.sh --grid paper/ours/half/grid.sh --jobs 2

use half-cifar10 cifar10
K=10 S=1000 T=4000 L=3 levels=3
model+=x8 tail=-steps4000-drops2000+3000-batch32-pad2-prelr0.1
given+=(--width=8 --batch-size=32 --pad=2)

el2n() { # FIGURES: scores at step 1,000
    made=el2n/$model/el2n-batch32-pad2-step1000
    job "$made" '' "$1" '' $((K * S)) 0 el2n.py "${given[@]}" --score-step=1000
    flags+=("--scores=$out/$made/scores.npy")
}

all_six() { # STAGE FIGURE
    "$1" "$2" all 0 0
    "$1" "$2" all 0 400
    "$1" "$2" easy 3200 200
    "$1" "$2" random 3200 200
    "$1" "$2" hard 3200 200
    "$1" "$2" all 0 200
}

training=(--steps=4000 "--milestones=2000,3000" --pretrain-lr=0.1)
extra=("${training[@]}" --prune-fraction=0.65) R=2-4 # 0 and 1 were the pilot's
all_six imp fig2
extra=("${training[@]}") R=2-3
all_six lmc fig5
