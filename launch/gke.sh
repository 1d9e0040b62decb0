#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster with JobSet installed, as kubectl is configured.
#
#     launch/gke.sh COMMAND --name=NAME [options] [-- flags of ldm_jax.train]
#
# Commands:
#     render   print the manifest (gke_jobset.yaml with everything filled in)
#     start    apply it. JobSet restarts all hosts after exit codes 75 (interrupted and saved) and 77
#              (a peer died) and when nodes are taken away; other codes fail the set
#     status   the set and its pods
#     logs     follow the log of the first host
#     delete   delete the set; running trainers save. Node pools stay, and may cost
#
# Options of render and start:
#     --image=IMAGE             with ldm_jax; launch/Dockerfile makes it
#     --tpu=KIND                such as tpu-v5-lite-podslice
#     --topology=SHAPE          of a slice, such as 4x4
#     --chips_per_host=N        (4)
#     --slices=N                (1); more: also --config.mesh.dcn_data=N after --
#     --spot                    on spot nodes
#     --config=FILE             in the image, such as configs/imagenet_dit.py
#     --workdir=gs://B/FOLDER   the bucket is mounted by GKE; or a path within a claim
#     --claim=NAME              mount this PersistentVolumeClaim at /data
#     --service_account=NAME    of Kubernetes, allowed to write to the bucket (default)
#     --env=KEY=VALUE           for the trainer; may be repeated
#     --max_restarts=N          (100)
#
#     --namespace=NAME          default: kubectl's own
#     --dry_run                 print the commands, run none

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" image="" tpu="" topology="" chips_per_host=4 slices=1 spot=0 config="" workdir=""
claim="" service_account=default max_restarts=100 namespace="" environment=() trainer=()

[[ $# -gt 0 ]] || fail "no command given (see --help)"
action=$1
shift
case $action in
    --help | -h) print_help ;;
    render | start | status | logs | delete) ;;
    *) fail "no command '$action' (see --help)" ;;
esac
while (($#)); do
    case $1 in
        --help | -h) print_help ;;
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --tpu=*) tpu=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --chips_per_host=*) chips_per_host=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --spot) spot=1 ;;
        --config=*) config=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --claim=*) claim=${1#*=} ;;
        --service_account=*) service_account=${1#*=} ;;
        --env=*) environment+=("${1#*=}") ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --dry_run) dry_run=1 ;;
        --) trainer=("${@:2}") && break ;;
        *) fail "unexpected argument '$1': flags are written --name=value (see --help)" ;;
    esac
    shift
done

# json WORD: as a JSON string, which YAML reads, too.
json() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    printf '"%s"' "${text//$'\t'/\\t}"
}

# json_list WORD...
json_list() {
    local word text=""
    for word in "$@"; do text+="${text:+, }$(json "$word")"; done
    printf '[%s]' "$text"
}

render() {
    local manifest chips=1 side bucket variable annotations="" selector mounts="" volumes="" list=""
    manifest=$(<"$ROOT/launch/gke_jobset.yaml")
    for side in ${topology//x/ }; do chips=$((chips * side)); done
    bucket=$(bucket_of "$workdir")
    if [[ -n $bucket ]]; then
        annotations='gke-gcsfuse/volumes: "true"'
        mounts="{name: bucket, mountPath: $(json "$MOUNTS/$bucket")}"
        volumes="{name: bucket, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: "
        volumes+="{bucketName: $(json "$bucket"), mountOptions: "
        volumes+='"implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:200000"}}}'
    fi
    if [[ -n $claim ]]; then
        mounts+="${mounts:+, }{name: claim, mountPath: /data}"
        volumes+="${volumes:+, }{name: claim, persistentVolumeClaim: {claimName: $(json "$claim")}}"
    fi
    for variable in ${environment[@]+"${environment[@]}"}; do
        list+="${list:+, }{name: $(json "${variable%%=*}"), value: $(json "${variable#*=}")}"
    done
    selector="cloud.google.com/gke-tpu-accelerator: $(json "$tpu"), "
    selector+="cloud.google.com/gke-tpu-topology: $(json "$topology")"
    if ((spot)); then selector+=', cloud.google.com/gke-spot: "true"'; fi
    manifest=${manifest//@NAME@/$(json "$name")}
    manifest=${manifest//@MAX_RESTARTS@/$max_restarts}
    manifest=${manifest//@SLICES@/$slices}
    manifest=${manifest//@HOSTS@/$((chips / chips_per_host))}
    manifest=${manifest//@CHIPS@/$chips_per_host}
    manifest=${manifest//@ANNOTATIONS@/"{$annotations}"}
    manifest=${manifest//@SERVICE_ACCOUNT@/"$(json "$service_account")"}
    manifest=${manifest//@NODE_SELECTOR@/"{$selector}"}
    manifest=${manifest//@IMAGE@/"$(json "$image")"}
    manifest=${manifest//@MOUNTS@/"[$mounts]"}
    manifest=${manifest//@VOLUMES@/"[$volumes]"}
    manifest=${manifest//@ENVIRONMENT@/"[$list]"}
    # Last: the user's words may hold anything.
    manifest=${manifest//@COMMAND@/"$(json_list python -m ldm_jax.train "--config=$config" \
        "--workdir=$(mounted "$workdir")" ${trainer[@]+"${trainer[@]}"})"}
    printf '%s\n' "$manifest"
}

require --name "$name"
# Pods are called NAME-slice-J-I-xxxxx, within the 63 characters of a host name.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name is '$name': use at most 40 of a-z, 0-9 and -, a letter first"
if [[ $action == render || $action == start ]]; then
    require --image "$image"
    require --tpu "$tpu"
    require --topology "$topology"
    require --config "$config"
    require --workdir "$workdir"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
        fail "--topology is '$topology', but is written 4x4 or 2x2x4"
    check_count --chips_per_host "$chips_per_host" 1
    check_count --slices "$slices" 1
    check_count --max_restarts "$max_restarts"
    (((${topology//x/*}) % chips_per_host == 0)) ||
        fail "--chips_per_host is $chips_per_host, which does not divide the chips of $topology"
    check_workdir "$workdir"
    [[ $workdir == gs://* || -n $claim ]] ||
        fail "--workdir is '$workdir', which is lost with the pod: use gs://BUCKET/FOLDER or --claim"
    for variable in ${environment[@]+"${environment[@]}"}; do
        [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$variable: write --env=KEY=VALUE"
    done
fi

command=(kubectl)
if [[ -n $namespace ]]; then command+=("--namespace=$namespace"); fi
pods=(--selector "jobset.sigs.k8s.io/jobset-name=$name")
case $action in
    render) render ;;
    start)
        if ((dry_run)); then
            printf '%s <<'"'MANIFEST'"'\n%s\nMANIFEST\n' \
                "$(quote "${command[@]}" apply -f -)" "$(render)"
        else
            check_tool kubectl
            render | "${command[@]}" apply -f -
        fi
        ;;
    status)
        check_tool kubectl
        run "${command[@]}" get jobset "$name"
        run "${command[@]}" get pods "${pods[@]}" --output=wide
        ;;
    logs)
        check_tool kubectl
        pods[1]+=",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        run "${command[@]}" logs --follow --tail=100 "${pods[@]}" --container=train
        ;;
    delete)
        check_tool kubectl
        run "${command[@]}" delete jobset "$name"
        ;;
esac
