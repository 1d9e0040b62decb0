#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs.
#
#     launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of ldm_jax.train]
#
# Commands:
#     create   make the node and wait for it; one of this name is used as it is
#     setup    put the code and its environment on every worker
#     start    start training on every worker, in tmux
#     watch    all of these, then look on: restart after exit codes 75 (interrupted and saved) and 77
#              (a peer died), make the node anew when it was preempted, end with the trainer's code.
#              Interrupting the watch leaves the training alone; the same command takes it up again
#     status   state of the node and of each worker
#     logs     follow the log of one worker
#     stop     interrupt the trainer, which saves. The node stays, and is paid for
#     delete   delete the node, which ends its cost
#
# Options:
#     --project=ID              default: gcloud's own
#     --accelerator=TYPE        such as v5litepod-16; for create and watch
#     --runtime_version=NAME    default: the one for TYPE
#     --spot                    cheaper, and may be preempted at any time
#     --queued                  by a queued resource of the same name: waits for capacity
#     --config=FILE             in the repository, such as configs/imagenet_dit.py
#     --workdir=gs://B/FOLDER   the bucket is mounted on every worker; or a path that all share
#     --repository=URL          clone this rather than copy the code from here
#     --ref=NAME                branch, tag or commit of it
#     --python=3.11             version of Python there
#     --env=KEY=VALUE           for the trainer; may be repeated
#     --create_flag=FLAG        further flag of gcloud's create; may be repeated
#     --ssh_flag=FLAG           further flag of gcloud's ssh and scp, such as --internal-ip
#     --worker=N                whose log to follow (0)
#     --max_restarts=N          restarts and new nodes at most (100)
#     --interval=SECONDS        between two looks (60)
#     --delete_at_end           watch deletes the node when it ends, whatever the result
#     --dry_run                 print the commands of an undisturbed run, run none

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CODE=(ldm_jax configs launch setup.py pyproject.toml README.md LICENSE)
PATIENCE=30  # looks in a row that fail before the watch gives up
STRAGGLING=10 # looks in a row that see only some of the workers at work

name="" zone="" project="" accelerator="" runtime_version="" spot=0 queued=0
config="" workdir="" repository="" ref="" python=3.11 worker=0
max_restarts=100 interval=60 delete_at_end=0
environment=() create_flags=() ssh_flags=() trainer=()

[[ $# -gt 0 ]] || fail "no command given (see --help)"
action=$1
shift
case $action in
    --help | -h) print_help ;;
    create | setup | start | watch | status | logs | stop | delete) ;;
    *) fail "no command '$action' (see --help)" ;;
esac
while (($#)); do
    case $1 in
        --help | -h) print_help ;;
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --runtime_version=*) runtime_version=${1#*=} ;;
        --spot) spot=1 ;;
        --queued) queued=1 ;;
        --config=*) config=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --repository=*) repository=${1#*=} ;;
        --ref=*) ref=${1#*=} ;;
        --python=*) python=${1#*=} ;;
        --env=*) environment+=("$1") ;;
        --create_flag=*) create_flags+=("${1#*=}") ;;
        --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
        --worker=*) worker=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --interval=*) interval=${1#*=} ;;
        --delete_at_end) delete_at_end=1 ;;
        --dry_run) dry_run=1 ;;
        --) trainer=("${@:2}") && break ;;
        *) fail "unexpected argument '$1': flags are written --name=value (see --help)" ;;
    esac
    shift
done

require --name "$name"
require --zone "$zone"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "--name is '$name': use a-z, 0-9 and -, a letter first"
check_count --max_restarts "$max_restarts"
check_count --worker "$worker"
check_seconds --interval "$interval"
if [[ $action == create || $action == watch ]]; then
    require --accelerator "$accelerator"
    if [[ -z $runtime_version ]]; then
        case $accelerator in
            v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime_version=v2-alpha-tpuv5 ;;
            v6e-*) runtime_version=v2-alpha-tpuv6e ;;
            v[234]-*) runtime_version='tpu-ubuntu2204-base' ;;
            *) fail "give --runtime_version: none is known for '$accelerator'" ;;
        esac
    fi
