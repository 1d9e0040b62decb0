#!/usr/bin/env bash
# Trains on one host with any number of GPUs: one process sees them all.
#
#     launch/gpus.sh --config=FILE --workdir=PATH [options] [-- flags of ldm_jax.train]
#
# After exit codes 75 (interrupted and saved) and 77 (a peer died) the same command is started
# again, after others not. SIGINT (Ctrl-C) and SIGTERM stop training, which saves; no restart then.
#
#     --gpus=0,2            these GPUs only (CUDA_VISIBLE_DEVICES); default: all
#     --max_restarts=N      restarts at most (20)
#     --pause=SECONDS       wait before each (10)
#     --tmux=NAME           run in a tmux session of this name and return at once
#     --python=FILE         of the environment with ldm_jax (python)
#     --dry_run             print the commands, run none
#
# Several such hosts: give each, after --, --coordinator=HOST:PORT --num_processes=N --process_id=I.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config="" workdir="" gpus="" max_restarts=20 pause_seconds=10 session="" python=python
trainer=()
given=("$@")
while (($#)); do
    case $1 in
        --help | -h) print_help ;;
        --config=*) config=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --pause=*) pause_seconds=${1#*=} ;;
        --tmux=*) session=${1#*=} ;;
        --python=*) python=${1#*=} ;;
        --dry_run) dry_run=1 ;;
        --) trainer=("${@:2}") && break ;;
        *) fail "unexpected argument '$1': flags are written --name=value (see --help)" ;;
    esac
    shift
done
require --config "$config"
require --workdir "$workdir"
[[ $workdir != gs://* ]] || fail "--workdir is '$workdir': mount the bucket and give its path here"
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus is '$gpus', but is written 0,1,2"
check_config "$config" "$PWD"
check_count --max_restarts "$max_restarts"
check_seconds --pause "$pause_seconds"
check_tool "$python"

if [[ -n $session ]]; then
    check_tool tmux
    again=()
    for word in "${given[@]}"; do
        if [[ $word == -- ]]; then break; fi
        if [[ $word != --tmux=* && $word != --dry_run ]]; then again+=("$word"); fi
    done
    if ((${#trainer[@]})); then again+=(-- "${trainer[@]}"); fi
    run tmux new-session -d -s "$session" -c "$PWD" \
        "$(quote bash "$ROOT/launch/gpus.sh" "${again[@]}")"
    say "to look on: tmux attach -t $(quote "$session")"
    exit 0
fi

command=("$python" -m ldm_jax.train "--config=$config" "--workdir=$workdir")
command+=(${trainer[@]+"${trainer[@]}"})
if [[ -n $gpus ]]; then command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}"); fi
if ((dry_run)); then
    run "${command[@]}"
    exit 0
fi

restarts=0
while :; do
    run_child "${command[@]}"
    if ! may_restart "$child_code" || ((stop_requested)); then exit "$child_code"; fi
    if ((restarts >= max_restarts)); then
        say "exit code $child_code after $restarts restarts, the most allowed (--max_restarts)"
        exit "$child_code"
    fi
    restarts=$((restarts + 1))
    say "exit code $child_code: restart $restarts of at most $max_restarts"
    pause "$pause_seconds"
done
