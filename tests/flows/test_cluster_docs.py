"""docs/cluster.md: its shell parses, its commands and options are there, what it renders is what it applies."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from flows.cli import app, main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, flags=re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
OPTION = re.compile(r"--[a-z][-a-z]*")


def commands() -> dict[str, set[str]]:
    """Every command of ours, `cluster render` among them, with its options."""
    found = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, group in list(found.items()):
        found |= {f"{name} {inner}": command for inner, command in getattr(group, "commands", {}).items()}
    return {name: {option for one in command.params for option in one.opts} for name, command in found.items()}


def ours(line: str) -> list[str]:
    """The words after `segvit` where that is what the line runs."""
    words = shlex.split(line)
    return words[1:] if words and words[0] == "segvit" else []


def ray_options(command: str) -> set[str]:
    import ray.scripts.scripts as scripts

    found = scripts.cli.commands[command]
    return {option for one in found.params for option in (*one.opts, *one.secondary_opts)}


def test_page__every_block_is_shell() -> None:
    assert len(BLOCKS) > 10
    assert TEXT.count("```") == 2 * len(BLOCKS)
    for block in BLOCKS:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)


def test_page__our_commands_have_these_options() -> None:
    there = commands()
    run = [ours(line) for line in LINES if ours(line)]
    assert {words[0] for words in run} == {"submit", "cluster"}
    for words in run:
        name = " ".join(words[:2]) if words[0] == "cluster" else words[0]
        assert {word for word in words if OPTION.fullmatch(word)} <= there[name], words
    # Those in the prose and the table are of the renderer, but for what is said of other programs.
    prose = re.sub(r"^```bash\n.*?^```$", "", TEXT, flags=re.M | re.S)
    spoken = {option for span in re.findall(r"`([^`]+)`", prose) for option in OPTION.findall(span)}
    assert spoken - there["cluster render"] <= {"--address", "--help"}


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # in Ray Serve
def test_page__rays_commands_have_these_options() -> None:
    seen = set()
    for line in LINES:
        for command, rest in re.findall(r"\bray ([a-z-]+)\b([^|&;]*)", line):
            seen.add(command)
            written = {word.split("=")[0] for word in rest.split() if word.startswith("--")}
            assert written <= ray_options(command), line
    assert seen == {"get-auth-token", "up", "rsync-up", "dashboard", "down", "start"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("segvit cluster render ")])
def test_page__rendered_files_are_those_that_it_applies(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    monkeypatch.chdir(tmp_path)
    main(ours(line))
    written = capsys.readouterr().out.split()
    named = set(re.findall(r"--filename (\S+)|sbatch .*?(\S+\.sbatch)", TEXT))
    places = {file or script for file, script in named}
    used = [place for place in places if Path(place).exists()]
    assert used
    assert all(Path(file).exists() for file in written)
    if "kuberay" in line:
        assert sorted(used) == ["cluster", "cluster/raycluster.yaml"]
        _, cluster = yaml.safe_load_all(Path("cluster/raycluster.yaml").read_text())
        # The operator's service, the secret and the tracking server, as the page calls them.
        assert f"service/{cluster['metadata']['name']}-head-svc 8265:8265" in TEXT
        assert f"generic {cluster['spec']['authOptions']['secretName']} --from-file=auth_token=" in TEXT
        _, _, service = yaml.safe_load_all(Path("cluster/mlflow.yaml").read_text())
        assert f"service/{service['metadata']['name']} 5000:5000" in TEXT
        assert f"--namespace {cluster['metadata']['namespace']} " in TEXT
    elif "rayjob" in line:
        assert used == ["job/rayjob.yaml"]
        kinds = {one["kind"]: one for one in yaml.safe_load_all(Path("job/rayjob.yaml").read_text())}
        # Only this file is applied; it must not bring, and with it take away, what others share.
        assert kinds.keys() == {"ConfigMap", "PodDisruptionBudget", "RayJob"}
        assert f"rayjob {kinds['RayJob']['metadata']['name']} " in TEXT
    else:
        assert used == ["segvit.sbatch"]


def test_page__no_secret_and_no_open_address() -> None:
    assert not re.search(r"(?i)(password|token)=['\"]?[a-z0-9]{4,}", TEXT)
    assert "0.0.0.0" not in TEXT
    starts = [line for line in LINES if "ray start --head" in line]
    assert len(starts) == 2
    assert all("--dashboard-host=10.0.0.1" in line and "--node-ip-address=10.0.0.1" in line for line in starts)
