from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

import segvit
from flows.cli import app, main
from flows.present.results import facts, print_results
from flows.present.runs import BAR_WIDTH, bar
from pipeline.config import DataConfig, DigitsConfig
from pipeline.records import Evaluation
from pipeline.reports.data_summary import summarize_shard_set
from pipeline.shards.prepare import prepare_shards

CONFIG = str(Path(__file__).parents[2] / "flows" / "configs" / "quickstart.yaml")

FROZEN_OPTIONS = {
    "check": {"source", "--samples", "--out", "--overwrite", "--json"},
    "init": {"source", "--out", "--backbone", "--overwrite"},
    "run": {"config", "--set", "--workspace", "--tracking-uri", "--json"},
    "plan": {"config", "--set", "--workspace", "--tracking-uri", "--gpu", "--json"},
    "runs": {"--workspace", "--tracking-uri", "--json"},
    "cancel": {"run_id", "--workspace", "--tracking-uri", "--json", "--address"},
    "show": {"run_id", "--follow", "--workspace", "--tracking-uri", "--json"},
    "logs": {"run_id", "--step", "--follow", "--workspace", "--tracking-uri", "--address"},
    "clean": {
        *("--keep-runs", "--older-than", "--max-size", "--versions", "--keep-champions", "--yes"),
        *("--workspace", "--tracking-uri", "--json"),
    },
    "search": {"run_id", "--out", "--overwrite", "--workspace", "--tracking-uri", "--json"},
    "evaluate": {
        *("model", "data", "--split", "--resize", "--scales", "--flip", "--window", "--stride", "--variant", "--set"),
        *("--precision", "--workspace", "--tracking-uri", "--json"),
    },
    "register": {"model", "--name", "--evaluation", "--workspace", "--tracking-uri", "--json"},
    "models": {"name", "--workspace", "--tracking-uri", "--json"},
    "promote": {"name", "version", "--policy", "--dry-run", "--workspace", "--tracking-uri", "--json"},
    "rollback": {"name", "--dry-run", "--workspace", "--tracking-uri", "--json"},
    "compare": {"name", "first", "second", "--out", "--overwrite", "--workspace", "--tracking-uri", "--json"},
    "predict": {
        *("model", "sources", "--out", "--no-overlays", "--batch-size", "--coco", "--areas", "--overwrite"),
        *("--skip-existing", "--precision", "--workspace", "--tracking-uri", "--json"),
    },
    "export": {
        *("model", "--format", "--out", "--image-size", "--overwrite", "--workspace", "--tracking-uri", "--json"),
    },
    "serve": {"model", "--port", "--host", "--workspace", "--tracking-uri"},
    "data": {"shard_set", "--out", "--overwrite", "--json"},
    "flops": {"presets", "--published", "--size", "--json"},
    "submit": {
        *("config", "--address", "--workspace", "--set", "--tracking-uri", "--env", "--code", "--image", "--no-wait"),
    },
    "jobs": {"--address", "--json"},
    "cluster render": {
        *("config", "--kind", "--out", "--overwrite", "--set", "--workspace", "--image", "--name", "--namespace"),
        *("--operator-namespace", "--cpu-workers", "--cpu-worker-size", "--gpu-workers", "--gpu-worker-size"),
        *("--gpus-per-worker", "--gpu-selector", "--nodes", "--spot", "--storage-class", "--storage-size", "--claim"),
        *("--mlflow-uri", "--redis"),
    },
}


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_options__are_frozen() -> None:
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, group in list(commands.items()):
        if hasattr(group, "commands"):
            del commands[name]
            commands |= {f"{name} {inner}": command for inner, command in group.commands.items()}
    found = {
        name: {
            option
            for parameter in command.params
            for option in (parameter.opts if parameter.opts[0].startswith("--") else [parameter.name])
            if option != "--help"
        }
        for name, command in commands.items()
    }
    assert found == FROZEN_OPTIONS


