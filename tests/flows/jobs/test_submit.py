from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.jobs import source, start
from flows.jobs.code import Code
from pipeline.errors import UserError
from tests.flows.jobs.fake_server import FakeJobServer

ROOT = Path(__file__).parents[3]
QUICKSTART = (ROOT / "flows" / "configs" / "quickstart.yaml").read_text()
SECRET = "do-not-show-9c1f"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment that lists a variable, which the caller has set."""
    monkeypatch.setenv("PROBE_TOKEN", SECRET)
    file = tmp_path / "tiny.yaml"
    file.write_text(QUICKSTART.replace("runtime:\n", "runtime:\n  env: [PROBE_TOKEN]\n"))
    return file


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def submit(config: Path, server: FakeJobServer, *more: str) -> int:
    return run("submit", str(config), "--address", server.address, "--workspace", "/mnt/ws", *more)


def test_submit__sends_source_and_variables_and_no_value_in_the_open(
    config: Path, server: FakeJobServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.status = "SUCCEEDED"
    assert (
        submit(config, server, "--set", "train.steps=77", "--env", "OTHER=a=b", "--tracking-uri", "http://u:pw@x") == 0
    )
    [(job, sent)] = server.jobs.items()
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}-[0-9a-f]{4}", job)
    assert sent["entrypoint"] == "python segvit_job.py run experiment.yaml --workspace /mnt/ws --set train.steps=77"
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "15"}
    assert sent["runtime_env"]["worker_process_setup_hook"] == "segvit_job.load_environment"
    files = server.sent_files()
    assert files["experiment.yaml"] == config.read_bytes()
    assert files["segvit_job.py"] == Path(start.__file__).read_bytes()
    given = {"PROBE_TOKEN": SECRET, "OTHER": "a=b", "MLFLOW_TRACKING_URI": "http://u:pw@x"}
    assert json.loads(files["segvit_job.json"]) == {"version": None, "environment": given}
    # All of the three packages as they lie here, and nothing else.
    rest = {name: content for name, content in files.items() if "/" in name}
    assert {name.partition("/")[0] for name in rest} == {"segvit", "pipeline", "flows"}
    assert all(content == (ROOT / name).read_bytes() for name, content in rest.items())
    assert {"segvit/model.py", "flows/configs/quickstart.yaml", "pipeline/datasets/ade20k.json"} <= rest.keys()
    assert not any("__pycache__" in name or "/." in name for name in rest)
    printed = capfd.readouterr()
    assert f"job {job} submitted to {server.address}: source " in printed.out
    shown = printed.out + printed.err + json.dumps(sent)
    assert not any(value in shown for value in (SECRET, "a=b", "pw@"))


def test_submit__what_is_wrong_here_is_told_before_the_cluster_is_asked(
    config: Path, server: FakeJobServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.requests.clear()
    for arguments, message in (
        (["--set", "train.stepz=7"], "train.stepz: unknown key; remove it or correct its spelling"),
        (["--set", "model.image_size=[112,110]"], "image_size 110 is not a multiple of"),
        (
            ["--set", "train.batch_size=${PROBE_SIZE}"],
            "the cluster fills in PROBE_SIZE, which goes for text only; send",
        ),
        (["--env", "PROBE_SIZE=0", "--set", "train.batch_size=${PROBE_SIZE}"], "'0': Input should be greater than 0"),
        (["--env", "NOT_SET_HERE"], "--env NOT_SET_HERE is not set here; export it, or give NOT_SET_HERE=VALUE"),
        (["--env", "RAY_ADDRESS=x"], "--env RAY_ADDRESS cannot be sent: the cluster's own value counts there"),
        (["--env", "a b"], "--env 'a b' is no variable's name; give NAME or NAME=VALUE"),
        (["--set", "runtime.env=[NOT_SET_HERE]"], "runtime.env NOT_SET_HERE is not set here"),
        (["--set", "model.weights=w.safetensors"], "model.weights w.safetensors is relative, but a job runs elsewhere"),
        (["--set", "model.start_from=./old"], "model.start_from ./old is relative"),
        (["--set", "data.dataset=camvid", "--set", "data.root=camvid"], "data.root camvid is relative"),
        (["--env", "SEGVIT_WEIGHTS=w.safetensors"], "SEGVIT_WEIGHTS w.safetensors is relative"),
        (["--image", "img:1", "--code", "source"], "--code source does not go with --image"),
    ):
        assert submit(config, server, *arguments) == 1
        assert message in capfd.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    ("has_autoscaler", "setting", "message"),
    [
        (False, "runtime.use_gpu=true", "runtime.use_gpu is true, and the cluster has no GPU; set it to false, or add"),
        (
            False,
            "runtime.num_workers=2",
            "runtime.num_workers 2 x runtime.cpus_per_worker 2 do not fit the cluster, whose 3 CPUs and 0 GPUs on "
            "2 nodes have room for 1; lower one of them, or add nodes",
        ),
        (
            True,
            "runtime.use_gpu=true",
            "note: runtime.use_gpu is true, and the cluster has no GPU as it is now; the job asks",
        ),
    ],
)
def test_submit__what_never_fits_the_cluster_is_not_sent(
    config: Path,
    server: FakeJobServer,
    capfd: pytest.CaptureFixture[str],
    has_autoscaler: bool,
    setting: str,
    message: str,
) -> None:
    server.has_autoscaler, server.status = has_autoscaler, "SUCCEEDED"
    assert submit(config, server, "--set", setting) == (0 if has_autoscaler else 1)
    printed = capfd.readouterr()
    assert message in (printed.out if has_autoscaler else printed.err)
    assert len(server.jobs) == len(server.packages) == int(has_autoscaler)


def test_submit__a_lost_answer_submits_once(config: Path, server: FakeJobServer) -> None:
    server.status, server.loses_answers = "SUCCEEDED", 1
    assert submit(config, server) == 0
    assert len(server.jobs) == 1


def test_submit__ctrl_c_leaves_the_job_and_says_how_to_go_on(config: Path, server: FakeJobServer) -> None:
    server.log = "first line\n"
    command = [sys.executable, "-m", "flows.cli", "submit", str(config), "--address", server.address]
    child = subprocess.Popen(
        [*command, "--workspace", "/mnt/ws"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests may be deaf to it, as what a shell starts in the background is.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    while child.stdout.readline() != "first line\n":
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    [job] = server.jobs
    assert child.returncode == 130
    assert server.status == "RUNNING"
    assert said.strip() == (
        f"interrupted; job {job} goes on\n"
        f"  follow it: segvit logs {job} --address {server.address} --follow\n"
        f"  stop it:   segvit cancel {job} --address {server.address}"
    )


def test_submit__no_wait_and_the_commands_that_go_on(
    config: Path, server: FakeJobServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # a cluster, and no job server
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    assert run("submit", str(config), "--workspace", "s3://bucket/ws", "--no-wait") == 0
    [job] = server.jobs
    assert f"segvit logs {job} --address {server.address} --follow" in capfd.readouterr().out
    assert run("jobs", "--json") == 0
    [listed] = json.loads(capfd.readouterr().out)
    assert listed["code"].startswith("source ")
    assert {name: listed[name] for name in ("job", "state", "flow", "workspace", "started")} == {
        "job": job,
        "state": "running",
        "flow": "quickstart",
        "workspace": "s3://bucket/ws",
        "started": "2023-11-14T22:13:20+00:00",
    }
    assert run("cancel", job, "--address", server.address, "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"job": job, "state": "stopped"}
    server.status, server.message = "FAILED", "exit code 1, last logs:\nTraceback\nerror: no data at /d\n"
    assert run("jobs") == 0
    assert "no data at /d" in capfd.readouterr().out
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert run("jobs") == 1
    assert "no job server is named; give --address" in capfd.readouterr().err


def test_submit__image_carries_the_experiment_and_asks_for_the_release(
    config: Path,
    server: FakeJobServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.jobs.submit.release", lambda: "9.8.7")
    server.status = "SUCCEEDED"
    assert submit(config, server, "--image", "registry.example/segvit:9.8.7") == 0
    assert "with --image the values of PROBE_TOKEN are readable" in capfd.readouterr().out
    [sent] = server.jobs.values()
    environment = sent["runtime_env"].pop("env_vars")
    assert sent["runtime_env"] == {"image_uri": "registry.example/segvit:9.8.7"}
    assert server.packages == {}
    assert environment["PROBE_TOKEN"] == SECRET
    assert sent["entrypoint"] == "python -m flows.jobs.start run experiment.yaml --workspace /mnt/ws"

    # The job's side: another release is refused, the same one runs the experiment.
    monkeypatch.setenv(start.JOB_VARIABLE, environment[start.JOB_VARIABLE])
    monkeypatch.chdir(tmp_path)
    ran: list[tuple[list[str], bytes]] = []
    monkeypatch.setattr("flows.cli.main", lambda given: ran.append((given, Path("experiment.yaml").read_bytes())))
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "9.8.6")
    with pytest.raises(SystemExit) as ended:
        start.main(["run", "experiment.yaml"])
    assert ended.value.code == 1
    assert "error: the cluster has segvit-pipeline 9.8.6 installed and this job was submitted by 9.8.7; install" in (
        capfd.readouterr().err
    )
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "9.8.7")
    start.main(["run", "experiment.yaml"])
    assert ran == [(["run", "experiment.yaml"], config.read_bytes())]


def test_submit__installed_code_travels_as_its_release(
    config: Path, server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "release", lambda: "9.8.7")
    server.status = "SUCCEEDED"
    assert submit(config, server, "--code", "installed") == 0
    files = server.sent_files()
    assert files.keys() == {"experiment.yaml", "segvit_job.py", "segvit_job.json"}
    assert json.loads(files["segvit_job.json"])["version"] == "9.8.7"


def test_source__a_plugin_beside_the_checkout_travels_with_its_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugin"
    for name in ("stairs", "stairs.egg-info", "stairs/__pycache__"):
        (package / name).mkdir(parents=True)
    (package / "stairs" / "__init__.py").write_text("def stair(done: float) -> float:\n    return 1 - done\n")
    (package / "stairs" / "__pycache__" / "x.pyc").write_text("")
    (package / "stairs.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: my-stairs\nVersion: 1.2\n")
    (package / "stairs.egg-info" / "entry_points.txt").write_text("[segvit.schedules]\nstairs = stairs:stair\n")
    monkeypatch.syspath_prepend(str(package))
    found = source.find_source(Code.AUTO)
    assert found.packages == ("segvit-pipeline", "my-stairs")
    folder = tmp_path / "folder"
    folder.mkdir()
    source.write_folder(folder, found, b"name: x\n", {})
    assert (folder / "stairs" / "__init__.py").read_bytes() == (package / "stairs" / "__init__.py").read_bytes()
    assert "stairs = stairs:stair" in (folder / "my_stairs-1.2.dist-info" / "entry_points.txt").read_text()
    assert "Name: my-stairs" in (folder / "my_stairs-1.2.dist-info" / "METADATA").read_text()
    assert not list(folder.rglob("__pycache__"))
    assert stat.S_IMODE((folder / "segvit_job.json").stat().st_mode) == 0o600
    (package / "stairs" / "fast.so").write_text("")
    found = source.find_source(Code.AUTO)
    assert (found.packages, found.left_out) == (("segvit-pipeline",), ("my-stairs",))


def test_source__of_an_installed_client_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "segvit"
    installed.mkdir(parents=True)
    (installed / "model.py").write_text("")
    monkeypatch.setattr(source, "PACKAGES", (installed,))
    monkeypatch.setattr(source, "release", lambda: "9.8.7")
    assert source.find_source(Code.AUTO) == source.Source({}, {}, (), "", "9.8.7")
    sent = source.find_source(Code.SOURCE)
    assert (list(sent.files), sent.version) == (["segvit/model.py"], None)


def test_source__a_data_set_among_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_SOURCE_BYTES", 1 << 10)
    with pytest.raises(UserError, match=r"more than 0 MiB travel with a job; move out .* \(0 MiB\)"):
        source.find_source(Code.SOURCE)


def test_start__workers_take_the_variables_from_the_jobs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(start.JOB_VARIABLE, raising=False)
    job_file = tmp_path / "segvit_job.json"
    job_file.write_text(json.dumps({"version": None, "environment": {"PROBE_TOKEN": SECRET}}))
    job_file.chmod(0o644)
    monkeypatch.setattr(start, "__file__", str(tmp_path / "segvit_job.py"))
    monkeypatch.setenv("PROBE_TOKEN", "another")
    start.load_environment()
    assert os.environ["PROBE_TOKEN"] == SECRET
    assert stat.S_IMODE(job_file.stat().st_mode) == 0o600
