"""The files of cluster/: Ray's schema takes them, versions agree, nothing in them is secret, nothing is open."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import commands, parse_as_script
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from scaling.distributed import cluster
from scaling.distributed.cluster import usable_cpus

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and not path.name.startswith("mine"))
LAUNCHED = ("config.yaml", "gcp.yaml", "local.yaml")  # by `ray up`
CLOUDS = ("config.yaml", "gcp.yaml")
README = (CLUSTER / "README.md").read_text()

# What a user fills in, in a copy.
PLACEHOLDERS = {
    "config.yaml": {"<AMI_ID>", "<SECURITY_GROUP_ID>"},
    "gcp.yaml": {"<PROJECT_ID>", "<IMAGE>", "<SUBNETWORK>"},
    "local.yaml": {"<HEAD_IP>", "<WORKER_IP>", "<SSH_USER>", "<SSH_KEY>"},
    "rayjob.yaml": {"<BUCKET>", "<MLFLOW_HOST>", "<REGISTRY>"},
    "Dockerfile": {"<REGISTRY>"},
    "bucket.json": {"<BUCKET>"},
    "head.json": {"<ACCOUNT_ID>"},
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def pins() -> dict[str, Requirement]:
    """What nodes install, by the name of the package."""
    lines = [line for line in (CLUSTER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def version_of(requirement: Requirement) -> str:
    [specifier] = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod specifications of a RayJob: `head`, and each worker group by its name."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


# ---------------------------------------------------------------------- Ray's schema


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_the_file(name):
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("change", [{"workers": 3}, {"max_workers": "8"}, {"provider": {"region": "us-west-2"}}])
def test_the_schema_refuses_what_is_wrong(change):
    with pytest.raises(Exception, match=r"workers|'8'|type"):
        validate_config(prepare_config(read("config.yaml") | change))


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_on_spot_with_a_gpu_and_go(name):
    config = read(name)
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu_worker"]
    assert config["head_node_type"] == "head"
    assert worker["min_workers"] == 0 and worker["max_workers"] == config["max_workers"] == 8
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False, "a parked machine's disk costs money"
    if name == "config.yaml":
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in head["node_config"], "a reclaimed head takes the job with it"
    else:
        assert worker["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
        assert worker["resources"]["GPU"] == 1 and "GPU" not in head["resources"]
        assert "scheduling" not in head["node_config"], "a reclaimed head takes the job with it"


# ---------------------------------------------------------------------- versions


def test_nodes_install_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert set(pins()) == set(wanted)
    for name, requirement in pins().items():
        assert wanted[name].specifier.contains(version_of(requirement)), f"{requirement} is not {wanted[name]}"
        assert requirement.extras >= wanted[name].extras
    assert "default" in pins()["ray"].extras, "the dashboard and jobs need it"


def test_one_version_of_ray_everywhere():
    version = version_of(pins()["ray"])
    image = f"rayproject/ray:{version}-py311-cu128"
    assert [read(name)["docker"]["image"] for name in CLOUDS] == [image, image]
    assert f"FROM {image}\n" in (CLUSTER / "Dockerfile").read_text()
    job = read("rayjob.yaml")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert {pod["containers"][0]["image"] for pod in pods(job).values()} == {f"<REGISTRY>/scaling:{version}"}
    assert "-r cluster/requirements.txt" in README, "your machine needs the same version"
    assert importlib.metadata.version("ray") == version, "these tests have tried another version of Ray than nodes get"


# ---------------------------------------------------------------------- secrets and ports


def test_placeholders_are_still_there():
    """Nobody's addresses, accounts and buckets are committed."""
    found = {path.name: set(re.findall(r"<[A-Z_]+>", path.read_text())) for path in FILES if path.suffix != ".md"}
    assert {name: words for name, words in found.items() if words} == PLACEHOLDERS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_key_and_no_token_is_in_a_file(path):
    text = path.read_text()
    secret = r"AKIA[0-9A-Z]{16}|PRIVATE KEY|\b[0-9a-f]{32,}\b|(?i:password|secret_access_key|auth_token)\s*[:=]\s*\w"
    assert not re.search(secret, text)
    assert not re.search(r"\bami-[0-9a-f]+|\bsg-[0-9a-f]+|\barn:aws:iam::\d", text), "somebody's own"


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_token_is_demanded_and_reaches_every_node(name):
    assert read(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    if name == "local.yaml":
        assert "RAY_AUTH_MODE=token" in (CLUSTER / "local_env.sh").read_text()
        assert any("local_env.sh' >>~/.bashrc" in command for command in read(name)["setup_commands"])
    else:
        assert "--env RAY_AUTH_MODE=token" in read(name)["docker"]["run_options"]


def test_no_port_is_open_to_the_world():
    for path in FILES:
        assert "0.0.0.0" not in path.read_text(), path
    for name in LAUNCHED:
        config = read(name)
        [start] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
        assert "--dashboard-host=127.0.0.1" in start
        assert "security_group" not in config["provider"], "Ray would make one that lets everybody knock at ssh"
        assert "bash ~/scaling-setup/mlflow_server.sh" in config["head_start_ray_commands"]
    assert "--host 127.0.0.1" in (CLUSTER / "mlflow_server.sh").read_text()
    types = read("config.yaml")["available_node_types"].values()
    assert all(node["node_config"]["SecurityGroupIds"] == ["<SECURITY_GROUP_ID>"] for node in types)


def test_roles_allow_what_is_needed():
    def allowed(name: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for statement in json.loads((CLUSTER / "iam" / name).read_text())["Statement"]:
            actions = statement["Action"]
            for action in [actions] if isinstance(actions, str) else actions:
                found.setdefault(action, []).append(statement)
        return found

    head, bucket = allowed("head.json"), allowed("bucket.json")
    ec2 = {"ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances"}
    assert set(head) == ec2 | {"iam:PassRole"}
    assert all("Condition" in statement for statement in head["ec2:CreateTags"] + head["ec2:TerminateInstances"])
    [passing] = head["iam:PassRole"]
    assert passing["Resource"] == "arn:aws:iam::<ACCOUNT_ID>:role/scaling-worker"
    own = read("config.yaml")["cluster_name"]
    [ending] = head["ec2:TerminateInstances"]
    assert ending["Condition"]["StringEquals"] == {"ec2:ResourceTag/ray-cluster-name": own}
    assert all(action.startswith("s3:") and "*" not in action for action in bucket)
    assert all("<BUCKET>" in s["Resource"] for statements in bucket.values() for s in statements)


# ---------------------------------------------------------------------- Kubernetes


def test_the_rayjob_is_one():
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True, "GPUs that nobody uses"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    [group] = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 0, 8)


def test_pods_have_a_gpu_each_or_none_and_no_rights():
    for name, pod in pods(read("rayjob.yaml")).items():
        [container] = pod["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], "Ray plans with what a pod surely has"
        assert resources["limits"].get("nvidia.com/gpu") == (None if name == "head" else "1")
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["restartPolicy"] == "Never"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        if name != "head":
            assert pod["automountServiceAccountToken"] is False


def test_the_rayjobs_entrypoint_parses():
    """By bash, as KubeRay pastes it into a script, and then by the two commands' own parsers."""
    entrypoint = read("rayjob.yaml")["spec"]["entrypoint"]
    script = entrypoint.removeprefix("bash -euc '").removesuffix("'")
    assert "'" not in script and subprocess.run(["bash", "-nc", f"if true; then {entrypoint} ; fi"]).returncode == 0
    found = [command for line in script.split(";") for command in commands(line)]
    assert [Path(name).stem for name, _ in found] == ["stage1", "stage2"]
    for name, arguments in found:
        parse_as_script(name, arguments)
    variables = yaml.safe_load(read("rayjob.yaml")["spec"]["runtimeEnvYAML"])["env_vars"]
    assert {"STORE", "RUN"} <= set(variables)


def test_a_stopped_job_has_time_to_drain():
    """Ray kills the driver of a stopped job after RAY_JOB_STOP_WAIT_TIME_S, 3 s unless told otherwise."""
    from scaling.distributed.stage2.dispatcher import DRAIN_SECONDS

    on_kubernetes = yaml.safe_load(read("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    for environment in (read("job.yaml"), on_kubernetes):
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= DRAIN_SECONDS + 10


# ---------------------------------------------------------------------- README and shell

FENCED = [block for _, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)]


def test_the_readmes_commands_parse():
    found = [command for block in FENCED for command in commands(block)]
    assert {"prepare", "stage1", "stage2", "status", "evaluate"} <= {Path(name).stem for name, _ in found}
    for name, arguments in found:
        parse_as_script(name, arguments)


def test_the_readmes_files_exist():
    names = set(re.findall(r"\bcluster/[\w./-]+\.(?:yaml|json|sh|txt|md)\b", README)) - {"cluster/mine.yaml"}
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link}
    missing = [name for name in names if not (ROOT / name).exists()]
    missing += [link for link in links if not (CLUSTER / link.split("#")[0]).exists()]
    assert not missing
    unmentioned = [path.name for path in FILES if path.name not in README and path.name != "README.md"]
    assert not unmentioned


def test_shell_parses():
    scripts = [path.read_text() for path in CLUSTER.glob("*.sh")] + FENCED
    for name in LAUNCHED:
        scripts += [command for key, value in read(name).items() if key.endswith("_commands") for command in value]
    for script in scripts:
        plain = re.sub(r"<[A-Z_]+>", "filled-in", script)
        assert subprocess.run(["bash", "-n"], input=plain, text=True).returncode == 0, script


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8), ({"cpu.max": "200000 100000"}, 2), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_a_jobs_cpus_are_not_the_machines(tmp_path, monkeypatch, files, cpus):
    """64 cores, of which the job may run on 8, or fewer by its quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("address", "noted", "told"),
    [
        ("http://127.0.0.1:8265", None, "that is a dashboard, for `ray job submit`"),
        ("auto", None, "no cluster was started on this machine"),
        ("auto", "127.0.0.1:9", r"answers at auto \(127.0.0.1:9: .*refused"),
        ("ray://127.0.0.1:9", None, "refused"),
    ],
)
def test_an_address_where_no_cluster_answers_is_told_at_once(monkeypatch, address, noted, told):
    """127.0.0.1:9 stands for a cluster of yesterday, whose address Ray still notes."""
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda _: noted)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no Ray cluster .*{told}"):
        cluster._check_reachable(address)
    assert time.monotonic() - start < 6