def test_plan__names_every_step_and_executes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("plan", CONFIG, "--workspace", str(tmp_path / "ws"), "--json") == 0
    steps = json.loads(capfd.readouterr().out)
    assert [step["label"] for step in steps] == [
        "prepare",
        "fetch_backbone",
        "tune",
        "train/full",
        "evaluate/full",
        "train/shrunk",
        "evaluate/shrunk",
        "register/full",
        "register/shrunk",
        "rescore/champion",
        "promote",
        "report",
    ]
    assert not any(step["cached"] for step in steps)
    assert not (tmp_path / "ws").exists()


def test_plan__tells_what_training_takes_of_a_card(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    large = ["--set", "model.backbone=vit_large_patch14_dinov2", "--set", "model.weights=random"]
    large += ["--set", "train.freeze_blocks=0"]
    arguments = ["plan", CONFIG, *large, "--workspace", str(tmp_path / "ws"), "--gpu", "l4"]
    assert run(*arguments, "--set", "train.batch_size=1024", "--set", "train.precision=bf16") == 0
    shown = capfd.readouterr().out
    assert "Training step on each GPU, L4 (24 GB)" in shown
    assert "does not fit; it fits (" in shown
    assert "--set train.activation_checkpointing=true" in shown
    assert run(*arguments, "--set", "variants.shrunk.train.steps=0", "--json") == 0
    steps = {step["label"]: step for step in json.loads(capfd.readouterr().out)}
    estimate = steps["train/full"]["estimate"]
    assert (estimate["variant"], estimate["gpu"]) == ("full", "L4")
    assert estimate["weights"] == pytest.approx(489e6, rel=0.01)  # nine of its blocks
    # It has no step of training.
    assert "estimate" not in steps["train/shrunk"]
    assert "estimate" not in steps["prepare"]


def test_plan__starts_are_known_by_their_content(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from flows.experiment import load_experiment

    settings = load_experiment(Path(CONFIG)).config.variant_settings("full").model
    model = segvit.build_model(segvit.ModelConfig.from_dict(settings), 3)
    segvit.save_checkpoint(tmp_path / "champion", model, {"class_names": ["a", "b", "c"]})

    def planned() -> tuple[list[str], str]:
        start = ("--set", f"model.start_from={tmp_path}/champion")
        assert run("plan", CONFIG, *start, "--workspace", str(tmp_path / "ws"), "--json") == 0
        steps = {step["label"]: step for step in json.loads(capfd.readouterr().out)}
        [label] = [name for name in steps if name.startswith("import_checkpoint/champion-")]
        assert steps["train/full"]["depends_on"][-1] == label
        assert steps["train/shrunk"]["depends_on"][-1] == "train/full"
        return list(steps), steps[label]["fingerprint"]

    first = planned()
    assert planned() == first
    segvit.save_checkpoint(tmp_path / "champion", model, {"class_names": ["a", "b", "z"]})
    assert planned()[1] != first[1]


def test_plan__every_variant_is_scored_by_further_ways_of_predicting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    further = ("--set", "evaluate.also.flipped.flip=true")
    assert run("plan", CONFIG, *further, "--workspace", str(tmp_path / "ws"), "--json") == 0
    steps = {step["label"]: step["depends_on"] for step in json.loads(capfd.readouterr().out)}
    for variant in ("full", "shrunk"):
        assert steps[f"evaluate/{variant}/flipped"] == steps[f"evaluate/{variant}"] == [f"train/{variant}", "prepare"]
        # What is registered has the scores by which the gate decides.
        assert f"evaluate/{variant}/flipped" not in steps[f"register/{variant}"]


def test_results__further_ways_of_predicting_stand_by_themselves() -> None:
    from rich.console import Console

    own = Evaluation(
        variant="full",
        checkpoint_digest="c",
        data_digest="d",
        split="val",
        num_images=2,
        miou=0.5,
        macc=0.6,
        aacc=0.7,
        boundary_iou=None,
        class_names=("a",),
        per_class_iou=(0.5,),
        per_class_accuracy=(0.6,),
        gflops=1.0,
        parameters=2,
        latency_ms=3.0,
        cost_size=(32, 32),
        uri="x",
    )
    other = own.model_copy(update={"miou": 0.55, "inference": {"scales": [0.5, 1.0], "flip": True}})
    records = {"evaluate/full": own, "evaluate/full/multi_scale": other}
    found = facts(records)
    assert found["evaluations"]["full"]["miou"] == 0.5
    assert found["also_evaluated"]["full/multi_scale"]["miou"] == 0.55
    console = Console(record=True, width=120)
    print_results(console, records)
    said = console.export_text()
    assert "also      full/multi_scale: mIoU 0.5500, scales 0.5, 1.0, with flip" in said
    assert said.count("0.5000") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "error: config none.yaml cannot be read"),
        (["run", CONFIG, "--set", "train.stepz=1"], "train.stepz: unknown key"),
        (
            ["run", CONFIG, "--set", "model.image_size=[112,110]"],
            "image_size 110 is not a multiple of",
        ),
        (
            ["run", CONFIG, "--set", "model.crop=[112,110]"],
            "model.crop is the former name of model.image_size, and both are given",
        ),
        (["plan", CONFIG, "--set", "data.dataset=cats"], "unknown dataset 'cats'; choose from "),
        (
            ["plan", CONFIG, "--set", "data.dataset=camvid", "--set", "data.root=/none"],
            "/none",
        ),
        (["plan", CONFIG, "--set", "model.weights=/none.safetensors"], "no weights file at /none.safetensors"),
        (["plan", CONFIG, "--gpu", "h1000"], "--gpu: unknown GPU 'h1000'; did you mean H100?; choose from T4, "),
        (["predict", "models:/none@champion", "x.png", "--out", "out"], "unknown model 'none'"),
        (["predict", "/none", "x.png", "--out", "out"], "/none is no checkpoint folder"),
        (["promote", "none", "1"], "error: unknown model 'none'; none is registered yet"),
        (["rollback", "none"], "error: unknown model 'none'; none is registered yet"),
        (["compare", "none", "1", "2"], "error: unknown model 'none'; none is registered yet"),
        (["show", "latest"], "holds none"),
        (["cancel", "latest"], "holds none"),
        (["search", "latest"], "holds none"),
        (
            ["runs", "--tracking-uri", "http://127.0.0.1:9"],
            "the tracking server http://127.0.0.1:9 does not answer",
        ),
        (
            ["submit", CONFIG, "--address", "http://127.0.0.1:9", "--workspace", "/tmp/ws"],
            "no job server answers at http://127.0.0.1:9",
        ),
        (["data", "/none"], "error: no shard set at /none: manifest.json is missing; prepare it first"),
        (["flops"], "error: name one preset or experiment file or more, or use --published"),
        (["flops", "ade20k_vit_base", "--published"], "or use --published for the published models, not both"),
        (["flops", "ade20k_vit_bas"], "error: unknown preset 'ade20k_vit_bas'; did you mean ade20k_vit_base"),
        (["flops", "ade20k_vit_base", "--size", "512"], "error: --size '512' is not of the form HxW in pixels"),
        (["flops", "ade20k_vit_base", "--size", "0x512"], "--size '0x512' is not of the form HxW"),
        (["flops", "--published", "--size", "64x64"], "--size 64x64 has no meaning with --published"),
        (["submit", CONFIG, "--address", "127.0.0.1:9", "--workspace", "/tmp/ws"], "is no job server"),
        (["submit", CONFIG, "--address", "http://127.0.0.1:9", "--workspace", "ws"], "workspace ws is relative"),
    ],
)
def test_mistakes__one_message_and_exit_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SEGVIT_WORKSPACE", "MLFLOW_TRACKING_URI", "SEGVIT_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    assert run(*arguments) == 1
    printed = capfd.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert not list(tmp_path.rglob("mlflow.db"))