fi
if [[ $action == start || $action == watch ]]; then
    require --config "$config"
    require --workdir "$workdir"
    check_workdir "$workdir"
    [[ $config != /* ]] || fail "--config is '$config': give its path within the repository"
    if [[ -z $repository ]]; then check_config "$config" "$ROOT"; fi
    if [[ $workdir != gs://* ]]; then
        echo "warning: unless all workers share $workdir, it is lost with the node" >&2
    fi
fi
for flag in ${environment[@]+"${environment[@]}"}; do
    [[ $flag =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$flag: write --env=KEY=VALUE"
done
check_tool gcloud

tpu=(gcloud compute tpus)
where=("--zone=$zone" --quiet)
if [[ -n $project ]]; then where+=("--project=$project"); fi
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
pretend_node=ABSENT # what a dry run takes the node and its training for
pretend_worker=absent

# ask COMMAND...: sets `answer`; fails where the command does, with what it said in $errors.
ask() {
    if ((dry_run)); then
        run "$@"
        answer=$pretend_node
    else
        answer=$("$@" 2>"$errors") || return 1
    fi
}

# on_workers WHICH COMMAND: a shell command on one worker or all.
on_workers() {
    run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
}

# look_at_node: sets `node` to ABSENT, WAIT, READY, LOST, or to what is not expected.
look_at_node() {
    if ((queued)); then
        if ask "${tpu[@]}" queued-resources describe "$name" "${where[@]}" \
            '--format=value(state.state)'; then
            if ((dry_run)) && [[ $answer == READY ]]; then answer=ACTIVE; fi
        elif grep -q NOT_FOUND "$errors"; then
            answer=ABSENT
        else
            answer=UNKNOWN
        fi
        case $answer in
            ACTIVE) ;;
            CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING | DELETING)
                node=WAIT
                return
                ;;
            SUSPENDED) node=LOST && return ;;
            *) node=$answer && return ;;
        esac
    fi
    if ! ask "${tpu[@]}" tpu-vm describe "$name" "${where[@]}" '--format=value(state)'; then
        if grep -q NOT_FOUND "$errors"; then answer=ABSENT; else answer=UNKNOWN; fi
    fi
    case $answer in
        PREEMPTED | TERMINATED) node=LOST ;;
        CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING | DELETING) node=WAIT ;;
        ABSENT) if ((queued)); then node=LOST; else node=ABSENT; fi ;;
        *) node=$answer ;;
    esac
}

create_node() {
    local flags=("${where[@]}" "--accelerator-type=$accelerator")
    if ((spot)); then flags+=(--spot); fi
    flags+=(${create_flags[@]+"${create_flags[@]}"})
    pretend_node=READY
    if ((queued)); then
        run "${tpu[@]}" queued-resources create "$name" "--node-id=$name" \
            "--runtime-version=$runtime_version" "${flags[@]}"
    else
        run "${tpu[@]}" tpu-vm create "$name" "--version=$runtime_version" "${flags[@]}"
    fi
}

delete_node() {
    if ((queued)); then
        run "${tpu[@]}" queued-resources delete "$name" --force "${where[@]}"
    else
        run "${tpu[@]}" tpu-vm delete "$name" "${where[@]}"
    fi
}

set_up() {
    local unpack archive=${XDG_CACHE_HOME:-$HOME/.cache}/ldm_jax/launch/$name.tar.gz
    if [[ -n $repository ]]; then
        unpack="rm -rf ldm_jax && git clone -q $(quote "$repository") ldm_jax"
        if [[ -n $ref ]]; then unpack+=" && git -C ldm_jax checkout -q $(quote "$ref")"; fi
    else
        run mkdir -p "$(dirname "$archive")" || return
        run tar -czf "$archive" -C "$ROOT" --exclude=__pycache__ "${CODE[@]}" || return
        run "${tpu[@]}" tpu-vm scp "$archive" "$name:ldm_jax.tar.gz" "${where[@]}" --worker=all \
            ${ssh_flags[@]+"${ssh_flags[@]}"} || return
        unpack="rm -rf ldm_jax && mkdir ldm_jax && tar -xzf ldm_jax.tar.gz -C ldm_jax"
    fi
    on_workers all "$unpack && bash ldm_jax/launch/worker.sh setup --python=$(quote "$python")"
}

# start [--force]: --force ends what still runs.
start() {
    local words=(bash ldm_jax/launch/worker.sh start "$@") bucket
    bucket=$(bucket_of "$workdir")
    if [[ -n $bucket ]]; then words+=("--bucket=$bucket"); fi
    words+=(${environment[@]+"${environment[@]}"} -- "--config=$config")
    words+=("--workdir=$(mounted "$workdir")" ${trainer[@]+"${trainer[@]}"})
    pretend_worker=exit:0
    on_workers all "$(quote "${words[@]}")"
}

# look_at_workers: sets `codes`, `count_running` and `verdict`, one of UNKNOWN, ABSENT, STOPPED, WAIT,
# STRAGGLERS (some have ended, for reasons that allow a restart) and ENDED.
look_at_workers() {
    local script=ldm_jax/launch/worker.sh text line states=()
    local command="if [ -f $script ]; then bash $script state; else echo worker_state=absent; fi"
    codes=() count_running=0 verdict=UNKNOWN
    if ((dry_run)); then
        on_workers all "$command"
        states=("$pretend_worker")
    else
        text=$(on_workers all "$command" 2>"$errors") || return 0
        while IFS= read -r line; do
            if [[ $line == worker_state=* ]]; then states+=("${line#*=}"); fi
        done <<<"$text"
    fi
    ((${#states[@]})) || return 0
    for line in "${states[@]}"; do
        case $line in
            absent | stopped) verdict=${line^^} && return ;;
            running) count_running=$((count_running + 1)) ;;
            lost) codes+=(77) ;;
            exit:*) codes+=("${line#exit:}") ;;
        esac
    done
    if ((count_running == 0)); then
        verdict=ENDED
    elif ((${#codes[@]} == 0)); then
        verdict=WAIT
    else
        case $(overall_code "${codes[@]}") in
            0 | 75 | 77) verdict=STRAGGLERS ;; # the others are ending, too, or hang
            *) verdict=ENDED ;;                # what failed fails the run
        esac
    fi
}

end() {
    say "$2"
    if ((delete_at_end)); then
        delete_node
    elif ((action_makes_nodes)); then
        say "$name is still there and paid for; to end that: $(quote "$0" delete \
            "--name=$name" "--zone=$zone" ${project:+"--project=$project"})$(
            if ((queued)); then echo " --queued"; fi)"
    fi
    exit "$1"
}

# count_restart CODE WHY: ends the watch where no further restart is allowed.
count_restart() {
    if ((restarts >= max_restarts)); then
        end "$1" "$2, after $restarts restarts, the most allowed (--max_restarts)"
    fi
    restarts=$((restarts + 1))
    say "$2: restart $restarts of at most $max_restarts"
}

# failed WHY: a look or a command failed, which may pass.
failed() {
    failures=$((failures + 1))
    say "$1 ($failures of $PATIENCE in a row)"
    sed 's/^/    /' "$errors" >&2
    if ((failures >= PATIENCE)); then end 1 "giving up"; fi
    pause "$interval"
}

# wait_for_node: makes the node where there is none and returns when it is ready.
wait_for_node() {
    while :; do
        look_at_node
        case $node in
            READY) return ;;
            ABSENT)
                if ! create_node; then
                    count_restart 1 "no node could be made"
                    pause "$interval"
                fi
                ;;
            WAIT)
                failures=0
                pause "$interval"
                ;;
            LOST)
                count_restart 75 "$name was preempted"
                if ! delete_node; then pause "$interval"; fi
                ;;
            UNKNOWN) failed "gcloud did not tell the state of $name" ;;
            *) end 1 "$name is $node: delete it, or see what gcloud says of it" ;;
        esac
    done
}

watch() {
    local waited=0 code
    while :; do
        wait_for_node
        look_at_workers
        if [[ $verdict != UNKNOWN ]]; then failures=0; fi
        if [[ $verdict != STRAGGLERS ]]; then waited=0; fi
        case $verdict in
            UNKNOWN) failed "no worker answered" ;;
            ABSENT) if ! { set_up && start --force; }; then failed "setting up failed"; fi ;;
            STOPPED) end 75 "training was stopped, and goes on with: start" ;;
            WAIT) pause "$interval" ;;
            STRAGGLERS)
                waited=$((waited + 1))
                if ((waited > STRAGGLING)); then
                    count_restart 77 "$count_running workers go on without the others"
                    start --force || failed "starting failed"
                else
                    pause "$interval"
                fi
                ;;
            ENDED)
                code=$(overall_code "${codes[@]}")
                if ((code == 0)); then end 0 "training is done"; fi
                may_restart "$code" || end "$code" "training ended with exit code $code"
                count_restart "$code" "exit code $code"
                start --force || failed "starting failed"
                ;;
        esac
    done
}

restarts=0 failures=0 action_makes_nodes=0
case $action in
    create) wait_for_node ;;
    setup) set_up ;;
    start) start ;;
    watch)
        action_makes_nodes=1
        watch
        ;;
    status)
        look_at_node
        on_workers all "bash ldm_jax/launch/worker.sh state"
        ;;
    logs) on_workers "$worker" "tail -n 100 -F ldm_jax_run/train.log" ;;
    stop) on_workers all "bash ldm_jax/launch/worker.sh stop" ;;
    delete) delete_node ;;
esac
