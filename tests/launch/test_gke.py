import pytest
import yaml

from launch.stubs import Stubs, printed

NAME = ("--name=run",)
SLICE = ("--image=registry/ldm_jax:1", "--tpu=tpu-v5-lite-podslice", "--topology=4x4")
RUN = ("--config=configs/imagenet_dit.py", "--workdir=gs://bucket/runs/a")


def test_manifest_has_what_is_needed(stubs: Stubs) -> None:
    flags = ["--config.data.where=a & 'b' \"c\" @NAME@ \\n", "--x=two\nlines", "--y=$HOME"]
    options = ("--slices=2", "--spot", "--max_restarts=7", '--env=A=b "c"', "--claim=disk")
    result = stubs.run("gke.sh", "render", *NAME, *SLICE, *RUN, *options, "--", *flags)
    assert result.returncode == 0, result.stderr
    assert stubs.calls() == []
    manifest = yaml.safe_load(result.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    disruption, codes = job["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Count"  # asked first: nodes that go away allow a restart
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert codes["action"] == "FailJob"
    assert codes["onExitCodes"]["operator"] == "NotIn"
    assert codes["onExitCodes"]["values"] == [75, 77]
    template = job["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = template["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == codes["onExitCodes"]["containerName"]
    assert container["image"] == "registry/ldm_jax:1"
    own = ["--config=configs/imagenet_dit.py", "--workdir=/mnt/gcs/bucket/runs/a"]
    assert container["command"] == ["python", "-m", "ldm_jax.train", *own, *flags]
    assert container["env"] == [{"name": "A", "value": 'b "c"'}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"bucket": "/mnt/gcs/bucket", "claim": "/data"}
    bucket, claim = pod["volumes"]
    assert bucket["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert claim["persistentVolumeClaim"] == {"claimName": "disk"}


@pytest.mark.parametrize(
    ("shape", "per_host", "hosts"), [("2x2", "4", 1), ("2x2x4", "4", 4), ("2x4", "8", 1)]
)
def test_hosts_of_a_slice(stubs: Stubs, shape: str, per_host: str, hosts: int) -> None:
    options = (*SLICE[:2], f"--topology={shape}", f"--chips_per_host={per_host}")
    result = stubs.run("gke.sh", "render", *NAME, *options, *RUN)
    job = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts


def test_dry_run_prints_what_a_run_does(stubs: Stubs) -> None:
    given = ("start", *NAME, *SLICE, *RUN, "--namespace=n")
    dry = stubs.run("gke.sh", *given, "--dry_run")
    assert dry.returncode == 0 and stubs.calls() == []
    assert stubs.run("gke.sh", *given).returncode == 0
    head, _, manifest = dry.stdout.partition(" <<'MANIFEST'\n")
    assert printed(head) == stubs.calls() == [["kubectl", "--namespace=n", "apply", "-f", "-"]]
    assert manifest.removesuffix("MANIFEST\n") == (stubs.folder / "stdin").read_text()
    for action in ("status", "logs", "delete"):
        dry = stubs.run("gke.sh", action, *NAME, "--dry_run")
        assert dry.returncode == 0 and stubs.calls() == []
        assert stubs.run("gke.sh", action, *NAME).returncode == 0
        calls = stubs.calls()
        assert calls and printed(dry.stdout) == calls


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no command given"),
        (("apply",), "no command 'apply'"),
        (("start",), "no --name given"),
        (("start", "--name=A_b"), "--name is 'A_b'"),
        (("start", *NAME), "no --image given"),
        (("start", *NAME, *SLICE), "no --config given"),
        (("start", *NAME, *SLICE, *RUN, "--topology=16"), "--topology is '16'"),
        (("start", *NAME, *SLICE, *RUN, "--chips_per_host=3"), "does not divide"),
        (("start", *NAME, *SLICE, *RUN, "--slices=0"), "--slices is '0'"),
        (("start", *NAME, *SLICE, RUN[0], "--workdir=runs/a"), "lost with the pod"),
        (("start", *NAME, *SLICE, *RUN, "--env=1"), "write --env=KEY=VALUE"),
    ],
)
def test_wrong_arguments(stubs: Stubs, args: tuple[str, ...], message: str) -> None:
    result = stubs.run("gke.sh", *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert stubs.calls() == []
