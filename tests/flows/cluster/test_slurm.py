"""The batch script, word by word; a real Slurm ran it once, see docs/cluster.md."""

from __future__ import annotations

import re
import subprocess

import pytest

from flows.cli import main
from tests.flows.cluster.rendered import CONFIG


def slurm(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    main(["cluster", "render", "--kind", "slurm", str(CONFIG), *options])
    return capsys.readouterr().out


def test_slurm__script_is_valid_and_asks_for_whole_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    said = slurm(capsys, "--workspace", "/shared/ws", "--nodes", "4", "--gpus-per-worker", "8", "--name", "big")
    subprocess.run(["bash", "-n"], input=said, text=True, check=True, timeout=10)
    lines = said.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads no directive below the first command.
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH {one}" for one in directives]
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0", "--job-name=big"} <= set(
        directives
    )
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(directives)
    without = slurm(capsys, "--workspace", "/shared/ws", "--gpus-per-worker", "0")
    assert "gpus" not in without


def test_slurm__command_reaches_the_shell_word_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    awkward = "train.learning_rate=1.0e-4 # $(echo gone) `echo gone`; 'x"
    said = slurm(capsys, "--workspace", "/shared/my place", "--set", awkward, "--mlflow-uri", "https://m.example.org")
    [line] = [line for line in said.splitlines() if line.startswith("flow=(")]
    shown = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "${{flow[@]}}"'], capture_output=True, text=True, check=True, timeout=10
    )
    assert shown.stdout.splitlines() == [
        *("segvit", "run", str(CONFIG), "--workspace", "/shared/my place"),
        *("--tracking-uri", "https://m.example.org", "--set", awkward),
    ]


def test_slurm__ray_asks_for_the_token_on_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    said = slurm(capsys, "--workspace", "/shared/ws", "--nodes", "2")
    token = said.index("export RAY_AUTH_MODE=token")
    starts = [match.start() for match in re.finditer(r"exec ray start", said)]
    assert len(starts) == 2
    assert token < starts[0]
    assert "RAY_AUTH_TOKEN=" not in said
    assert "0.0.0.0" not in said
