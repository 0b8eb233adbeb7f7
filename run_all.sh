#!/usr/bin/env bash
# The paper: scores, pre-training and pruning, children, warmup, figures.
#
#   bash run_all.sh --quick                 every stage and figure on the embedded digits, minutes
#   bash run_all.sh                         the full reproduction, here, one run after the other
#   bash run_all.sh --gpus 0,1              ... two runs at a time, each on a GPU of its own
#   bash run_all.sh --jobs 4                ... four at a time
#   bash run_all.sh --only fig2 --dataset cifar10     what one figure of one data set needs
#   bash run_all.sh --cost                  the number of runs, network-steps, hours and gigabytes
#   bash run_all.sh --list --wave 1 | xargs -d '\n' -n 1 -P 8 bash -c      for any other queue: the
#                                           waves 1, 2, 3, 4 in turn, each in any order
#   bash run_all.sh --slurm --partition gpu --gres gpu:1 --time 12:00:00   job arrays on a cluster
#
# The same command again skips finished runs and repeats failed ones. A failed run blocks only the
# runs that need its scores. The runs are those of grid.txt.
#
#   --only FIG       a figure (fig2 ... fig13, prelr), or several: fig2,fig5
#   --dataset D      digits, cifar10, cifar100, cinic10; or a folder of images, an .npz
#   --preset P       whose runs and settings a folder or an .npz gets [cifar10]
#   --out DIR        of results [results]       --data-dir DIR   of data [data]
#   --device NAME    for every stage            --wave N         only this wave
#   --spread         a command for each replicate, so that they can run on different GPUs
#   --grid FILE      another table of runs than grid.txt, whose head describes the format
#   --rate N         --cost: network-steps per second of ResNet-20 on 128 images, if not measured
#   --partition, --account, --time, --gres, --sbatch OPTION    are passed to sbatch
#
# Slurm: two minutes before its time limit an array element saves its state and requeues itself. A
# run that is preempted or whose node fails is queued again and resumes from its last checkpoint, at
# most a minute old. After `scancel` the same command submits again what is neither finished nor
# queued.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "run_all.sh: error: bash $BASH_VERSION: 4.4 or newer is needed (brew install bash)" >&2
    exit 2
fi
set -uf -o pipefail

fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 2; }

# ---- where this file and Python are --------------------------------------------------------------

