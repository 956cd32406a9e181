"""`ray up cluster/config.yaml`, driven by Ray's own AWS provider against a mock of AWS, up to the machines' launch.

The mock checks and keeps what it is asked for; what a machine does then (Docker, ssh) is not tried here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.autoscaler._private import commands
from ray.autoscaler.tags import NODE_KIND_WORKER, STATUS_UNINITIALIZED, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

boto3 = pytest.importorskip("boto3", reason="pip install -e '.[dev]'")
moto_server = pytest.importorskip("moto.server", reason="pip install -e '.[dev]'")

# Ray leaves the files open that it reads its configuration from and writes the head's to.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*(mine.yaml|ray-bootstrap-):ResourceWarning")

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-west-2"
TOKEN = "a-token-that-only-its-file-holds"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """An empty account, and what cluster/README.md makes in it: a security group and the two roles."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_UP_enable_autoscaler_v2", "1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.chdir(ROOT)  # file_mounts name folders of the repository
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        group = ec2.create_security_group(GroupName="scaling", Description="Ray cluster")["GroupId"]
        trust = (ROOT / "cluster" / "iam" / "trust.json").read_text()
        for name in ("scaling-head", "scaling-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        yield SimpleNamespace(ec2=ec2, home=home, group=group, image=image)
    server.stop()


@pytest.fixture(scope="module")
def launched(account: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The cluster after `ray up`: its head, made by Ray's commands; a worker, made from what they put on the head."""
    text = (ROOT / "cluster" / "config.yaml").read_text()
    text = text.replace("<AMI_ID>", account.image).replace("<SECURITY_GROUP_ID>", account.group)
    config = tmp_path_factory.mktemp("filled") / "mine.yaml"
    config.write_text(text)
    set_up: dict[str, Any] = {}

    class NoSsh:
        """In place of what logs in to a machine and sets it up."""

        exitcode = 0

        def __init__(self, **arguments: Any) -> None:
            set_up.update(arguments)
            set_up["bootstrap"] = json.loads(Path(arguments["file_mounts"]["~/ray_bootstrap_config.yaml"]).read_text())

        def start(self) -> None:
            pass

        join = start

    groups = account.ec2.describe_security_groups()["SecurityGroups"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "NodeUpdaterThread", NoSsh)
        commands.create_or_update_cluster(str(config), None, None, False, False, True, no_config_cache=True)
    bootstrap = set_up["bootstrap"]
    provider = commands._get_node_provider(bootstrap["provider"], bootstrap["cluster_name"])
    worker = bootstrap["available_node_types"]["gpu_worker"]
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED}
    provider.create_node(worker["node_config"], tags, 1)
    pages = account.ec2.describe_instances()["Reservations"]
    machines = {machine["InstanceType"]: machine for page in pages for machine in page["Instances"]}
    return SimpleNamespace(machines=machines, set_up=set_up, bootstrap=bootstrap, provider=provider, groups=groups)


def disk(account: SimpleNamespace, machine: dict[str, Any]) -> dict[str, Any]:
    [mapping] = machine["BlockDeviceMappings"]
    assert mapping["DeviceName"] == machine["RootDeviceName"]
    return account.ec2.describe_volumes(VolumeIds=[mapping["Ebs"]["VolumeId"]])["Volumes"][0]


def test_the_head_is_on_demand_and_the_worker_on_spot(launched):
    assert set(launched.machines) == {"m6i.2xlarge", "g5.xlarge"}
    assert "InstanceLifecycle" not in launched.machines["m6i.2xlarge"]
    assert launched.machines["g5.xlarge"]["InstanceLifecycle"] == "spot"


def test_ray_knows_what_the_types_have(launched):
    """From AWS's own list of types: the head has no GPU, a worker one."""
    types = launched.bootstrap["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 8 and "GPU" not in types["head"]["resources"]
    assert types["gpu_worker"]["resources"]["CPU"] == 4 and types["gpu_worker"]["resources"]["GPU"] == 1


@pytest.mark.parametrize(("kind", "role"), [("m6i.2xlarge", "scaling-head"), ("g5.xlarge", "scaling-worker")])
def test_each_machine_has_its_image_its_role_and_a_disk_that_fits(account, launched, kind, role):
    machine = launched.machines[kind]
    assert machine["ImageId"] == account.image
    assert machine["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{role}")
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    volume = disk(account, machine)
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (200, "gp3", True)


def test_no_port_was_opened(account, launched):
    """Machines are in the given group alone; Ray has made none and changed no rule."""
    for machine in launched.machines.values():
        assert [group["GroupId"] for group in machine["SecurityGroups"]] == [account.group]
    assert account.ec2.describe_security_groups()["SecurityGroups"] == launched.groups
    [own] = [group for group in launched.groups if group["GroupId"] == account.group]
    assert own["IpPermissions"] == []


def test_keys_and_token_go_from_file_to_file(account, launched):
    mounts = launched.set_up["file_mounts"]
    [key] = (account.home / ".ssh").iterdir()
    assert mounts["~/ray_bootstrap_key.pem"] == str(key) and key.stat().st_mode & 0o077 == 0
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["~/scaling-setup"] == "cluster"
    everything = json.dumps([launched.set_up["bootstrap"], launched.set_up["ray_start_commands"], mounts])
    assert TOKEN not in everything and "PRIVATE KEY" not in everything


def test_the_head_starts_ray_with_version_two_of_the_autoscaler(launched):
    start = " ".join(launched.set_up["ray_start_commands"])
    assert "ray start --head" in start and "RAY_enable_autoscaler_v2=1" in start
    assert launched.set_up["docker_config"]["image"].startswith("rayproject/ray:2.60.0-")


def test_down_ends_machines_and_their_disks(account, launched):
    launched.provider.non_terminated_nodes({})
    launched.provider.terminate_nodes([machine["InstanceId"] for machine in launched.machines.values()])
    pages = account.ec2.describe_instances()["Reservations"]
    assert {machine["State"]["Name"] for page in pages for machine in page["Instances"]} == {"terminated"}
