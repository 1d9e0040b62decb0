#!/usr/bin/env bash
# One worker of a TPU slice: tpu_vm.sh copies this there and runs it on all workers at once.
#
#     worker.sh setup [--python=3.11]            environment with ldm_jax[tpu] in ~/ldm_jax_venv
#     worker.sh start [--bucket=NAME] [--force] [--env=KEY=VALUE] -- flags of ldm_jax.train
#     worker.sh state                            worker_state=absent|running|lost|stopped|exit:CODE
#     worker.sh stop                             SIGTERM to the trainer, which saves
#
# ~/ldm_jax_run has the log and what `state` is read from; the tmux session is called ldm_jax.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STATE=$HOME/ldm_jax_run
VENV=$HOME/ldm_jax_venv
SESSION=ldm_jax

# apt_install PACKAGE...: waits for the updates that a new machine makes by itself.
apt_install() {
    sudo apt-get -o DPkg::Lock::Timeout=600 update -q
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -q "$@"
}

# uv brings a Python of its own: those of the TPU images are older than ldm_jax needs.
set_up() {
    command -v tmux >/dev/null || apt_install tmux
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x $VENV/bin/python ]] || uv venv --python "$1" "$VENV"
    (cd "$ROOT" && uv pip install --python "$VENV/bin/python" -e '.[tpu]')
}

# Directories are renamed when a checkpoint is complete: at once in a bucket with hierarchical
# namespace, one object after the other elsewhere. No cache of metadata, as workers share the files.
mount_bucket() {
    local point=$MOUNTS/$1 key=/usr/share/keyrings/cloud.google.asc
    if mountpoint -q "$point"; then return; fi
    if ! command -v gcsfuse >/dev/null; then
        curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \
            "gcsfuse-$(lsb_release -c -s) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        apt_install gcsfuse
    fi
    sudo mkdir -p "$point"
    sudo chown "$(id -u)" "$point"
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$1" "$point"
}

running() {
    tmux has-session -t "=$SESSION" 2>/dev/null
}

# start BUCKET FORCE ENVIRONMENT... -- FLAGS...
start() {
    local bucket=$1 force=$2 command=()
    shift 2
    if running; then
        ((force)) || fail "training is running: stop it first"
        tmux kill-session -t "=$SESSION"
    fi
    if [[ -n $bucket ]]; then mount_bucket "$bucket"; fi
    mkdir -p "$STATE"
    rm -f "$STATE/exit" "$STATE/stopped" "$STATE/pid"
    touch "$STATE/started"
    while [[ $1 != -- ]]; do
        command+=("$1")
        shift
    done
    shift
    command=(env ${command[@]+"${command[@]}"} "$VENV/bin/python" -m ldm_jax.train "$@")
    tmux new-session -d -s "$SESSION" -c "$ROOT" \
        "$(quote bash "$ROOT/launch/worker.sh" run "${command[@]}")"
}

# Inside tmux: the trainer with its log, then its exit code, which says that it has ended.
run_trainer() {
    echo $$ >"$STATE/pid"
    run_child "$@" >>"$STATE/train.log" 2>&1
    echo "$child_code" >"$STATE/exit.new"
    mv "$STATE/exit.new" "$STATE/exit"
}

state() {
    if [[ -f $STATE/exit ]]; then
        if [[ -f $STATE/stopped ]]; then
            echo worker_state=stopped
        else
            echo "worker_state=exit:$(<"$STATE/exit")"
        fi
    elif running; then
        echo worker_state=running
    elif [[ -f $STATE/started ]]; then
        echo worker_state=lost # the machine was restarted under it
    else
        echo worker_state=absent
    fi
}

stop() {
    if [[ -f $STATE/exit ]] || ! running; then
        echo "no training is running"
        return
    fi
    [[ -f $STATE/pid ]] || fail "the trainer is being started: try again"
    touch "$STATE/stopped"
    kill -TERM "$(<"$STATE/pid")"
}

(($#)) || fail "no command given (see --help)"
action=$1
shift
if [[ $action == run ]]; then
    run_trainer "$@"
    exit 0
fi
python=3.11 bucket="" force=0 environment=() trainer=()
while (($#)); do
    case $1 in
        --python=*) python=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --env=*) environment+=("${1#*=}") ;;
        --force) force=1 ;;
        --) trainer=("${@:2}") && break ;;
        *) fail "unexpected argument '$1'" ;;
    esac
    shift
done
case $action in
    --help | -h) print_help ;;
    setup) set_up "$python" ;;
    start)
        start "$bucket" "$force" ${environment[@]+"${environment[@]}"} \
            -- ${trainer[@]+"${trainer[@]}"}
        ;;
    state) state ;;
    stop) stop ;;
    *) fail "no command '$action' (see --help)" ;;
esac