self=${BASH_SOURCE[0]}
while [[ -L $self ]]; do
    link=$(readlink "$self")
    [[ $link = /* || $self != */* ]] || link=${self%/*}/$link
    self=$link
done
here=.
[[ $self != */* ]] || here=${self%/*}/
here=$(CDPATH='' cd -P -- "$here" && pwd -P) || exit 2
if [[ $here = "$(pwd -P)" ]]; then beside=''; else beside=$here/; fi

find_python() { # sets `python` to the first that has torch; PYTHON is not passed over
    local choice tried=() choices=("${PYTHON-}")
    local has_torch='from importlib.util import find_spec; find_spec("torch").origin + ""'
    [[ -n ${PYTHON-} ]] ||
        choices=("${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$beside.venv/bin/python" python3 python)
    for choice in "${choices[@]}"; do
        [[ -n $choice ]] || continue
        tried+=("$choice")
        python=$(command -v -- "$choice") && "$python" -c "$has_torch" 2>/dev/null && return
    done
    fail "no Python with torch; tried ${tried[*]}. PYTHON=/path/to/python names another"
}

# ---- on this machine -----------------------------------------------------------------------------

# By task: what grid.py says, and the commands' states: todo, done, running, failed, blocked, queued.
waves=() states=() folders=() makers=() commands=() drawing=''
running=() task_in=() # by slot: a process and its task

plan() {
    local lines wave state folder maker command
    lines=$("$python" "$here/grid.py" --plan "${ask[@]}") || exit 2
    while IFS=$'\t' read -r wave state folder maker command; do
        [[ $wave != 4 ]] || { drawing=$command; continue; }
        waves+=("$wave") states+=("$state") folders+=("$folder") makers+=("$maker")
        commands+=("$command")
    done <<<"$lines"
}

count() { grep -c -x "$1" < <(printf '%s\n' "${states[@]}"); } # STATE

say() { printf '%3d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }

log_of() { echo "$out/logs/${folders[$1]//\//,}.log"; } # TASK

launch() { # TASK: in the first free slot
    local slot=0 log
    while [[ -n ${running[slot]-} ]]; do ((++slot)); done
    log=$(log_of "$1")
    printf '\n# %s  %s\n' "$(date '+%F %T')" "${commands[$1]}" >>"$log"
    (
        ((!${#gpus[@]})) || export CUDA_VISIBLE_DEVICES="${gpus[slot % ${#gpus[@]}]}"
        eval "exec ${commands[$1]}"
    ) >>"$log" 2>&1 </dev/null &
    running[slot]=$! task_in[slot]=$1 states[$1]=running
    say "start   ${folders[$1]}"
}

reap() { # waits for a run to end
    local slot i
    wait -n
    for slot in "${!running[@]}"; do
        ! kill -0 "${running[slot]}" 2>/dev/null || continue
        i=${task_in[slot]}
        if wait "${running[slot]}"; then states[i]='done'; else states[i]=failed; fi
        say "${states[i]}  ${folders[i]}  ($((++ended)) of $todo)"
        unset "running[slot]"
    done
}

stop() { # STATUS
    trap - INT TERM HUP
    ((!${#running[@]})) || kill -TERM "${running[@]}" 2>/dev/null
    say "stopping ${#running[@]} runs, which save their state; the same command resumes them"
    wait
    exit "$1"
}

run_here() {
    local wave i bad=0 ended=0 todo
    todo=$(count todo)
    say "$todo runs to do, $(count 'done') finished before; logs in $out/logs"
    mkdir -p -- "$out/logs" || exit 2
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    for wave in 1 2 3; do
        for i in "${!commands[@]}"; do
            [[ ${waves[i]} = "$wave" && ${states[i]} = todo ]] || continue
            if [[ ${makers[i]} != - && ${states[makers[i]]} != 'done' ]]; then
                states[i]=blocked
                continue
            fi
            launch "$i"
            while ((${#running[@]} >= jobs)); do reap; done
        done
        while ((${#running[@]})); do reap; done
    done
    if [[ -n $drawing ]]; then
        (eval "exec $drawing") &
        running=($!)
        wait "$!" || bad=1
    fi
    for i in "${!commands[@]}"; do
        case ${states[i]} in
        failed) printf 'FAILED  %s\n        log: %s\n' "${commands[i]}" "$(log_of "$i")" ;;
        blocked) printf 'BLOCKED %s\n        by: %s\n' "${commands[i]}" "${folders[makers[i]]}" ;;
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
    local after=$1 list job i k=0
    shift
    list=$(mktemp -- "$out/slurm/XXXXXXXX.jobs") || exit 2
    for i; do echo "${commands[i]}"; done >"$list"
    job=$(sbatch --parsable --job-name=tickets "--array=0-$(($# - 1))" --requeue \
        "--output=${out//%/%%}/slurm/%A_%a.log" --open-mode=append --signal=B:USR1@120 \
        ${after:+"--dependency=afterok:$after" --kill-on-invalid-dep=yes} "${sbatch[@]}" \
        <<<"$(printf '#!/bin/bash\nexec bash %q --task %q\n' "$here/run_all.sh" "$list")") ||
        fail "sbatch refused: see above"
    job=${job%%;*} arrays+=("$job")
    for i; do
        job_of[${commands[i]}]=${job}_$((k++)) states[i]=queued
        echo "${job_of[${commands[i]}]} ${commands[i]}" >>"$out/slurm/submitted"
    done
    echo "submitted $job: $# runs${after:+, after $after}"
}

run_slurm() {
    local i j job line alive after queued groups=() group
    command -v sbatch >/dev/null || fail '--slurm: there is no sbatch here'
    alive=" $(squeue -h -r -u "$(id -un)" -o %i | tr '\n' ' ') " ||
        fail '--slurm: squeue does not answer'
    mkdir -p -- "$out/slurm" && touch -- "$out/slurm/submitted" || exit 2
    while read -r job line; do job_of[$line]=$job; done <"$out/slurm/submitted"
    for i in "${!commands[@]}"; do
        job=${job_of[${commands[i]}]-}
        [[ ${states[i]} = todo && -n $job ]] || continue
        if [[ $alive = *" $job "* ]]; then
            states[i]=queued
        else
            echo "again: ${folders[i]}, log of the last time: $out/slurm/$job.log"
        fi
    done
    queued=$(count queued)
    # An array for each task that others wait for, and one (0) of what waits for nothing. Tasks are in
    # the order of their waves, so what makes scores is submitted before what needs them.
    for i in "${!commands[@]}"; do
        [[ ${states[i]} = todo ]] || continue
        job=${makers[i]}
        [[ $job != - && ${states[job]} != 'done' ]] || job=-1
        groups[job + 1]+=" $i"
    done
    for i in "${!groups[@]}"; do
        after=''
        ((i == 0)) || after=${job_of[${commands[i - 1]}]}
        read -ra group <<<"${groups[i]}"
        for ((j = 0; j < ${#group[@]}; j += 1000)); do # MaxArraySize is 1001 by default
            submit "$after" "${group[@]:j:1000}"
        done
    done
    echo "$(($(count queued) - queued)) runs submitted, $queued queued before," \
        "$(count 'done') finished"
    [[ -n $drawing ]] && ((${#arrays[@]})) || return 0
    sbatch --parsable --job-name=figures "--output=${out//%/%%}/slurm/figures.log" \
        --open-mode=append "--dependency=afterany:$(IFS=:; echo "${arrays[*]}")" "${sbatch[@]}" \
        <<<"$(printf '#!/bin/bash\nexec %s\n' "$drawing")" >/dev/null
}

run_task() { # FILE: this element of a job array, on its node
    local lines child rc again='' self=$SLURM_JOB_ID
    # The job id of one element is that of the whole array, which would be requeued by it.
    [[ -z ${SLURM_ARRAY_JOB_ID-} ]] || self=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    mapfile -t lines <"$1"
    echo "# $(date '+%F %T') on $(hostname)  ${lines[SLURM_ARRAY_TASK_ID]}"
    (eval "exec ${lines[SLURM_ARRAY_TASK_ID]}") &
    child=$!
    trap 'kill -TERM "$child"' TERM INT
    trap 'again=1; kill -TERM "$child"' USR1 # the time limit is near
    while wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null; do :; done
    [[ -n $again && $rc != 0 ]] || exit "$rc"
    ((SECONDS >= 60 || ${SLURM_RESTART_COUNT:-0} < 3)) ||
        fail "$SECONDS seconds before the end of --time, for the 4th time: give it more"
    exec scontrol requeue "$self"
}

# ---- command line --------------------------------------------------------------------------------

out=results mode='' jobs='' gpus=() sbatch=() ask=() quick=''
while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    -h | --help) sed -n '2,/^if /{/^if /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit ;;
    --quick | --spread) [[ $1 = --spread ]] || quick=1; ask+=("$1"); shift; continue ;;
    --list | --cost | --slurm)
        [[ -z $mode ]] || fail "$1 beside --$mode: one at a time"
        mode=${1#--}; shift; continue ;;
    esac
    (($# > 1)) || fail "$1: unknown, or its value is missing (--help)"
    [[ $2 != *[$'\n\t']* ]] || fail "$1: a name with a line break or a tab"
    [[ -n $2 ]] || fail "$1: its value is empty"
    value=$2
    case $value in \~ | \~/*) value=${HOME-}${value#\~} ;; esac # bash leaves it after =
    case $1 in
    --out) out=${value%/}; out=${out:-/} ;;
    --only | --dataset | --preset | --grid | --wave | --device | --rate | --data-dir)
        ask+=("$1=$value") ;;
    --jobs) jobs=$value ;;
    --gpus)
        [[ $value =~ ^([0-9]+|(GPU|MIG)-[^,]+)(,([0-9]+|(GPU|MIG)-[^,]+))*$ ]] ||
            fail "--gpus $value: not a list like 0,1"
        IFS=, read -ra gpus <<<"$value" ;;
    --partition | --account | --time | --gres) sbatch+=("$1=$value") ;;
    --sbatch) sbatch+=("$value") ;;
    --task) run_task "$value" ;;
    *) fail "$1: unknown (--help)" ;;
    esac
    shift 2
done
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
if [[ $mode = slurm ]]; then
    [[ -z $jobs${gpus[*]-} ]] || fail '--jobs and --gpus are for this machine, not for --slurm'
else
    ((!${#sbatch[@]})) || fail "${sbatch[0]}: for --slurm, which is not given"
fi
[[ -z $quick ]] || : "${jobs:=$((cores < 2 ? 1 : 2))}"
: "${jobs:=$((${#gpus[@]} ? ${#gpus[@]} : 1))}"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: not a whole number"
((jobs == 1)) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}"
find_python
ask+=("--out=$out" "--python=$python" "--beside=$beside")
case ${mode:-run} in
list | cost) exec "$python" "$here/grid.py" "--$mode" "${ask[@]}" ;;
run) plan && run_here ;;
slurm) plan && run_slurm ;;
esac
