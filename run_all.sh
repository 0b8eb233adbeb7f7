#!/usr/bin/env bash
# The whole paper: scores, pre-training and pruning, children, warmup, figures.
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
#   --device NAME    for every stage            --spread         a run for each replicate
#   --grid FILE      instead of the paper's: a bash file of calls like `imp fig2 easy 256 20`
#   --rate N         --cost: network-steps per second of ResNet-20 on 128 images, if not measured
#   --partition, --account, --time, --gres, --sbatch OPTION    go to sbatch
set -uf -o pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=results data_dir=data mode=run only='' datasets=() preset='' quick='' spread='' grid='' wave=''
jobs='' gpus=() device='' rate='' sbatch=() extra=() tail='' levels='' steps='' sharpness=''
python=${PYTHON:-$(command -v python || command -v python3)}

fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 2; }

# ---- the grid ------------------------------------------------------------------------------------

# A job is a command of a stage: the folder of its results below --out, the job it needs, the
# figures it is for, its replicates, its network-steps, and how many levels make it complete.
folder=() needs=() figures=() replicates=() cost=() rows=() command=()
declare -A index=()

job() { # FOLDER NEEDS FIGURES REPLICATES NETWORK-STEPS LEVELS SCRIPT ARGUMENT...
    local line script=$7 known=${index[$1]-}
    [[ $here = "$PWD" || $7 = /* ]] || script=$here/$7
    local all=("$python" "$script" "${@:8}" "--out=$out" "--data-dir=$data_dir" --quiet)
    [[ -z $device ]] || all+=("--device=$device")
    printf -v line '%q ' "${all[@]}"
    if [[ -n $known ]]; then # made for another figure already
        [[ ${command[known]} = "$line" ]] || fail "two commands for $1"
        figures[known]+=" $3"
        return
    fi
    index[$1]=${#folder[@]}
    folder+=("$1") needs+=("$2") figures+=(" $3") replicates+=("$4") cost+=("$5") rows+=("$6")
    command+=("$line")
}

# Table 1: depth, batch size, steps, levels, networks and step of EL2N, as in common.PRESETS.
table1() {
    case $1 in
    digits) echo 8 64 600 8 4 60 ;;
    cifar10) echo 20 128 62400 20 10 7800 ;;
    cifar100) echo 32 128 62400 20 10 7800 ;;
    cinic10) echo 56 256 31250 12 10 8000 ;;
    *) fail "--preset $1: not one of digits, cifar10, cifar100, cinic10" ;;
    esac
}

use() { # DATASET PRESET: what the functions below are about
    local depth
    read -r depth _ T L K S < <(table1 "$2") || exit 2
    T=${steps:-$T} L=${levels:-$L}
    model=$(basename -- "$1")-resnet$depth
    given=("--dataset=$1")
    [[ $1 = "$2" ]] || given+=("--preset=$2")
}

noise=0 scores='' metric='' balance='' offset='' watch='' R=0-3

count() { # of replicates 0-3
    local first=${1%-*} last=${1#*-}
    echo $((last - first + 1))
}

el2n() { # FIGURES [STEP]: scores under the labels of $noise; sets `made` to their folder
    local more=() name=el2n step=${2:-$S}
    ((step == S)) || { more=("--score-step=$step") name+=-step$step; }
    [[ $noise = 0 ]] || { more+=("--label-noise=$noise") name+=-noise$noise; }
    made=el2n/$model/$name
    job "$made" '' "$1" '' $((K * step)) 0 el2n.py "${given[@]}" ${more[@]+"${more[@]}"}
}

forgetting() { # FIGURES NETWORKS
    local name=forgetting
    made=el2n/$model/$name$tail
    ((K == $2)) || made+=-networks$2
    ((S == T)) || made+=-step$T
    job "$made" '' "$1" '' $(($2 * T)) 0 el2n.py "${given[@]}" --metric=forgetting \
        "--networks=$2" "${extra[@]}"
}

subset() { # FIGURES SUBSET SIZE: sets `name`, `flags`, `need` for the examples trained on first
    name=$2 flags=("${given[@]}" "--subset=$2") need=''
    [[ $2 = all ]] || { name+=$3 flags+=("--size=$3"); }
    [[ -z $offset ]] || { name+=+$offset flags+=("--offset=$offset"); }
    [[ -z $balance ]] || { name+=balanced flags+=(--balance); }
    if [[ -n $scores ]]; then
        need=$scores name+=-$metric
    elif [[ $2 = easy || $2 = hard ]]; then
        el2n "$1"
        need=$made
    fi
    [[ -z $scores ]] || flags+=("--scores=$out/$need/scores.npy")
}

start() { # FIGURES SUBSET SIZE REWIND: the same, of a pre-training to step REWIND
    subset "$1" "$2" "$3"
    name+=-rewind$4$tail flags+=("--rewind=$4" "${extra[@]}")
    [[ $noise = 0 ]] || { name+=-noise$noise flags+=("--label-noise=$noise"); }
}

imp() { # FIGURES SUBSET SIZE REWIND
    start "$@"
    [[ -z $levels ]] || flags+=("--levels=$levels")
    job "imp/$model/$name" "$need" "$1" "$R" $(($(count "$R") * ($4 + (L + 1) * (T - $4)))) \
        $((L + 1)) imp.py "${flags[@]}"
}

lmc() { # FIGURES SUBSET SIZE REWIND
    start "$@"
    job "lmc/$model/$name" "$need" "$1" "$R" $(($(count "$R") * ($4 + 3 * (T - $4)))) 0 \
        lmc.py "${flags[@]}"
}

pretrain() { # FIGURES SUBSET SIZE REWIND; $watch: flags of the easy examples whose accuracy it logs
    local words
    start "$@"
    [[ -n $need ]] || { el2n "$1"; need=$made; }
    read -ra words <<<"$watch"
    flags+=(${words[@]+"${words[@]}"})
    job "pretrain/$model/$name" "$need" "$1" "$R" $(($(count "$R") * $4)) 0 \
        pretrain.py "${flags[@]}"
}

warmup() { # FIGURES SUBSET SIZE WARMUP STEPS
    subset "$1" "$2" "$3"
    name+=-warmup$4
    job "warmup/$model/$name" "$need" "$1" "$R" $(($(count "$R") * $5)) 0 \
        warmup.py "${flags[@]}" "--warmup=$4" ${sharpness:+"--sharpness-every=$sharpness"}
}

both() { # easy by EL2N over all classes, as the text says, and, where $2, class-balanced as well:
    # the authors' CIFAR-10 curves are those of balanced subsets
    local for_=$1 too=$2
    shift 2
    imp "$for_" easy "$@"
    [[ -z $too ]] || balance=1 imp "$for_" easy "$@"
}

grid_of() { # DATASET PRESET: the paper's runs, by figures.py's numbers; several figures share a run
    use "$1" "$2"
    local s m t p for_ half full main sizes balanced='' by='' lmc_sizes='' lmc_steps='' at=() o
    case $2 in
    cifar10) half=200 full=400 main=3200 balanced=1
        sizes='256 512 1024 2048 3200 6400 12800 25600' ;;
    cifar100) half=400 full=800 main=2048 sizes='256 512 1024 2048 3200 6400'
        lmc_sizes='512 1024 2048 3200' lmc_steps='400 800 1600' by=1600 at=(400) ;;
    cinic10) half=400 full=800 main=51200 sizes='12800 25600 51200 102400'
        lmc_sizes=$sizes lmc_steps='400 800 1600' by='800 1600' at=(200 400) ;;
    digits) half=20 full=40 main=256 balanced=1 sizes='128 256 512'
        lmc_sizes=256 lmc_steps='20 40' by=40 at=(20) ;;
    esac

    # Figures 2, 3, 11: all data, and subsets of every size for half of the matching step; Figure 9:
    # the error of their w_tr under a mask.
    imp 'fig2 fig3 fig11' all - 0
    for t in $half $full; do imp 'fig2 fig3 fig9 fig11' all - "$t"; done
    for m in $sizes; do
        for_='fig3 fig11'
        ((m != main)) || for_+=' fig2'
        both "$for_" "$balanced" "$m" $half
        for s in random hard; do imp "$for_" $s "$m" $half; done
    done
    imp fig9 easy $main $half

    # Figures 5 and 10: children of networks pre-trained on all data, scores by their barriers, and
    # what random subsets and the easiest by either score do instead.
    for t in $lmc_steps; do R=0-1 lmc fig10 all - "$t"; done
    [[ -z $by ]] || for t in 0 $half $full; do imp fig10 all - "$t"; done
    for m in $lmc_sizes; do
        for s in easy random; do imp fig10 $s "$m" $half; done
        for p in $by; do
            scores=lmc/$model/all-rewind$p$tail metric=lmc$p imp fig10 easy "$m" $half
        done
        ((m != 102400)) || continue # not in Figure 5
        for t in ${at[@]+"${at[@]}"}; do
            for s in easy random; do
                imp fig5 $s "$m" "$t"
                R=0-1 lmc fig5 $s "$m" "$t"
            done
        done
        for p in $by; do
            scores=lmc/$model/all-rewind$p$tail metric=lmc$p imp fig5 easy "$m" $half
            R=0-1 scores=lmc/$model/all-rewind$p$tail metric=lmc$p lmc fig5 easy "$m" $half
        done
    done

    case $2 in
    cifar10)
        # Figures 4, 13: labels redrawn. Step 0 has seen none; the dense network is the clean one.
        for t in 0 400; do imp 'fig4 fig13' all - $t; done
        for p in 0.1 0.5; do
            for t in 200 400; do noise=$p imp 'fig4 fig13' all - $t; done
            for m in 512 1024 2048 3200; do
                for_=fig13
                ((m != 3200)) || for_+=' fig4'
                for s in easy random; do noise=$p imp "$for_" $s $m 200; done
            done
        done
        # Figure 12: both scores class-balanced.
        for t in 0 200 400; do imp fig12 all - $t; done
        forgetting fig12 4
        by=$made
        for m in 1024 2048 3200; do
            balance=1 imp fig12 easy $m 200
            scores=$by metric=forgetting balance=1 imp fig12 easy $m 200
        done
        for s in easy random; do pretrain fig8 $s 25600 200; done
        # Figure 6: as in the authors' code easy is class-balanced, hard and the windows are not.
        R=0-7 warmup fig6 all - 0 7840
        for t in 100 200 400 600 800 1200 1600 2400 3200; do
            R=0-7 warmup fig6 all - $t 7840
            for m in 5120 10240 25600; do
                R=0-7 balance=1 warmup fig6 easy $m $t 7840
                for s in random hard; do R=0-7 warmup fig6 $s $m $t 7840; done
            done
            R=0-7 warmup fig6 easy 10240 $t 7840
            for o in 25000 37500 39760; do R=0-7 offset=$o warmup fig6 easy 10240 $t 7840; done
        done
        ;;
    cifar100)
        for t in 0 400 800; do
            imp fig5 all - $t
            R=0-1 lmc fig5 all - $t
        done
        el2n fig10 1600
        watch='--easy-size=2048 --easy-balance' pretrain fig7 all - 1600
        balance=1 pretrain fig7 easy 2048 1600
        ;;
    cinic10)
        imp 'fig3 fig11' all - 200
        for m in 12800 25600 51200; do
            for s in easy random hard; do imp 'fig3 fig11' $s $m 200; done
        done
        for t in 200 400 800; do
            imp fig5 all - $t
            R=0-1 lmc fig5 all - $t
        done
        el2n fig10 1600
        ;;
    digits)
        for t in 0 40; do imp 'fig4 fig13' all - $t; done
        for s in all easy random; do noise=0.1 imp 'fig4 fig13' $s 256 20; done
        for t in 0 20 40; do imp fig12 all - $t; done
        forgetting fig12 4
        by=$made
        balance=1 imp fig12 easy 256 20
        scores=$by metric=forgetting balance=1 imp fig12 easy 256 20
        watch='--easy-size=256 --easy-balance' pretrain fig7 all - 60
        balance=1 pretrain fig7 easy 256 60
        for s in easy random; do pretrain fig8 $s 256 20; done
        for t in 0 20 40; do
            imp fig5 all - $t
            R=0-1 lmc fig5 all - $t
        done
        el2n fig10 40
        warmup fig6 all - 0 300
        warmup fig6 all - 60 300
        balance=1 warmup fig6 easy 256 60 300
        for s in random hard; do warmup fig6 $s 256 60 300; done
        offset=512 warmup fig6 easy 256 60 300
        ;;
    esac
}

# ---- which of them, and how far they are ---------------------------------------------------------

wanted=() # by job

want() {
    wanted[$1]=1
    [[ -z ${needs[$1]} ]] || want "${index[${needs[$1]}]}"
}

select_jobs() {
    local i f
    for i in "${!folder[@]}"; do
        [[ -n $only ]] || wanted[i]=1
        for f in ${only//,/ }; do [[ "${figures[i]} " != *" $f "* ]] || want "$i"; done
    done
    ((${#wanted[@]})) || fail "no run is for ${only:-this}: --only fig2 ... fig13"
}

# A task is a job, or with --spread one replicate of it (scores are made by all of them together).
task=() only_rep=() state=()

make_tasks() {
    local i r
    declare -A maker=()
    for i in "${!wanted[@]}"; do [[ -z ${needs[i]} ]] || maker[${needs[i]}]=1; done
    for i in "${!wanted[@]}"; do
        r=${replicates[i]}
        if [[ -n $spread && -n $r && -z ${maker[${folder[i]}]-} ]]; then
            for r in $(seq "${r%-*}" "${r#*-}"); do task+=("$i") only_rep+=("$r"); done
        else
            task+=("$i") only_rep+=("$r")
        fi
    done
    for i in "${!task[@]}"; do if finished "$i"; then state[i]='done'; else state[i]=todo; fi; done
}

line_of() { printf '%s%s' "${command[task[$1]]}" "${only_rep[$1]:+--replicate=${only_rep[$1]}}"; }
name_of() { printf '%s%s' "${folder[task[$1]]}" "${only_rep[$1]:+/rep${only_rep[$1]}}"; }

finished() { # TASK: every result.json is there, with all of its levels, and none ended early
    local path=$out/${folder[task[$1]]} r=${only_rep[$1]} enough=${rows[task[$1]]} files=() f
    if [[ -n $r ]]; then
        for ((r = ${r%-*}; r <= ${only_rep[$1]#*-}; r++)); do files+=("$path/rep$r/result.json"); done
    else
        files=("$path/result.json" "$path/scores.npy")
    fi
    for f in "${files[@]}"; do [[ -s $f ]] || return 1; done
    ! grep -q '^ "ended": "' -- "${files[@]}" || return 1
    ((enough == 0)) || for f in "${files[@]}"; do
        [[ $(grep -c '"level":' -- "$f") -ge $enough ]] || return 1
    done
}

wave_of() { # JOB: 1 makes scores by el2n.py; 2 needs none or those; 3 needs a job of wave 2
    [[ ${folder[$1]} != el2n/* ]] || { echo 1; return; }
    local n=${needs[$1]}
    if [[ -n $n && $n != el2n/* ]]; then echo 3; else echo 2; fi
}

figures_line() {
    local script=figures.py
    [[ $here = "$PWD" ]] || script=$here/$script
    local line=("$python" "$script" "--out=$out")
    local drawn=()
    IFS=, read -ra drawn <<<"$only"
    printf '%q ' "${line[@]}" ${drawn[@]+"${drawn[@]}"} ${chosen[@]+"${chosen[@]/#/--dataset=}"}
}

list() {
    local i
    for i in "${!task[@]}"; do
        [[ -n $wave && $(wave_of "${task[i]}") != "$wave" ]] || { line_of "$i"; echo; }
    done
    [[ -n $wave && $wave != 4 ]] || { figures_line; echo; }
}

show_cost() { # runs, network-steps, hours by stage and model
    local i rates r
    rates=$("$python" "$here/figures.py" --rates "--out=$out") || rates=''
    for i in "${!wanted[@]}"; do
        r=${replicates[i]:-0-0}
        printf '%s %s %s\n' "${folder[i]%/*}" "$(count "$r")" "${cost[i]}"
    done | RATES=$rates RATE=$rate awk '
        BEGIN { n = split(ENVIRON["RATES"], line, "\n")
            for (i = 1; i <= n; i++) { split(line[i], x, " "); measured[x[1]] = x[2] } }
        { jobs[$1]++; runs[$1] += $2; steps[$1] += $3 }
        !($1 in seen) { seen[$1] = 1; order[++k] = $1 }
        END { printf "%-30s %6s %6s %16s %10s\n", "stage/model", "jobs", "runs", "network-steps", "hours"
            for (i = 1; i <= k; i++) { g = order[i]; split(g, part, "/")
                depth = part[2]; sub(/.*-resnet/, "", depth)
                batch = part[1] == "warmup" ? 8 : part[2] ~ /^cinic10/ ? 2 : 1
                h = "-"; r = measured[part[2]]
                if (r && part[1] == "warmup" && part[2] !~ /^digits/) r /= 8
                if (!r && ENVIRON["RATE"] && part[2] !~ /^digits/)
                    r = ENVIRON["RATE"] * 18 / ((depth - 2) * batch)
                if (r) { h = sprintf("%.1f", steps[g] / r / 3600); hours += steps[g] / r / 3600 }
                else lacking = lacking " " part[2]
                printf "%-30s %6d %6d %16d %10s\n", g, jobs[g], runs[g], steps[g], h
                J += jobs[g]; R += runs[g]; S += steps[g] }
            printf "%-30s %6d %6d %16d %10s\n", "all", J, R, S, lacking ? "-" : sprintf("%.1f", hours)
            if (lacking) print "hours: no measured rate for some of these; run one, or give --rate" }'
}

# ---- on this machine -----------------------------------------------------------------------------

declare -A running=() slot_of=() # process -> task, -> slot
began=$SECONDS

say() { printf '%3d:%02d  %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*" >&2; }

need_state() { # TASK: done, todo (not yet) or failed, of what it needs
    local i n=${needs[task[$1]]}
    for i in ${n:+"${!task[@]}"}; do
        [[ ${folder[task[i]]} = "$n" ]] || continue
        case ${state[i]} in failed | blocked) echo failed; return ;; done) ;; *) echo todo; return ;; esac
    done
    echo 'done'
}

log_of() { local n; n=$(name_of "$1"); printf '%s/logs/%s.log' "$out" "${n//\//,}"; }

launch() { # TASK
    local slot=0 log line s
    for ((slot = 0; slot < jobs; slot++)); do
        for s in ${slot_of[@]+"${slot_of[@]}"}; do ((s != slot)) || continue 2; done
        break
    done
    log=$(log_of "$1") line=$(line_of "$1")
    mkdir -p -- "$out/logs"
    printf '\n# %s  %s\n' "$(date '+%F %T')" "$line" >>"$log"
    (
        ((!${#gpus[@]})) || export CUDA_VISIBLE_DEVICES="${gpus[slot % ${#gpus[@]}]}"
        eval "exec $line"
    ) >>"$log" 2>&1 </dev/null &
    running[$!]=$1 slot_of[$!]=$slot state[$1]=running
    say "start   $(name_of "$1")"
}

reap() {
    local p i
    for p in "${!running[@]}"; do
        ! kill -0 "$p" 2>/dev/null || continue
        i=${running[$p]}
        if wait "$p"; then state[i]='done'; else state[i]=failed; fi
        say "${state[i]}  $(name_of "$i")  ($((++settled)) of $todo)"
        unset "running[$p]" "slot_of[$p]"
    done
}

stop() { # STATUS: every child saves itself and ends
    trap - INT TERM HUP
    ((!${#running[@]})) || kill -TERM "${!running[@]}" 2>/dev/null
    say "stopping ${#running[@]} runs; the same command goes on from here"
    wait
    exit "$1"
}

run_here() {
    local i before=0 todo=0 settled=0 bad=0
    for i in "${!task[@]}"; do if [[ ${state[i]} = todo ]]; then ((++todo)); else ((++before)); fi; done
    say "$todo runs to do, $before finished before; logs in $out/logs"
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    while :; do
        for i in "${!task[@]}"; do
            ((${#running[@]} < jobs)) || break
            [[ ${state[i]} = todo ]] || continue
            case $(need_state "$i") in done) launch "$i" ;; failed) state[i]=blocked ;; esac
        done
        ((${#running[@]})) || break
        wait -n
        reap
    done
    (eval "exec $(figures_line)") &
    running[$!]=figures
    wait "$!" || bad=1
    for i in "${!task[@]}"; do
        case ${state[i]} in
        failed) printf 'FAILED  %s\n        log: %s\n' "$(line_of "$i")" "$(log_of "$i")" ;;
        blocked) printf 'WAITS   %s\n        for: %s\n' "$(line_of "$i")" "${needs[task[i]]}" ;;
        *) continue ;;
        esac
        bad=1
    done
    return $bad
}

# ---- on a Slurm cluster --------------------------------------------------------------------------

declare -A id=() # task -> job_element on the cluster
fresh=()         # arrays submitted by this call

submit_array() { # DEPENDENCY TASK...
    local dependency=$1 list n i
    shift
    list=$(mktemp -- "$out/slurm/XXXXXXXX.jobs") || exit 2
    for i; do line_of "$i"; echo; done >"$list"
    n=$(sbatch --parsable --job-name=tickets "--array=0-$(($# - 1))" --requeue \
        "--output=${out//%/%%}/slurm/%A_%a.log" --open-mode=append --signal=B:USR1@120 \
        ${dependency:+"--dependency=afterok:$dependency" --kill-on-invalid-dep=yes} \
        ${sbatch[@]+"${sbatch[@]}"} \
        <<<"$(printf '#!/bin/bash\nexec bash %q --task %q\n' "$here/run_all.sh" "$list")") ||
        fail "sbatch refused: see above"
    n=${n%%;*} fresh+=("$n")
    local k=0
    for i; do
        id[$i]=${n}_$((k++))
        printf '%s %s\n' "${id[$i]}" "$(name_of "$i")" >>"$out/slurm/submitted"
    done
    echo "submitted $n: $# runs${dependency:+, after $dependency}"
}

run_slurm() {
    local i j n alive dependency bucket waiting submitted=0 queued=0
    declare -A last=() buckets=()
    command -v sbatch >/dev/null || fail '--slurm: there is no sbatch here'
    alive=" $(squeue -h -r -u "$(id -un)" -o %i | tr '\n' ' ') " || fail '--slurm: squeue does not answer'
    mkdir -p -- "$out/slurm" && touch -- "$out/slurm/submitted" || exit 2
    while read -r n i; do last[$i]=$n; done <"$out/slurm/submitted"
    for i in "${!task[@]}"; do
        [[ ${state[i]} = todo ]] || continue
        n=${last[$(name_of "$i")]-}
        if [[ -n $n && $alive = *" $n "* ]]; then
            state[i]=queued id[$i]=$n queued=$((queued + 1))
        elif [[ -n $n ]]; then
            echo "again: $(name_of "$i"), log of the last time: $out/slurm/$n.log"
        fi
    done
    while :; do # the runs whose needs are finished or submitted, in arrays of one dependency each
        buckets=() waiting=0
        for i in "${!task[@]}"; do
            [[ ${state[i]} = todo ]] || continue
            dependency='' n=${needs[task[i]]}
            for j in ${n:+"${!task[@]}"}; do
                [[ ${folder[task[j]]} = "$n" && ${state[j]} != 'done' ]] || continue
                [[ ${state[j]} = queued ]] || { waiting=1; continue 2; }
                dependency+=${dependency:+:}${id[$j]}
            done
            buckets[_$dependency]+=" $i"
        done
        ((${#buckets[@]})) || break
        for dependency in "${!buckets[@]}"; do
            read -ra bucket <<<"${buckets[$dependency]}"
            for ((j = 0; j < ${#bucket[@]}; j += 1000)); do # MaxArraySize is 1001 by default
                submit_array "${dependency#_}" "${bucket[@]:j:1000}"
            done
            for i in "${bucket[@]}"; do state[i]=queued submitted=$((submitted + 1)); done
        done
    done
    ((!waiting)) || fail 'a run needs one that is not in the grid'
    echo "$submitted runs submitted, $queued queued before, $((${#task[@]} - submitted - queued)) finished"
    ((submitted)) || return 0
    n=$(IFS=:; echo "${fresh[*]}")
    sbatch --parsable --job-name=figures "--output=${out//%/%%}/slurm/figures.log" \
        --open-mode=append "--dependency=afterany:$n" ${sbatch[@]+"${sbatch[@]}"} \
        <<<"$(printf '#!/bin/bash\nexec %s\n' "$(figures_line)")" >/dev/null
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
    case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;;
    --quick) quick=1; shift; continue ;;
    --spread) spread=1; shift; continue ;;
    --list | --cost | --slurm) mode=${1#--}; shift; continue ;;
    esac
    (($# > 1)) || fail "$1: unknown, or its value is missing (--help)"
    case $1 in
    --only) only+=,$2 ;;
    --dataset) datasets+=("$2") ;;
    --preset) preset=$2 ;;
    --out) out=${2%/} ;;
    --data-dir) data_dir=$2 ;;
    --device) device=$2 ;;
    --grid) grid=$2 ;;
    --wave) wave=$2 ;;
    --rate) rate=$2 ;;
    --jobs) jobs=$2 ;;
    --gpus) IFS=, read -ra gpus <<<"$2" ;;
    --partition | --account | --time | --gres) sbatch+=("$1=$2") ;;
    --sbatch) sbatch+=("$2") ;;
    --task) run_task "$2" ;;
    *) fail "$1: unknown (--help)" ;;
    esac
    shift 2
done
only=${only#,}
[[ -z $jobs || $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: not a whole number"
cores=$(nproc 2>/dev/null || echo 1)
if [[ -n $quick ]]; then
    datasets=(digits) steps=200 levels=4 sharpness=100 R=0-1 tail=-steps200-drops100+150
    extra=(--steps=200 "--milestones=100,150")
    : "${jobs:=$((cores < 2 ? 1 : 2))}"
fi
chosen=(${datasets[@]+"${datasets[@]##*/}"})
((${#datasets[@]})) || datasets=(cifar10 cifar100 cinic10)
: "${jobs:=$((${#gpus[@]} ? ${#gpus[@]} : 1))}"
((jobs == 1)) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}"

if [[ -n $grid ]]; then
    [[ -r $grid ]] || fail "--grid $grid: no such file"
    # shellcheck source=/dev/null
    . "$grid"
else
    for d in "${datasets[@]}"; do
        case $d in digits | cifar10 | cifar100 | cinic10) grid_of "$d" "$d" ;; *)
            [[ -d $d ]] || fail "--dataset $d: neither digits, cifar10, cifar100, cinic10 nor a folder"
            grid_of "$d" "${preset:-cifar10}" ;;
        esac
    done
fi
select_jobs
make_tasks
case $mode in
list) list ;;
cost) show_cost ;;
slurm) run_slurm ;;
run) run_here ;;
esac
