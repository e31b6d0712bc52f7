"""A validation set that grows: the champion scored again on it, in this process in place of Ray's workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import segvit
from flows import scoring
from flows.recipes import segmentation
from pipeline import steps, storage
from pipeline.config import DataConfig, DigitsConfig, EvaluateConfig, PromotionPolicy, RuntimeConfig
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.evaluation.latency import Latency
from pipeline.records import Check, Checkpoint, Evaluation, ModelVersion, RescoredChampion, ShardSet
from pipeline.registry import promote, rescoring, store
from pipeline.registry.compare import compare_versions
from pipeline.registry.promote import promote_version
from pipeline.registry.rescoring import champion_standing, keep_evaluation, scores_on_record
from pipeline.shards.prepare import prepare_shards
from pipeline.workflow import liveness
from pipeline.workflow.execution import Outcome, StepRequest, execute_step
from pipeline.workflow.graph import Plan
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.faults.kill_flow import EXPERIMENT, STEPS

NAMES = [str(digit) for digit in range(10)] + ["background"]
PALETTE = [[20 * index, 255 - 20 * index, 128] for index in range(11)]
CONFIG = EvaluateConfig(num_examples=1, latency_repeats=1)
POLICY = PromotionPolicy(unmeasured_classes="allow")
Register = Callable[..., ModelVersion]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's tasks are called on the spot, and the registered artifact is trusted."""

    def remote(**_: Any) -> Callable[[Any], Any]:
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setattr(evaluate, "ray", SimpleNamespace(remote=remote, get=lambda found: found))
    monkeypatch.setattr(evaluate, "Tally", lambda: None)
    monkeypatch.setattr(evaluate, "wait_for_scores", lambda parts, *_: parts)
    monkeypatch.setattr(evaluate, "wants_gpu", lambda _: False)
    monkeypatch.setattr(evaluate, "time_checkpoint", lambda *_: Latency(12.0, True))
    monkeypatch.setattr(promote, "reproduces", lambda *_: Check(name="artifact", passed=True, detail="trusted"))


