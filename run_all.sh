#!/usr/bin/env bash
# The paper: scores, pre-training and pruning, children, warmup, figures.
#
#   bash run_all.sh --quick                 every stage and figure on the embedded digits, minutes
#   bash run_all.sh                         the full reproduction, here, one run after the other
#   bash run_all.sh --gpus 0,1              ... shared by two GPUs (--jobs N: N runs at a time)
#   bash run_all.sh --only fig2 --dataset cifar10     what one figure of one data set needs
#   bash run_all.sh --cost                  how many runs, network-steps and hours that would be
#   bash run_all.sh --list --wave 1 | xargs -d '\n' -n 1 -P 8 bash -c      any other queue: waves
#                                           1, 2, 3, 4 one after the other, each in any order
#   bash run_all.sh --slurm --partition gpu --gres gpu:1 --time 12:00:00   job arrays on a cluster
#
# Called again, it goes on: finished runs are skipped, failed ones are run again.
#
#   --only FIG       a figure (fig2 ... fig13), several: fig2,fig5
#   --dataset D      digits, cifar10, cifar100, cinic10, or a folder of images (with --preset)
#   --preset P       whose grid and settings a folder gets [cifar10]
#   --out DIR        of results [results]       --data-dir DIR   of data [data]
#   --device NAME    for every stage            --spread         a run for each replicate of
#                                               imp, pretrain and warmup
#   --grid FILE      instead of the paper's: a bash file of calls like `imp fig2 easy 256 20`
#   --rate N         --cost: network-steps per second of ResNet-20 on 128 images, if not measured
#   --partition, --account, --time, --gres, --sbatch OPTION    go to sbatch
set -uf -o pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=results data_dir=data mode=run only='' wave='' datasets=() preset=cifar10 quick='' spread=''
grid='' jobs='' gpus=() device='' rate='' sbatch=() extra=() levels='' sharpness=''
if [[ $here = "$PWD" ]]; then beside=''; else beside=$here/; fi
for python in "${PYTHON-}" "${VIRTUAL_ENV:-$beside.venv}/bin/python" python python3; do
    python=$(command -v "$python") && break
done

fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 2; }

# ---- the grid ------------------------------------------------------------------------------------

# A task is a command: the figures it is for; its wave; the task that makes the scores it needs; and
# the one whose scores are to be named in the command, once their folder is known.
command=() figures=() waves=() need=() scored=()
declare -A known=() # command -> task

# Set before a call, for it alone: label noise; the task whose scores rank the examples instead of
# EL2N's; replicates instead of the stage's.
noise=0 scores='' R=''
declare -A ranked=() # by noise: the task that makes EL2N scores

quote() { # ARGUMENT...: sets `text` to what a shell and Python's shlex both read as them
    local x
    text=''
    for x; do
        [[ $x =~ ^[A-Za-z0-9_./,:=@%+-]+$ ]] || x="'${x//\'/\'\\\'\'}'"
        text+="${text:+ }$x"
    done
}

use() { # DATASET PRESET: what the functions below are about
    given=("--dataset=$1") ranked=()
    [[ $1 = "$2" ]] || given+=("--preset=$2")
}

