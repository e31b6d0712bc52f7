"""The Dockerfile: read where no engine runs, built where one does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from flows.cluster.pods import USER_ID

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "flows" / "cluster" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


class Instruction(NamedTuple):
    """An instruction's word, and all else of it on one line."""

    word: str
    rest: str


def instructions() -> list[Instruction]:
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def stages() -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for one in instructions():
        if one.word == "FROM":
            found.append([])
        if found:
            found[-1].append(one)
    return found


def programs() -> str:
    """Where the linter lies: beside this Python, or anywhere else."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_dockerfile__linter_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=programs())
    assert linter, "hadolint is a development dependency"
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile__python_is_that_of_the_other_clusters() -> None:
    [(_, image)] = [one for one in instructions() if one.word == "ARG"]
    version = re.fullmatch(r"PYTHON_IMAGE=python:(3\.11\.\d+)-slim-bookworm", image)
    assert version is not None
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert any(f"--python {version[1]} ~/venv" in line for line in cluster["setup_commands"])
    assert [stage[0].rest for stage in stages()] == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]


def test_dockerfile__copies_the_software_and_nothing_else() -> None:
    build, final = stages()
    copied = [source for one in build if one.word == "COPY" for source in one.rest.split()[:-1]]
    assert copied == ["pyproject.toml", "constraints.txt", "README.md", "LICENSE", "segvit", "pipeline", "flows"]
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)
    assert [one.rest for one in final if one.word == "COPY"] == [
        "--from=build /requirements /usr/local",
        "--from=build /project /usr/local",
    ]
    # Nothing comes from elsewhere but Python packages, by name.
    assert "ADD" not in {one.word for one in instructions()}
    assert "://" not in TEXT


def test_dockerfile__every_installation_is_pinned() -> None:
    installed = [
        command.strip()
        for one in instructions()
        if one.word == "RUN"
        for command in one.rest.split("&&")
        if "pip install" in command
    ]
    first, requirements, project = installed
    assert re.fullmatch(r"pip install --no-cache-dir uv==\d+\.\d+\.\d+", first)
    assert "--constraint constraints.txt" in requirements
    assert "--requirement pyproject.toml" in requirements
    extras = set(re.findall(r"--extra (\w+)", requirements))
    assert extras == {"export", "s3"}
    assert "--no-deps --build-constraint constraints.txt ." in project
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^setuptools==", pins, flags=re.M)
    uv = first.rsplit(maxsplit=1)[-1]
    assert f" {uv})" in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_dockerfile__runs_as_the_user_of_the_manifests() -> None:
    _, final = stages()
    words = [one.word for one in final]
    assert [one.rest for one in final if one.word == "USER"] == [f"{USER_ID}:{USER_ID}"]
    # What follows may write nothing as root.
    assert set(words[words.index("USER") + 1 :]) <= {"WORKDIR", "CMD", "ENV"}
    made = next(one.rest for one in final if "useradd" in one.rest)
    assert f"--uid {USER_ID}" in made
    assert f"--gid {USER_ID}" in made


def test_dockerignore__lets_only_sources_through() -> None:
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {line.removeprefix("!") for line in rules if line.startswith("!")}
    build, _ = stages()
    assert admitted == {source for one in build if one.word == "COPY" for source in one.rest.split()[:-1]}
    assert {"**/*.safetensors", "**/*.pth", "**/__pycache__"} <= set(rules)


def engine() -> bool:
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0


@pytest.mark.timeout(3600)  # PyTorch with CUDA is gigabytes
def test_dockerfile__image_runs_as_it_will_in_a_cluster() -> None:
    if not engine():
        pytest.skip("no container engine answers to docker info")
    tag = "segvit-test:dockerfile"
    subprocess.run(
        ["docker", "build", "--quiet", "--file", str(DOCKERFILE), "--tag", tag, str(ROOT)], check=True, timeout=3000
    )
    try:
        locked = ("--rm", "--read-only", "--network=none", "--cap-drop=ALL", "--tmpfs=/tmp", "--tmpfs=/home/segvit")
        # As an operator starts it: by a login shell, which has a PATH of its own.
        script = (
            "id -u && segvit cluster render --help > /dev/null && ray --version && mlflow --version && wget --version"
        )
        command = ["docker", "run", *locked, tag, "bash", "-lc", script]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    finally:
        subprocess.run(["docker", "image", "rm", "--force", tag], capture_output=True, timeout=60)
    pins = dict(re.findall(r"^(ray|mlflow)==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M))
    assert said[:3] == [str(USER_ID), f"ray, version {pins['ray']}", f"mlflow, version {pins['mlflow']}"]