@pytest.fixture(scope="module")
def grown_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """As `digits_shards`, with a seventh validation scene."""
    digits = DigitsConfig(num_train=12, num_val=7, image_size=96)
    config = DataConfig(dataset="digits", samples_per_shard=5, digits=digits)
    return prepare_shards(config, str(tmp_path_factory.mktemp("grown")), progress=lambda _line: None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Two of random weights."""
    found = []
    for seed in (1, 4):  # with these some pixels are right
        torch.manual_seed(seed)
        settings = segvit.ModelConfig(
            backbone="vit_tiny_patch16_224", image_size=(48, 64), out_layers=(1, 3), decoder_layers=1
        )
        model = segvit.build_model(settings, 11).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("checkpoint")
        segvit.save_checkpoint(folder, model, {"class_names": NAMES, "palette": PALETTE, "step": 3})
        digest = storage.file_digest(str(folder / "model.safetensors"))
        found.append(
            Checkpoint(
                variant="full", uri=str(folder), digest=digest, step=3, miou=None, history_uri=None, train_seconds=1.0
            )
        )
    return found


@pytest.fixture(scope="module")
def evaluations() -> dict[tuple[int, str], Evaluation]:
    """By checkpoint and shard set, for the tests that want the same."""
    return {}


@pytest.fixture
def registered(
    tracking: Tracking,
    checkpoints: list[Checkpoint],
    evaluations: dict[tuple[int, str], Evaluation],
    tmp_path_factory: pytest.TempPathFactory,
) -> Register:
    """Score a checkpoint and register it; keywords change what is said of its scores."""

    def make(which: int, shard_set: ShardSet, **changes: Any) -> ModelVersion:
        checkpoint = checkpoints[which]
        if (which, shard_set.digest) not in evaluations:
            uri = str(tmp_path_factory.mktemp("evaluation"))
            found = evaluate.evaluate_checkpoint(checkpoint, shard_set, CONFIG, RuntimeConfig(), uri)
            evaluations[which, shard_set.digest] = found
        evaluation = evaluations[which, shard_set.digest]
        run = tracking.client().create_run(tracking.experiment_id())
        return store.register_model(
            tracking,
            tracking.experiment,
            checkpoint,
            evaluation.model_copy(update=changes),
            shard_set,
            run_id=run.info.run_id,
            flow_run_id="flow",
        )

    return make


@pytest.fixture
def rescore(tracking: Tracking, tmp_path: Path) -> Callable[..., Outcome]:
    """The step, executed in a flow run of its own."""

    def make(versions: list[ModelVersion], shard_set: ShardSet) -> Outcome:
        tags = {Tag.KIND: "flow", **liveness.identity_tags()}
        flow = tracking.client().create_run(tracking.experiment_id(), tags=tags)
        request = StepRequest(
            step=steps.rescore_champion,
            label="rescore/champion",
            arguments=steps.rescore_champion.bind((versions, shard_set, CONFIG), {}),
            depends_on=(),
            workspace=str(tmp_path / "space"),
            tracking=tracking,
            flow="test",
            flow_run_id=flow.info.run_id,
            runtime=RuntimeConfig(),
        )
        # As a task with inputs does, it looks whether it has run already.
        return execute_step(request, Outcome(label="register/full", state=RunState.REUSED, record=versions[0]))

    return make


def never(*_: Any, **__: Any) -> Evaluation:
    raise AssertionError("nothing was to be scored")


def test_rescore_champion__a_grown_split_is_scored_once_and_the_gate_compares_on_it(
    tracking: Tracking,
    checkpoints: list[Checkpoint],
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    champion = registered(0, digits_shards)
    promote_version(tracking, champion, POLICY)
    candidate = registered(1, grown_shards)
    old, new = champion.evaluation.data_digest[:8], candidate.evaluation.data_digest[:8]
    assert promote_version(tracking, candidate, POLICY).reason == (
        f"refused: scored on data {new}, the champion on data {old}: not comparable; run the experiment again, or "
        f"score the champion alike: segvit evaluate models:/{champion.name}/1 models:/{champion.name}/2"
    )
    outcome = rescore([candidate], grown_shards)
    assert isinstance(outcome.record, RescoredChampion), outcome.error
    again = outcome.record.evaluation
    expected = evaluate.evaluate_checkpoint(checkpoints[0], grown_shards, CONFIG, RuntimeConfig(), str(tmp_path / "e"))
    assert again is not None
    assert (again.miou, again.per_class_iou, again.num_images) == (expected.miou, expected.per_class_iou, 7)
    assert (outcome.record.champion, again.variant) == (1, champion.model_uri)
    assert again.data_digest == candidate.evaluation.data_digest
    assert tracking.client().get_run(str(outcome.run_id)).data.metrics["miou"] == pytest.approx(again.miou)
    kept = store.get_version(tracking, champion.name, 1)
    assert [one.evaluation for one in scores_on_record(tracking, kept)] == [champion.evaluation, again]
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", never)
    assert rescore([candidate], grown_shards).state == RunState.REUSED

    for offset, promoted in ((-0.001, False), (0.0, True)):
        version = candidate.model_copy(
            update={"evaluation": candidate.evaluation.model_copy(update={"miou": again.miou + offset})}
        )
        decision = promote_version(tracking, version, POLICY)
        assert decision.promoted == promoted
        assert f"{again.miou:.4f}" in decision.reason
        assert decision.candidate_scores is not None
        assert decision.candidate_scores.model_dump() == {
            "version": 2,
            "run_id": candidate.run_id,
            "rescored": False,
            "digest": version.evaluation.content_digest(),
            "data_digest": version.evaluation.data_digest,
            "miou": version.evaluation.miou,
        }
        assert decision.champion_scores is not None
        assert decision.champion_scores.model_dump() == {
            "version": 1,
            "run_id": outcome.run_id,
            "rescored": True,
            "digest": again.content_digest(),
            "data_digest": again.data_digest,
            "miou": again.miou,
        }
    # The candidate is champion now: there is nothing to look at again.
    assert rescore([candidate], grown_shards).state == RunState.REUSED


def test_rescore_champion__what_is_kept_serves_later_candidates_and_comparisons(
    tracking: Tracking,
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    champion = registered(0, digits_shards)
    promote_version(tracking, champion, POLICY)
    first = registered(1, grown_shards, miou=0.0)
    scored = rescore([first], grown_shards).record
    assert isinstance(scored, RescoredChampion)
    assert scored.evaluation is not None
    later = registered(1, grown_shards, miou=0.001)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", never)
    outcome = rescore([later], grown_shards)
    assert (outcome.state, outcome.record) == (RunState.DONE, RescoredChampion(name=champion.name, champion=1))
    for pair in ((1, 3), (3, 1)):
        comparison = compare_versions(tracking, champion.name, *pair)
        assert comparison.scored_on == 3
        sides = {comparison.first.version: comparison.first, comparison.second.version: comparison.second}
        assert sides[1].evaluation == scored.evaluation
        assert sides[3].evaluation == later.evaluation
        assert comparison.wins + comparison.losses + comparison.ties == 7


def test_rescore_champion__a_champion_that_came_meanwhile_is_not_compared_blindly(
    tracking: Tracking,
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
) -> None:
    first = registered(0, digits_shards)
    promote_version(tracking, first, POLICY)
    candidate = registered(0, grown_shards, miou=0.9)
    # Nothing to do: the champion's own weights were scored on that data as the candidate.
    assert rescore([candidate], grown_shards).record == RescoredChampion(name=first.name, champion=1)
    overtaking = registered(1, digits_shards, miou=0.8)
    assert promote_version(tracking, overtaking, POLICY).promoted
    decision = promote_version(tracking, candidate, POLICY)
    assert (decision.promoted, decision.champion_before, decision.champion_after) == (False, 3, 3)
    assert f"segvit evaluate models:/{first.name}/3 models:/{first.name}/2" in decision.reason
    outcome = rescore([candidate], grown_shards)
    assert outcome.note == f"the champion of {first.name} is now version 3"
    assert isinstance(outcome.record, RescoredChampion)
    assert outcome.record.champion == 3
    assert outcome.record.evaluation is not None
    assert promote_version(tracking, candidate, POLICY).promoted


def test_rescore_champion__other_classes_make_another_model(
    tracking: Tracking,
    trained: Any,
    register: Register,
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    champion = registered(0, digits_shards)
    promote_version(tracking, champion, POLICY)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", never)
    candidate = register(
        champion.evaluation.model_copy(
            update={
                "checkpoint_digest": trained.checkpoint.digest,
                "class_names": (*NAMES, "tram"),
                "per_class_iou": (*champion.evaluation.per_class_iou, 0.9),
                "per_class_accuracy": (*champion.evaluation.per_class_accuracy, 0.9),
                "data_digest": "f" * 64,
            }
        )
    )
    record = rescore([candidate], grown_shards).record
    assert record == RescoredChampion(
        name=champion.name, champion=1, obstacle=f"models:/{champion.name}/1 has other classes"
    )
    decision = promote_version(tracking, candidate, POLICY, dry_run=True)
    assert decision.reason == (
        f"refused: scored on data ffffffff, the champion on data {champion.evaluation.data_digest[:8]}; with class 11 "
        "tram, the champion with missing: not comparable; a model of other classes is another model; give its "
        "experiment another name"
    )


def test_rescore_champion__without_files_only_a_person_goes_on_without_comparing(
    tracking: Tracking,
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
) -> None:
    champion = registered(0, digits_shards, miou=0.5)
    name = champion.name
    promote_version(tracking, champion, POLICY)
    shutil.rmtree(store.version_location(tracking, name, 1))
    lost = f"models:/{name}/1 has lost its files (model.safetensors, config.json)"
    # Scored alike it is compared with all the same, by what is on record.
    worse = registered(1, digits_shards, miou=0.0)
    assert promote_version(tracking, worse, POLICY).reason.startswith("refused: mIoU 0.0000, the champion's 0.5000")
    candidate = registered(1, grown_shards)
    assert rescore([candidate], grown_shards).record == RescoredChampion(name=name, champion=1, obstacle=lost)
    refused = promote_version(tracking, candidate, POLICY)
    assert refused.reason.endswith(
        f": not comparable; the champion cannot be scored again, {lost}; run its experiment again to register it anew, "
        f"or promote without comparing: segvit promote {name} 3"
    )
    by_hand = promote_version(tracking, candidate, POLICY, manual=True)
    assert by_hand.promoted
    assert by_hand.reason == (
        f"promoted: mIoU {candidate.evaluation.miou:.4f}, not compared with the champion; {len(by_hand.checks)} checks "
        "passed"
    )
    assert f"{lost}: not compared" in [check.detail for check in by_hand.checks]


def test_rescore_champion__a_version_of_the_same_checkpoint_lends_its_files(
    tracking: Tracking,
    registered: Register,
    rescore: Callable[..., Outcome],
    digits_shards: ShardSet,
    grown_shards: ShardSet,
) -> None:
    champion = registered(0, digits_shards)
    promote_version(tracking, champion, POLICY)
    shutil.rmtree(store.version_location(tracking, champion.name, 1))
    candidate = registered(1, grown_shards)
    assert champion_standing(tracking, candidate, 1).lost
    first = rescore([candidate], grown_shards)
    assert isinstance(first.record, RescoredChampion)
    assert first.record.evaluation is None
    anew = registered(0, digits_shards)
    assert (anew.version, champion_standing(tracking, candidate, 1).source) == (3, (champion.name, 3))
    outcome = rescore([candidate], grown_shards)
    assert outcome.note == f"models:/{champion.name}/1 can be compared now"
    assert isinstance(outcome.record, RescoredChampion)
    assert outcome.record.evaluation is not None
    standing = champion_standing(tracking, candidate, 1)
    assert standing.scores is not None
    assert standing.scores.evaluation == outcome.record.evaluation


def test_keep_evaluation__of_this_checkpoint_and_not_what_it_was_registered_with(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    version = register()
    with pytest.raises(ValueError, match=f"another checkpoint than {version.model_uri} holds"):
        keep_evaluation(tracking, version, trained.scored(0.5, checkpoint_digest="0" * 64), "run")
    assert not keep_evaluation(tracking, version, trained.scored(0.7), "run")
    for miou in (0.3, 0.4):
        assert keep_evaluation(tracking, version, trained.scored(miou, data_digest="f" * 64), f"run {miou}")
    assert keep_evaluation(tracking, version, trained.scored(0.6, inference={"flip": True}), "run f")
    foreign = trained.scored(0.9, checkpoint_digest="0" * 64, split="test").to_json()
    text = f'{{"run_id": "x", "rescored": true, "evaluation": {foreign}}}'
    for number, tag in enumerate(("{}", "no JSON", text)):
        store.set_version_tags(tracking, version.name, 1, {f"{rescoring.KEPT}.{number}": tag})
    found = {(one.run_id, one.rescored, one.evaluation.miou) for one in scores_on_record(tracking, version)}
    assert found == {(version.run_id, False, 0.5), ("run 0.4", True, 0.4), ("run f", True, 0.6)}


def test_promote_version__an_evaluation_made_by_hand_counts(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    champion, candidate = register(), register(trained.scored(0.6, data_digest="f" * 64))
    # Another checkpoint: of one's own weights all that is known counts.
    store.set_version_tags(tracking, champion.name, 1, {store.CHECKPOINT_DIGEST: "c" * 64})
    evaluation = champion.evaluation.model_copy(update={"checkpoint_digest": "c" * 64})
    store.set_version_tags(tracking, champion.name, 1, {store.EVALUATION: evaluation.to_json()})
    promote_version(tracking, store.get_version(tracking, champion.name, 1), PromotionPolicy())
    assert not promote_version(tracking, candidate, PromotionPolicy(), manual=True).promoted
    alike = evaluation.model_copy(update={"miou": 0.55, "data_digest": "f" * 64})
    assert keep_evaluation(tracking, store.get_version(tracking, champion.name, 1), alike, "by hand")
    decision = promote_version(tracking, candidate, PromotionPolicy(), manual=True)
    assert decision.reason == "promoted: mIoU 0.6000, the champion had 0.5500; 4 checks passed"
    assert decision.champion_scores is not None
    assert (decision.champion_scores.run_id, decision.champion_scores.rescored) == ("by hand", True)


def test_plan__shows_the_step(tmp_path: Path) -> None:
    config = segmentation.RECIPE.config.model_validate(EXPERIMENT)
    with Plan(str(tmp_path), Tracking.for_workspace(str(tmp_path))) as plan:
        segmentation.RECIPE.build(plan, config)
    assert [one.label for one in plan.steps] == list(STEPS)
    planned = {one.label: one for one in plan.steps}
    assert planned["rescore/champion"].depends_on == ("register/full", "prepare")
    assert planned["promote"].depends_on == ("register/full", "rescore/champion")


def test_score__data_and_settings_of_a_registered_version(
    tracking: Tracking, trained: Any, register: Register, digits_shards: ShardSet, tmp_path: Path
) -> None:
    register()
    data = register(trained.scored(0.6, split="train", inference={"mode": "slide", "flip": True})).model_uri
    settings = scoring.own_settings(tracking, data)
    assert (settings.split, settings.inference.options()) == ("train", {"mode": "slide", "flip": True})
    store.set_version_tags(tracking, tracking.experiment, 2, {store.SHARD_SET: digits_shards.to_json()})
    model = f"models:/{tracking.experiment}/1"
    with Plan(str(tmp_path), tracking) as plan:
        scoring.score(plan, model, data, None, None, settings)
    assert [one.label for one in plan.steps] == ["open_shards", "fetch_model", "evaluate"]
    changed = digits_shards.model_copy(update={"digest": "0" * 64})
    store.set_version_tags(tracking, tracking.experiment, 2, {store.SHARD_SET: changed.to_json()})
    with (
        Plan(str(tmp_path), tracking) as plan,
        pytest.raises(UserError, match=rf"^{digits_shards.uri} has changed since {data} was scored on it; run that"),
    ):
        scoring.score(plan, model, data, None, None, settings)
    store.set_version_tags(tracking, tracking.experiment, 2, {store.SHARD_SET: "{}"})
    with Plan(str(tmp_path), tracking) as plan, pytest.raises(UserError, match=r"^version 2 does not say where its"):
        scoring.score(plan, model, data, None, None, settings)


def test_keep_scores__with_a_registered_version_alone(tracking: Tracking, trained: Any, register: Register) -> None:
    version = register()
    flipped = trained.scored(0.4, inference={"flip": True})
    assert not scoring.keep_scores(tracking, trained.checkpoint, flipped, "r")
    fetched = trained.checkpoint.model_copy(update={"variant": version.model_uri})
    assert not scoring.keep_scores(tracking, fetched, trained.evaluation, "r")
    assert scoring.keep_scores(tracking, fetched, flipped, "r")
    assert [one.run_id for one in scores_on_record(tracking, version)] == [version.run_id, "r"]
