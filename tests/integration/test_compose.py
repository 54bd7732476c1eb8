"""docker-compose.yml and Dockerfile, read as data: what they promise about safety, order and commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from harp_batch.cli.app import app
from tests.support.compose_file import COMPOSE, ROOT, load, words

SETTINGS = {"HARP_UID": "1000", "HARP_GID": "1000"}
COMPOSE_FILE = load(SETTINGS)
SERVICES: dict[str, dict[str, Any]] = COMPOSE_FILE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = DOCKERFILE.split("\nFROM ")

every_service = pytest.mark.parametrize("name", SERVICES)


@every_service
def test_a_service_is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & service.keys()
    assert "docker.sock" not in str(service["volumes"])


@every_service
def test_ports_are_open_to_this_machine_alone(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports), ports


@every_service
def test_secrets_are_files_that_are_declared_and_handed_to_who_uses_them(name: str) -> None:
    service = SERVICES[name]
    used = set(re.findall(r"/run/secrets/(\w+)", str(service)))
    assert used == set(service["secrets"]) <= COMPOSE_FILE["secrets"].keys()
    for variable, value in service["environment"].items():
        if re.search("PASS|TOKEN|SECRET|KEY", variable):
            assert re.fullmatch(r"/run/secrets/\w+", value), f"{variable} is no path of a secret"
        assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{variable} holds a password"


def test_nobody_has_more_secrets_than_his_work_needs() -> None:
    held = {name: set(service["secrets"]) for name, service in SERVICES.items()}
    assert held["ray-worker"] == held["ray-worker-gpu"] == {"ray_token"}
    assert held["query"] == {"reader_pgpass"}
    assert held["migrate"] == {"app_pgpass"}
    assert [name for name, secrets in held.items() if "postgres_password" in secrets] == ["postgres"]


@every_service
def test_what_runs_on_has_a_health_check_and_what_ends_does_not_restart(name: str) -> None:
    service = SERVICES[name]
    runs_on = service.get("restart") == "unless-stopped"
    assert runs_on == ("healthcheck" in service)
    assert runs_on == (name in {"postgres", "ray-head", "ray-worker", "ray-worker-gpu"})


@every_service
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        healthy = how["condition"] == "service_healthy"
        assert healthy or how["condition"] == "service_completed_successfully"
        assert healthy == ("healthcheck" in SERVICES[other])
        assert "profiles" not in SERVICES[other], f"{other} is not started with {name}"


def test_plain_up_starts_the_cluster_and_nothing_that_decodes_by_itself() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert [name for name, found in profiles.items() if not found] == [
        "postgres", "migrate", "ray-head", "ray-worker",
    ]  # fmt: skip
    assert profiles["ray-worker-gpu"] == ["gpu"]
    assert profiles["nightly"] == ["nightly"]
    assert profiles["submit"] == profiles["resume"] == ["submit"]
    assert SERVICES["ray-worker"]["scale"] == "1"


@every_service
def test_jobs_and_data_are_read_only_and_named_volumes_declared(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source, _, mode = volume.partition(":")
        if source.startswith("."):
            assert mode.endswith(":ro"), volume
            assert (ROOT / source).exists(), volume
        else:
            assert source in COMPOSE_FILE["volumes"], volume


@every_service
def test_its_command_is_one_that_parses(name: str) -> None:
    command = [word for word in words(SERVICES[name]) if word != "on-cluster"]
    if name == "postgres":
        assert not command, "the image's own"
        return
    group = {"harp-batch": app, "ray": ray_cli}[command[0]]
    parse(group, command)


@pytest.mark.parametrize("name", ["ray-head", "ray-worker", "ray-worker-gpu"])
def test_its_health_check_is_a_command_that_parses(name: str) -> None:
    _, *test = SERVICES[name]["healthcheck"]["test"]
    command = " ".join(test).rpartition("&& ")[2].split()
    assert command[0] == "ray"
    parse(ray_cli, command)


def parse(group: click.Group, command: list[str], parent: click.Context | None = None) -> None:
    """Read the arguments as the program would, with every option and argument, and do nothing."""
    context = group.make_context(command[0], command[1:], parent=parent)
    rest = [*context._protected_args, *context.args]
    _, found, arguments = group.resolve_command(context, rest)
    assert found is not None
    if isinstance(found, click.Group):
        parse(found, [found.name or "", *arguments], context)
    else:
        found.make_context(found.name, arguments, parent=context)


def test_without_the_secrets_it_says_how_to_make_them() -> None:
    with pytest.raises(KeyError, match=r"HARP_UID is not set - run docker/secrets.sh once"):
        load({})


def test_the_images_users_and_bases() -> None:
    assert re.search(r"^USER 10001:10001$", STAGES[-1], re.MULTILINE)
    bases = re.findall(r"^ARG PYTHON=(.*)$|^FROM (?!\$)(\S+)", DOCKERFILE, re.MULTILINE)
    images = [base for pair in bases for base in pair if base]
    images += [service["image"] for name, service in SERVICES.items() if name == "postgres"]
    assert len(images) == 2
    assert all(re.search(r":\d+\.\d+(\.\d+)?-", image) for image in images), images


def test_a_change_of_the_code_installs_no_dependency_again() -> None:
    """The stage with torch sees nothing but the pins, and the code comes into the last stage after it."""
    dependencies = next(stage for stage in STAGES if "AS dependencies" in stage)
    copied = re.findall(r"^COPY (.*)$", dependencies, re.MULTILINE)
    assert copied == [
        "--from=pins /pins/torch.txt ./",
        "--from=pins /pins/requirements.txt /pins/constraints.txt ./",
    ]
    assert STAGES[-1].index("--from=dependencies") < STAGES[-1].index("from=wheel")


def test_the_images_requirements_are_the_projects() -> None:
    done = subprocess.run(
        [sys.executable, "docker/requirements.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("torch>=") for line in lines)
    assert any(line.startswith("ray[default]") for line in lines)


def test_no_secret_can_get_into_an_image() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[1] == "*"
    assert not [path for path in allowed if path in ("docker", "docker/secrets", ".env", "jobs")]
    needed = set(re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.*) \S+$", DOCKERFILE, re.MULTILINE))
    assert {path for line in needed for path in line.split()} == set(allowed)


def test_secrets_are_random_kept_and_their_owners_alone(tmp_path: Path) -> None:
    first, second = (make_secrets(tmp_path / name) for name in ("one", "two"))
    assert first.keys() == second.keys() == COMPOSE_FILE["secrets"].keys()
    assert all(re.search(r"[0-9a-f]{64}\n$", text) for text in [*first.values(), *second.values()])
    assert not set(first.values()) & set(second.values())
    assert make_secrets(tmp_path / "one") == first, "a second run changed them"
    for declared in COMPOSE_FILE["secrets"].values():
        file = tmp_path / "one" / declared["file"]
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        owner = f"HARP_UID={file.stat().st_uid}\nHARP_GID={file.stat().st_gid}\n"
        assert (tmp_path / "one" / ".env").read_text(encoding="utf-8") == owner
        assert file.stat().st_uid != 0, "containers would run as root"


def make_secrets(folder: Path) -> dict[str, str]:
    """Run docker/secrets.sh in a copy of the project's folders and return what it made."""
    (folder / "docker").mkdir(parents=True, exist_ok=True)
    script = shutil.copy(ROOT / "docker" / "secrets.sh", folder / "docker")
    subprocess.run([script], check=True, stdout=subprocess.DEVNULL)
    return {file.name: file.read_text(encoding="utf-8") for file in (folder / "docker" / "secrets").iterdir()}


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """A client that knows `compose config`; it needs no engine."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.lstrip("v").startswith(("2", "3", "5")):
                return command
    pytest.skip("no client here knows `docker compose`")


def config(compose: list[str], settings: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*compose, "--file", str(COMPOSE), "--env-file", str(settings), *options, "config"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_compose_itself_accepts_the_file_and_reads_it_as_the_tests_do(
    compose: list[str], tmp_path: Path
) -> None:
    settings = tmp_path / "settings"
    settings.write_text("HARP_UID=1000\nHARP_GID=1000\n", encoding="utf-8")
    done = config(compose, settings, "--profile", "*")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services.keys() == SERVICES.keys()
    for name, service in services.items():
        assert [*(service.get("entrypoint") or []), *(service.get("command") or [])] == words(SERVICES[name])
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}
        assert service["user"] == "1000:1000"


def test_compose_itself_says_what_to_run_where_nothing_is_set_up(compose: list[str], tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.touch()
    done = config(compose, settings)
    assert done.returncode != 0
    assert "run docker/secrets.sh once" in done.stderr