add() { # FIGURES STAGE NEED FLAG...: sets `made` to the task
    quote "$python" "$beside$2.py" "${given[@]}" "${@:4}" "--out=$out" "--data-dir=$data_dir" \
        ${device:+"--device=$device"} --quiet
    made=${known["$text $scores"]:=${#command[@]}}
    figures[made]="${figures[made]-} $1"
    ((made == ${#command[@]})) || return 0
    command+=("$text") need+=("$3") scored+=("$scores")
    case $2$3 in el2n) waves+=(1) ;; "$2") waves+=(2) ;; *) waves+=($((waves[$3] + 1))) ;; esac
}

el2n() { # FIGURES FLAG...
    local flags=("${@:2}") scores=''
    [[ $noise = 0 ]] || flags=("--label-noise=$noise" "${flags[@]}")
    add "$1" el2n '' "${flags[@]}"
    (($# > 1)) || ranked[$noise]=$made
}

train() { # STAGE REPLICATES FLAG-OF-STEP FIGURES SUBSETS SIZES STEPS FLAG...: every combination
    local by=$scores subset size t r flags replicates scores after
    for subset in $5; do for size in $6; do for t in $7; do
        flags=("--subset=$subset") replicates=("${R:-$2}") scores=$by after=''
        [[ $subset = all ]] || flags+=("--size=$size")
        flags+=("--$3=$t" "${@:8}")
        [[ $noise = 0 ]] || flags+=("--label-noise=$noise")
        case $1$subset in # pretrain.py follows the accuracy on easy examples, whatever it trains on
        *easy | *hard | pretrain*) after=${scores:-${ranked[$noise]-}} ;;
        *) scores='' ;;
        esac
        # LMC scores are a mean over replicates, so these stay together
        [[ -z $spread || $1$subset = lmcall ]] ||
            mapfile -t replicates < <(seq "${replicates[0]%-*}" "${replicates[0]#*-}")
        for r in "${replicates[@]}"; do add "$4" "$1" "$after" "${flags[@]}" "--replicate=$r"; done
    done; done; done
}

# FIGURES SUBSETS SIZES STEPS FLAG...
imp() { train imp 0-3 rewind "$@" ${levels:+"--levels=$levels"} "${extra[@]}"; }
lmc() { train lmc 0-1 rewind "$@" "${extra[@]}"; }
pretrain() { train pretrain 0-3 rewind "$@" "${extra[@]}"; }
warmup() { train warmup 0-7 warmup "$@" ${sharpness:+"--sharpness-every=$sharpness"}; }
both() { imp "$@"; lmc "$@"; } # of Figure 5: children, and pruning from the same start

grid_of() { # DATASET PRESET: figure by figure; a command that several figures need runs once
    local h main sizes p t by=() kinds='easy random hard'
    case $2 in # half the matching step, size of Figure 2, all sizes
    cifar10) h=200 main=3200 sizes='256 512 1024 2048 3200 6400 12800 25600' ;;
    cifar100) h=400 main=2048 sizes='256 512 1024 2048 3200 6400' ;;
    cinic10) h=400 main=51200 sizes='12800 25600 51200 102400' ;;
    digits) h=20 main=256 sizes='128 256 512' ;;
    *) fail "--preset $2: not one of digits, cifar10, cifar100, cinic10" ;;
    esac
    use "$1" "$2"
    el2n ''
    imp 'fig2 fig3 fig11' all - "0 $h $((2 * h))"
    imp fig2 "$kinds" $main $h
    imp 'fig3 fig11' "$kinds" "$sizes" $h
    imp fig9 all - "$h $((2 * h))"
    imp fig9 easy $main $h
    "grid_$2"
}

grid_cifar10() {
    local lengths='100 200 400 600 800 1200 1600 2400 3200'
    # The text ranks all examples together; the authors' curves are of classes ranked apart.
    imp fig2 easy 3200 200 --balance
    imp 'fig3 fig11' easy "$sizes" 200 --balance
    imp 'fig4 fig13' all - 0 # where noise has done nothing yet
    for p in 0.1 0.5; do
        noise=$p el2n ''
        noise=$p imp 'fig4 fig13' all - '200 400'
        noise=$p imp fig4 'easy random' 3200 200
        noise=$p imp fig13 'easy random' '512 1024 2048 3200' 200
    done
    both fig5 all - '0 200 400' # ours: the paper's Figure 5 has CIFAR-100 and CINIC-10
    both fig5 "$kinds" 3200 200
    warmup fig6 all - "0 $lengths"
    warmup fig6 easy '5120 10240 25600' "$lengths" --balance # as the authors' code has it
    warmup fig6 'random hard' '5120 10240 25600' "$lengths"
    for p in 0 25000 37500 39760; do warmup fig6 easy 10240 "$lengths" --offset=$p; done
    pretrain fig8 'easy random' 25600 200
    imp fig12 all - '0 200 400'
    el2n fig12 --metric=forgetting --networks=4
    t=$made
    imp fig12 easy '1024 2048 3200' 200 --balance
    scores=$t imp fig12 easy '1024 2048 3200' 200 --balance
}

lmc_scores() { # Figure 10: beside EL2N at the same step; what pruning by them is compared with
    el2n fig10
    el2n fig10 --score-step=1600
    for t in 400 800 1600; do
        lmc fig10 all - $t
        by[t]=$made
    done
    imp fig10 all - '0 400 800'
}

grid_cifar100() {
    lmc_scores
    both fig5 all - '0 400 800'
    sizes='512 1024 2048 3200'
    imp fig10 'easy random' "$sizes" 400
    both fig5 'easy random' "$sizes" 400
    scores=${by[1600]} imp fig10 easy "$sizes" 400
    scores=${by[1600]} both fig5 easy "$sizes" 400
    pretrain fig7 all - 1600 --easy-size=2048 --easy-balance
    pretrain fig7 easy 2048 1600 --balance
}