def test_flops__published_rows_stand_beside_the_papers_figures(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("flops", "--published", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert {row["name"]: row["published_gflops"] for row in rows} == {
        "ade20k_vit_base": 120.9,
        "ade20k_vit_large_shrunk": 373.5,
        "ade20k_vit_large": 637.9,
        "coco_stuff10k_vit_large_shrunk": 224.8,
        "coco_stuff10k_vit_large": 383.9,
        "pascal_context_vit_large_shrunk": 186.9,
        "pascal_context_vit_large": 321.6,
    }
    for row in rows:
        assert row["gflops"] == pytest.approx(row["published_gflops"], rel=0.005)
        assert row["gflops"] == pytest.approx(sum(row["parts"].values()))
    assert rows[0]["parameters"] == pytest.approx(108.74e6, abs=0.005e6)


def test_flops__presets_at_a_size(capfd: pytest.CaptureFixture[str]) -> None:
    presets = ("ablation_linear_cross_entropy", "ade20k_vit_base")
    assert run("flops", *presets, "--size", "64x96", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["name"], row["size"], row["published_gflops"]) for row in rows] == [
        (name, [64, 96], None) for name in presets
    ]
    assert rows[1]["gflops"] > rows[0]["gflops"]
    assert run("flops", *presets, "--size", "64x96") == 0
    printed = capfd.readouterr().out
    assert "64x96" in printed
    assert f"{rows[1]['gflops']:.2f}" in printed
    assert "One multiply-add counts as one" in printed


def test_flops__variants_of_an_experiment_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digits = Path("flows/configs/quickstart.yaml").resolve()
    assert run("flops", str(digits), "ade20k_vit_base", "--size", "64x96", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert list(rows) == ["full", "shrunk", "ade20k_vit_base"]
    assert rows["shrunk"]["gflops"] < rows["full"]["gflops"]
    # The paper's figure stands beside its model, and its classes are known without the data.
    published = Path("flows/configs/pascal_context/vit_large.yaml").resolve()
    assert run("flops", str(published), "--json") == 0
    [row] = json.loads(capfd.readouterr().out)
    assert (row["name"], row["size"], row["published_gflops"]) == ("full", [480, 480], 321.6)
    assert row["gflops"] == pytest.approx(321.6, rel=0.005)
    elsewhere = Path("flows/configs/camvid_cpu.yaml").read_text().replace("${SEGVIT_DATA}", str(tmp_path))
    (tmp_path / "elsewhere.yaml").write_text(elsewhere)
    assert run("flops", str(tmp_path / "elsewhere.yaml")) == 1
    assert re.search(r"variants\.full: the data tell how many classes there are, but .*camvid", capfd.readouterr().err)


def test_data__counts_for_people_and_programs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digits = DigitsConfig(num_train=5, num_val=2)
    uri = str(tmp_path / "set")
    prepare_shards(DataConfig(dataset="digits", digits=digits), uri, progress=lambda _: None)
    assert run("data", uri) == 0
    printed = capfd.readouterr().out
    facts = summarize_shard_set(uri)
    for split in facts.splits:
        assert f"{split.name}: classes" in printed
        for one in split.classes:
            assert f"{one.pixels:,}" in printed
    assert "█" * BAR_WIDTH in printed
    assert run("data", uri, "--out", str(tmp_path / "out"), "--json") == 0
    given = json.loads(capfd.readouterr().out)
    assert given["splits"][0]["classes"][3]["pixels"] == facts.splits[0].classes[3].pixels
    assert [Path(file).name for file in given["files"]] == [
        "classes.png",
        "samples-train.png",
        "samples-val.png",
        "index.html",
    ]
    assert all(Path(file).is_file() for file in given["files"])
    assert run("data", uri, "--out", str(tmp_path / "out")) == 1
    assert "classes.png exists; choose another folder or use --overwrite" in capfd.readouterr().err
    assert run("data", uri, "--out", str(tmp_path / "out"), "--overwrite") == 0


def test_bar__is_as_long_as_its_fraction() -> None:
    assert bar(1.0) == "█" * BAR_WIDTH
    assert bar(0.5) == "█" * (BAR_WIDTH // 2)
    assert bar(1 / BAR_WIDTH + 3 / BAR_WIDTH / 8) == "█▍"
    assert (bar(1e-9), bar(0.0)) == ("▏", "")


def test_unknown_option__exit_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("run", CONFIG, "--stepz", "3") == 2
    assert "No such option" in capfd.readouterr().err
