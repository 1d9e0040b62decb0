#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster: submits slurm.sbatch.
#
#     launch/slurm.sh --config=FILE --workdir=PATH --nodes=N --gpus=N [options]
#         [-- flags of ldm_jax.train]
#
# The workdir, the repository and the directory of this call are seen by all nodes. The job returns
# to the queue after exit codes 75 (interrupted and saved; also near the time limit) and 77 (a peer
# died), and by --requeue when it was preempted or a node failed; after other codes it does not.
#
#     --gpus=N              GPUs of each node
#     --per=gpu|node        one process per GPU (default) or per node
#     --name=NAME           of the job (ldm_jax)
#     --time=LIMIT          as sbatch takes it, such as 24:00:00; default: the partition's
#     --sbatch_flag=FLAG    further flag of sbatch, such as --partition=gpu; may be repeated
#     --max_restarts=N      times that a job goes back into the queue at most (20)
#     --python=FILE         of the environment with ldm_jax, seen by all nodes (python)
#     --dry_run             print the command, run none

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config="" workdir="" nodes="" gpus="" per=gpu name=ldm_jax limit="" max_restarts=20 python=python
sbatch_flags=() trainer=()
while (($#)); do
    case $1 in
        --help | -h) print_help ;;
        --config=*) config=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --per=*) per=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --time=*) limit=${1#*=} ;;
        --sbatch_flag=*) sbatch_flags+=("${1#*=}") ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --python=*) python=${1#*=} ;;
        --dry_run) dry_run=1 ;;
        --) trainer=("${@:2}") && break ;;
        *) fail "unexpected argument '$1': flags are written --name=value (see --help)" ;;
    esac
    shift
done
require --config "$config"
require --workdir "$workdir"
require --nodes "$nodes"
require --gpus "$gpus"
[[ $workdir != gs://* ]] || fail "--workdir is '$workdir': give a path that all nodes see"
[[ $per == gpu || $per == node ]] || fail "--per is '$per', but must be gpu or node"
check_count --nodes "$nodes" 1
check_count --gpus "$gpus" 1
check_count --max_restarts "$max_restarts"
check_config "$config" "$PWD"
check_tool sbatch

# --gres, not --gpus-per-task, which would hide from each process all but its own GPU, whose number
# would then not be the one that JAX asks for.
command=(sbatch "--job-name=$name" "--nodes=$nodes" "--gres=gpu:$gpus" --requeue)
command+=(--signal=TERM@120 --open-mode=append "--output=$name-%j.log" "--chdir=$PWD")
tasks=$gpus
if [[ $per == node ]]; then tasks=1; fi
command+=("--ntasks=$((nodes * tasks))" "--ntasks-per-node=$tasks")
if [[ -n $limit ]]; then command+=("--time=$limit"); fi
command+=(${sbatch_flags[@]+"${sbatch_flags[@]}"})
command+=("$ROOT/launch/slurm.sbatch" "--root=$ROOT" "--python=$python")
command+=("--max_restarts=$max_restarts")
if [[ $per == node ]]; then command+=("--local_devices=$gpus"); fi
command+=(-- "--config=$config" "--workdir=$workdir" ${trainer[@]+"${trainer[@]}"})
run "${command[@]}"