grid_cinic10() {
    imp 'fig3 fig11' all - 200 # where the matching step is 400
    imp 'fig3 fig11' "$kinds" '12800 25600 51200' 200
    lmc_scores
    both fig5 all - '200 400 800'
    both fig5 'easy random' '12800 25600 51200' '200 400'
    imp fig10 'easy random' "$sizes" 400
    for t in 800 1600; do
        scores=${by[t]} imp fig10 easy "$sizes" 400
        scores=${by[t]} both fig5 easy '12800 25600 51200' 400
    done
}

grid_digits() { # something of everything
    imp fig2 easy 256 20 --balance
    imp 'fig4 fig13' all - 0
    noise=0.1 el2n ''
    noise=0.1 imp 'fig4 fig13' 'easy random' 256 20
    noise=0.1 imp 'fig4 fig13' all - 20
    both fig5 all - '0 20 40'
    both fig5 "$kinds" 256 20
    warmup fig6 all - 0
    warmup fig6 'all easy random hard' 256 60
    warmup fig6 easy 256 60 --offset=512
    pretrain fig7 all - 60 --easy-size=256 --easy-balance
    pretrain fig7 easy 256 60 --balance
    pretrain fig8 'easy random' 256 20
    el2n fig10 --score-step=40
    lmc fig10 all - 40
    scores=$made imp fig10 easy 256 20
    imp fig10 'easy random' 256 20
    imp 'fig10 fig12' all - '0 20 40'
    el2n fig12 --metric=forgetting "${extra[@]}"
    t=$made
    imp fig12 easy 256 20 --balance
    scores=$t imp fig12 easy 256 20 --balance
}

# ---- what is to be done --------------------------------------------------------------------------

wanted=() state=() folder=() # by task

