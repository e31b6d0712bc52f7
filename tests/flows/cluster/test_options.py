"""Options of segvit cluster render: mistakes, and the files that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.cli import main
from tests.flows.cluster.rendered import CONFIG, IMAGE, VARIANTS, Render


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "kuberay"], "--kind kuberay needs --image"),
        (["--kind", "kuberay", "--image", "a/b"], "--image a/b: an image needs a tag other than latest"),
        (["--kind", "kuberay", "--image", "a/b:latest"], "an image needs a tag other than latest"),
        (["--kind", "kuberay", "--image", "a b:1"], "--image a b:1: no image reference"),
        (["--kind", "kuberay", "--image", IMAGE, "--name", "Segvit"], "--name Segvit: must be lower-case letters"),
        (["--kind", "kuberay", "--image", IMAGE, "--name", "a" * 41], "40 at most"),
        (["--kind", "kuberay", "--image", IMAGE, "--namespace", "a_b"], "--namespace a_b: must be"),
        (["--kind", "kuberay", "--image", IMAGE, "--cpu-worker-size", "14"], "must be cores and memory, as 14x28Gi"),
        (["--kind", "kuberay", "--image", IMAGE, "--cpu-worker-size", "14x28GB"], "a whole number of Mi, Gi or Ti"),
        (["--kind", "kuberay", "--image", IMAGE, "--gpus-per-worker", "0"], "--gpus-per-worker 0"),
        (
            ["--kind", "kuberay", "--image", IMAGE, "--cpu-workers", "0", "--gpu-workers", "0"],
            "both 0, and the head runs no tasks",
        ),
        (["--kind", "kuberay", "--image", IMAGE, "--gpu-selector", "l4"], "--gpu-selector l4 must be a node's label"),
        (
            ["--kind", "kuberay", "--image", IMAGE, "--claim", "a", "--storage-size", "1Gi"],
            "--claim names a volume claim",
        ),
        (["--kind", "kuberay", "--image", IMAGE, "--redis", "redis://h:6379"], "must be HOST:PORT"),
        (["--kind", "kuberay", "--image", IMAGE, "--redis", "h:70000"], "must be HOST:PORT"),
        (["--kind", "kuberay", "--image", IMAGE, "--nodes", "2"], "--nodes means nothing to --kind kuberay"),
        (["--kind", "kuberay", "--image", IMAGE, str(CONFIG)], "segvit submit, or render --kind rayjob"),
        (["--kind", "rayjob", "--image", IMAGE], "--kind rayjob runs an experiment; name its file"),
        (["--kind", "rayjob", "--image", IMAGE, "--redis", "h:1", str(CONFIG)], "leave it out"),
        (["--kind", "rayjob", "--image", IMAGE, "--workspace", "/tmp/x", str(CONFIG)], "must be below /mnt/segvit"),
        (["--kind", "rayjob", "--image", IMAGE, "--workspace", "/mnt/segvit/../x", str(CONFIG)], "--workspace"),
        (["--kind", "rayjob", "--image", IMAGE, str(CONFIG), "--set", "train.stepz=1"], "train.stepz: unknown key"),
        (["--kind", "slurm", str(CONFIG)], "--kind slurm needs --workspace"),
        (["--kind", "slurm", str(CONFIG), "--workspace", "ws"], "must be an absolute path"),
        (
            ["--kind", "slurm", str(CONFIG), "--workspace", "/ws", "--image", IMAGE],
            "--image means nothing to --kind slurm",
        ),
        (["--kind", "slurm", "none.yaml", "--workspace", "/ws"], "config none.yaml cannot be read"),
    ],
)
def test_render__mistakes_give_one_message(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "render", *options])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err


def test_render__a_password_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    address = ("--mlflow-uri", "https://me:hunter2@m.example.org")
    with pytest.raises(SystemExit):
        main(["cluster", "render", *VARIANTS["kuberay"], *address])
    said = capsys.readouterr().err
    assert "--mlflow-uri holds credentials" in said
    assert "hunter2" not in said


def test_out__a_file_for_each_thing_and_none_is_replaced_unasked(
    tmp_path: Path, render: Render, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cluster", "render", *VARIANTS["rayjob"], "--out", str(tmp_path / "job")]
    main(command)
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["storage.yaml", "network.yaml", "mlflow.yaml", "rayjob.yaml"]
    assert {file.name for file in (tmp_path / "job").iterdir()} == set(names)
    written = [one for name in names for one in yaml.safe_load_all((tmp_path / "job" / name).read_text())]
    assert written == render(*VARIANTS["rayjob"])
    (tmp_path / "job" / "mlflow.yaml").unlink()
    with pytest.raises(SystemExit):
        main(command)
    assert "rayjob.yaml exist; give another --out, or --overwrite to replace" in capsys.readouterr().err
    assert not (tmp_path / "job" / "mlflow.yaml").exists()
    main([*command, "--overwrite"])
    assert (tmp_path / "job" / "mlflow.yaml").exists()
