# What the launch scripts share; sourced, not run.
# shellcheck shell=bash
# shellcheck disable=SC2034 # ROOT, child_code and others are read by the scripts

if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
    echo "error: bash 4.4 or later is needed, this is ${BASH_VERSION}" >&2
    exit 1
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where buckets are mounted: the trainer reads and writes files by path.
MOUNTS=/mnt/gcs
dry_run=0
stop_requested=0

# Prints one line and ends. In a subshell, it ends only that.
fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# What happens, with the time; nothing does in a dry run.
say() {
    ((dry_run)) || printf '%s %s\n' "$(date '+%F %T')" "$1" >&2
}

# The comment at the head of the script is its help.
print_help() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit 0
}

# quote WORD...: the words as a shell reads them back.
quote() {
    local word text=""
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
            word="'${word//\'/\'\\\'\'}'"
        fi
        text+="${text:+ }$word"
    done
    printf '%s' "$text"
}

# run COMMAND...: runs it, or with --dry_run prints it.
run() {
    if ((dry_run)); then
        quote "$@"
        echo
    else
        "$@"
    fi
}

# pause SECONDS
pause() {
    if ! ((dry_run)); then sleep "$1"; fi
}

# require FLAG VALUE: the flag was given.
require() {
    [[ -n $2 ]] || fail "no $1 given: use $1=... (see --help)"
}

# check_count FLAG VALUE [MINIMUM]: the value is a whole number.
check_count() {
    if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < ${3:-0})); then
        fail "$1 is '$2', but must be a whole number from ${3:-0} on"
    fi
}

# check_seconds FLAG VALUE: the value is a duration, as sleep takes it.
check_seconds() {
    [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "$1 is '$2', but must be a number of seconds"
}

# check_config FILE[:ARGUMENT] DIRECTORY: the file is there, seen from where the trainer runs.
check_config() {
    [[ -f ${1%%:*} && ${1%%:*} == /* ]] || [[ -f $2/${1%%:*} ]] ||
        fail "no config file ${1%%:*} in $2"
}

# check_tool NAME: it is on the PATH; a dry run does without.
check_tool() {
    ((dry_run)) || command -v "$1" >/dev/null || fail "$1 is not on the PATH"
}

# bucket_of PATH: BUCKET of gs://BUCKET/..., else nothing.
bucket_of() {
    if [[ $1 == gs://* ]]; then
        local rest=${1#gs://}
        printf '%s' "${rest%%/*}"
    fi
}

# mounted PATH: gs://BUCKET/... as the path where the bucket is mounted; others as they are.
mounted() {
    if [[ $1 == gs://* ]]; then printf '%s' "$MOUNTS/${1#gs://}"; else printf '%s' "$1"; fi
}

check_workdir() {
    if [[ $1 == gs://* && ! $1 =~ ^gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/.*[^/] ]]; then
        fail "--workdir is '$1': a folder of a bucket is written gs://BUCKET/FOLDER"
    fi
}

# The trainer's exit codes after which the same command goes on: 75, interrupted and saved; 77, a
# peer died. All others (1 wrong input, 76 diverged, crashes) would only come again.
may_restart() {
    [[ $1 == 75 || $1 == 77 ]]
}

# overall_code CODE...: one exit code for a run of several processes. A code that forbids a restart
# wins, as the others report 77 when one of them fails.
overall_code() {
    local code overall=0
    for code in "$@"; do
        if [[ $code != 0 ]] && ! may_restart "$code"; then
            printf '%s' "$code"
            return
        fi
        if ((code > overall)); then overall=$code; fi
    done
    printf '%s' "$overall"
}

# run_child COMMAND...: runs it with SIGTERM and SIGINT passed on as SIGTERM, and waits for its end
# however many come; sets `child_code`, and `stop_requested` if any came.
run_child() {
    # Children in the background ignore SIGINT; SIGTERM reaches the trainer either way.
    child=""
    trap 'stop_requested=1; kill -TERM ${child:+"$child"} 2>/dev/null || true' TERM INT
    "$@" &
    child=$!
    if ((stop_requested)); then kill -TERM "$child" 2>/dev/null || true; fi # it came just before
    while :; do
        wait "$child" || true # a signal ends it early
        kill -0 "$child" 2>/dev/null || break
    done
    child_code=0
    wait "$child" || child_code=$?
    trap - TERM INT
}