plan() { # TASK...: sets their state (done, todo) and folder, which the stages know
    local status place i
    while IFS=$'\t' read -r status _ _ place _; do
        state[$1]=$status folder[$1]=$place
        shift
    done < <(for i; do echo "${command[i]}"; done |
        "$python" "$here/figures.py" --plan "--out=$out")
    (($# == 0)) || fail "figures.py --plan stopped at: ${command[$1]}"
}

select_tasks() { # those of --only and what they need; paths of scores
    local f i any makers=()
    for f in ${only//,/ }; do
        any=''
        for i in "${!command[@]}"; do
            [[ " ${figures[i]} " != *" $f "* ]] || wanted[i]=1 any=1
        done
        [[ -n $any ]] || fail "no run is for $f${chosen:+ of ${chosen[*]}}"
    done
    for ((i = ${#command[@]} - 1; i >= 0; i--)); do
        [[ -n $only && -z ${wanted[i]-} ]] || wanted[i]=1
        [[ -n ${wanted[i]-} ]] || continue
        [[ -z ${need[i]} ]] || wanted[need[i]]=1
        [[ -z ${scored[i]} ]] || makers[scored[i]]=${scored[i]}
    done
    ((${#makers[@]} == 0)) || plan "${makers[@]}"
    for i in "${!wanted[@]}"; do
        [[ -n ${scored[i]} ]] || continue
        [[ ${folder[scored[i]]} =~ ^(.*)/rep[0-9,-]+$|^(.*)$ ]] # beside those of the replicates
        quote "--scores=$out/${BASH_REMATCH[1]}${BASH_REMATCH[2]}/scores.npy"
        command[i]+=" $text"
    done
}

figures_line() { # sets `text`
    local drawn=()
    IFS=, read -ra drawn <<<"$only"
    quote "$python" "${beside}figures.py" "${drawn[@]}" "${chosen[@]/#/--dataset=}" "--out=$out"
}

commands() { # prints those of --wave
    local i
    for i in "${!wanted[@]}"; do
        [[ -n $wave && ${waves[i]} != "$wave" ]] || echo "${command[i]}"
    done
}

# ---- on this machine -----------------------------------------------------------------------------

pid=() at=() # by slot: a process and its task

say() { printf '%3d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }

log_of() { echo "$out/logs/${folder[$1]//\//,}.log"; }

next() { # sets `task` to one that can start; what needs a failed one is blocked
    for task in "${!wanted[@]}"; do
        [[ ${state[task]} = todo ]] || continue
        case ${need[task]:+${state[need[task]]}} in
        '' | 'done') return ;;
        failed | blocked) state[task]=blocked ;;
        esac
    done
    return 1
}

launch() { # TASK: in the first free slot
    local slot=0 log
    while [[ -n ${pid[slot]-} ]]; do ((++slot)); done
    log=$(log_of "$1")
    printf '\n# %s  %s\n' "$(date '+%F %T')" "${command[$1]}" >>"$log"
    (
        ((!${#gpus[@]})) || export CUDA_VISIBLE_DEVICES="${gpus[slot % ${#gpus[@]}]}"
        eval "exec ${command[$1]}"
    ) >>"$log" 2>&1 </dev/null &
    pid[slot]=$! at[slot]=$1 state[$1]=running
    say "start   ${folder[$1]}"
}

stop() { # STATUS: every child saves itself and ends
    trap - INT TERM HUP
    ((!${#pid[@]})) || kill -TERM "${pid[@]}" 2>/dev/null
    say "stopping ${#pid[@]} runs; the same command goes on from here"
    wait
    exit "$1"
}

run_here() {
    local i s task settled=0 bad=0 todo
    todo=$(grep -c todo < <(printf '%s\n' "${state[@]}"))
    say "$todo runs to do, $((${#wanted[@]} - todo)) finished before; logs in $out/logs"
    mkdir -p -- "$out/logs" || exit 2
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    while :; do
        while ((${#pid[@]} < jobs)) && next; do launch "$task"; done
        ((${#pid[@]})) || break
        wait -n
        for s in "${!pid[@]}"; do
            ! kill -0 "${pid[s]}" 2>/dev/null || continue
            i=${at[s]}
            if wait "${pid[s]}"; then state[i]='done'; else state[i]=failed; fi
            say "${state[i]}  ${folder[i]}  ($((++settled)) of $todo)"
            unset "pid[s]"
        done
    done
    figures_line
    (eval "exec $text") &
    pid=($!)
    wait "$!" || bad=1
    for i in "${!wanted[@]}"; do
        case ${state[i]} in
        failed) printf 'FAILED  %s\n        log: %s\n' "${command[i]}" "$(log_of "$i")" ;;
        blocked) printf 'WAITS   %s\n        for: %s\n' "${command[i]}" "${folder[need[i]]}" ;;
        *) continue ;;
        esac
        bad=1
    done
    return $bad
}

# ---- on a Slurm cluster --------------------------------------------------------------------------

declare -A job_of=() # command -> JOB_ELEMENT on the cluster
arrays=()            # submitted by this call

submit() { # DEPENDENCY TASK...: as one job array
    local after=$1 list n i k=0
    shift
    list=$(mktemp -- "$out/slurm/XXXXXXXX.jobs") || exit 2
    for i; do echo "${command[i]}"; done >"$list"
    n=$(sbatch --parsable --job-name=tickets "--array=0-$(($# - 1))" --requeue \
        "--output=${out//%/%%}/slurm/%A_%a.log" --open-mode=append --signal=B:USR1@120 \
        ${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes} "${sbatch[@]}" \
        <<<"$(printf '#!/bin/bash\nexec bash %q --task %q\n' "$here/run_all.sh" "$list")") ||
        fail "sbatch refused: see above"
    n=${n%%;*} arrays+=("$n")
    for i; do
        job_of[${command[i]}]=${n}_$((k++)) state[i]=queued
        echo "${job_of[${command[i]}]} ${command[i]}" >>"$out/slurm/submitted"
    done
    echo "submitted $n: $# runs${after:+, after $after}"
}

run_slurm() {
    local i j n line alive after queued=0 submitted=0 groups=() group
    command -v sbatch >/dev/null || fail '--slurm: there is no sbatch here'
    alive=" $(squeue -h -r -u "$(id -un)" -o %i | tr '\n' ' ') " ||
        fail '--slurm: squeue does not answer'
    mkdir -p -- "$out/slurm" && touch -- "$out/slurm/submitted" || exit 2
    while read -r n line; do job_of[$line]=$n; done <"$out/slurm/submitted"
    for i in "${!wanted[@]}"; do
        n=${job_of[${command[i]}]-}
        [[ ${state[i]} = todo && -n $n ]] || continue
        if [[ $alive = *" $n "* ]]; then
            state[i]=queued queued=$((queued + 1))
        else
            echo "again: ${folder[i]}, log of the last time: $out/slurm/$n.log"
        fi
    done
    for i in "${!wanted[@]}"; do # by what they wait for, 0 for nothing; that is submitted before
        [[ ${state[i]} = todo ]] || continue
        n=${need[i]}
        [[ -n $n && ${state[n]} != 'done' ]] || n=-1
        groups[n + 1]+=" $i"
    done
    for n in "${!groups[@]}"; do
        after=''
        ((n == 0)) || after=${job_of[${command[n - 1]}]}
        read -ra group <<<"${groups[n]}"
        for ((j = 0; j < ${#group[@]}; j += 1000)); do # MaxArraySize is 1001 by default
            submit "$after" "${group[@]:j:1000}"
        done
        submitted=$((submitted + ${#group[@]}))
    done
    echo "$submitted runs submitted, $queued queued before," \
        "$((${#wanted[@]} - submitted - queued)) finished"
    ((submitted)) || return 0
    figures_line
    sbatch --parsable --job-name=figures "--output=${out//%/%%}/slurm/figures.log" \
        --open-mode=append "--dependency=afterany:$(IFS=:; echo "${arrays[*]}")" "${sbatch[@]}" \
        <<<"$(printf '#!/bin/bash\nexec %s\n' "$text")" >/dev/null
}

run_task() { # FILE: this element of a job array, on its node
    local lines child rc again=''
    mapfile -t lines <"$1"
    echo "# $(date '+%F %T') on $(hostname)  ${lines[SLURM_ARRAY_TASK_ID]}"
    (eval "exec ${lines[SLURM_ARRAY_TASK_ID]}") &
    child=$!
    trap 'kill -TERM "$child"' TERM INT
    trap 'again=1; kill -TERM "$child"' USR1 # the time limit is near: save, and queue again
    while wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null; do :; done
    [[ -z $again || $rc = 0 ]] || exec scontrol requeue "$SLURM_JOB_ID"
    exit "$rc"
}

# ---- command line --------------------------------------------------------------------------------

while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;;
    --quick | --spread) printf -v "${1#--}" 1; shift; continue ;;
    --list | --cost | --slurm) mode=${1#--}; shift; continue ;;
    esac
    (($# > 1)) || fail "$1: unknown, or its value is missing (--help)"
    [[ $2 != *[$'\n\t']* ]] || fail "$1: a name with a line break or a tab"
    case $1 in
    --only) only+=${only:+,}$2 ;;
    --dataset) datasets+=("$2") ;;
    --out | --preset | --device | --grid | --rate | --jobs | --wave) printf -v "${1#--}" %s "$2" ;;
    --data-dir) data_dir=$2 ;;
    --gpus) IFS=, read -ra gpus <<<"$2" ;;
    --partition | --account | --time | --gres) sbatch+=("$1=$2") ;;
    --sbatch) sbatch+=("$2") ;;
    --task) run_task "$2" ;;
    *) fail "$1: unknown (--help)" ;;
    esac
    shift 2
done
out=${out%/} cores=$(nproc 2>/dev/null || echo 1)
if [[ -n $quick ]]; then
    datasets=(digits) levels=3 sharpness=100 R=0-1 extra=(--steps=150 "--milestones=75,112")
    : "${jobs:=$((cores < 2 ? 1 : 2))}"
fi
: "${jobs:=$((${#gpus[@]} ? ${#gpus[@]} : 1))}"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: not a whole number"
((jobs == 1)) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}"
chosen=("${datasets[@]##*/}")
((${#datasets[@]})) || datasets=(cifar10 cifar100 cinic10)

if [[ -n $grid ]]; then
    [[ -r $grid ]] || fail "--grid $grid: no such file"
    # shellcheck source=/dev/null
    . "$grid"
else
    for d in "${datasets[@]}"; do
        case $d in
        digits | cifar10 | cifar100 | cinic10) grid_of "$d" "$d" ;;
        *)
            [[ -d $d ]] || fail "--dataset $d: neither digits, cifar10, cifar100, cinic10 nor a folder"
            grid_of "$d" "$preset" ;;
        esac
    done
fi
select_tasks
case $mode in
list)
    commands
    figures_line
    [[ -n $wave && $wave != 4 ]] || echo "$text" ;;
cost) commands | "$python" "$here/figures.py" --cost "--out=$out" ${rate:+"--rate=$rate"} ;;
run)
    plan "${!wanted[@]}"
    run_here ;;
slurm)
    plan "${!wanted[@]}"
    run_slurm ;;
esac
