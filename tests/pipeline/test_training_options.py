"""What a user can set about training, each on a real (tiny) training in this process."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from data_prep.reader import BatchSchedule, ShardSet
from pipeline.inherit import inherit
from pipeline.models import Clip, build, load_checkpoint
from pipeline.objectives.objective import build as build_objective
from pipeline.train.average import WeightAverage
from pipeline.train.best import score
from pipeline.train.job import Job
from pipeline.train.loop import train
from pipeline.train.normalisation import batchnorms, statistics
from pipeline.train.processes import join
from pipeline.train.settings import TrainSettings
from tests.conftest import REPOSITORY
from tests.pipeline.conftest import tiny_model
from tests.pipeline.in_process import Trained, train_here

Run = Callable[..., Trained]


@pytest.fixture
def run(scenes: Path, tmp_path: Path) -> Run:
    counter = iter(range(100))

    def start(objective: Any = "task", folder: Path | None = None, **settings: Any) -> Trained:
        folder = folder or tmp_path / f"run-{next(counter)}"
        return train_here(folder, scenes, objective, **settings)

    return start


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 5}, 5), ({"epochs": 1.5}, 9), ({"samples": 100}, 7)]
)
def test_length_in_steps_epochs_or_samples(run: Run, length: dict[str, Any], steps: int) -> None:
    assert run(**length).lines[-1]["step"] == steps  # 96 pairs, 16 a step


@pytest.mark.parametrize("length", [{}, {"steps": 5, "epochs": 1}])
def test_exactly_one_length_is_wanted(length: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of steps, epochs, samples"):
        TrainSettings(batch_size=8, **length)


def test_frozen_parameters_stay_and_others_follow_after_their_step(run: Run) -> None:
    done = run(freeze={"visual.*": "always", "transformer.*": 3}, steps=3)
    moved = done.moved()
    assert "token_embedding.weight" in moved
    assert not {name for name in moved if name.startswith("transformer.")}
    assert {n for n in moved if n.startswith("visual.")} <= {
        n for n in moved if "running" in n or "num_batches" in n
    }
    thawed = run(freeze={"visual.*": "always", "transformer.*": 3}, steps=4).moved()
    assert {name for name in thawed if name.startswith("transformer.")}


def test_a_thawing_training_resumes_exactly(run: Run, tmp_path: Path) -> None:
    freeze = {"freeze": {"transformer.*": 3}, "steps": 6}
    whole = run(**freeze)
    part = run(**freeze, save_every=2, keep=9)  # finishes; then its tail is taken again
    for later in (part.folder / "resume/same").glob("step-*"):
        if int(later.name[5:]) > 2:
            shutil.rmtree(later)
    again = run(**freeze, folder=part.folder)
    assert "resuming after step 2" in " ".join(again.said)
    for name, value in whole.student.model.state_dict().items():
        assert torch.equal(value, again.student.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": {"visual.nothing*": "always"}}, "no parameter is called 'visual.nothing*'"),
        ({"lr_factors": {"nothing*": 0.1}}, "no parameter is called 'nothing*'"),
        ({"freeze": {"*": "always"}}, "every parameter is frozen"),
        ({"batchnorm": "sync"}, "sync needs GPUs"),
        ({"epochs": 0.5, "warmup": 5}, "warmup .5. must be smaller than the steps .3."),
        ({"batch_size": 96, "deepspeed": "nowhere.json"},
         "cannot read"),
    ],
)  # fmt: skip
def test_settings_that_fit_nothing_are_refused(
    run: Run, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        run(**settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "'optimizer' belongs to the experiment"),
        ({"bf16": {"enabled": True}}, "'bf16' belongs to the experiment"),
        ({"train_batch_size": 64}, "train_batch_size is 64, but the experiment"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but the"),
        ({"gradient_clipping": 5.0}, "gradient_clipping is 5.0, but the"),
    ],
)
def test_a_deepspeed_json_that_fights_the_configuration_is_refused(
    run: Run, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        run(deepspeed=path)


def test_what_a_deepspeed_json_adds_reaches_the_engine(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
                                "train_batch_size": "auto"}))  # fmt: skip
    assert len(run(deepspeed=path, zero_stage=1).lines) == 4


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs/deepspeed").glob("*.json")), ids=lambda p: p.stem
)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_shipped_deepspeed_jsons_train(run: Run, path: Path, stage: int) -> None:
    plain, other = run(), run(deepspeed=path, zero_stage=stage)
    torch.testing.assert_close(other.losses, plain.losses, rtol=1e-5, atol=1e-5)


def inherited() -> nn.Module:
    return inherit(build(tiny_model(), seed=7), "weights=0.5", None, 3, "svd", seed=1)[0].eval()


def test_learning_rate_factors_by_kind_and_glob(run: Run) -> None:
    factors = {"gates": 0.0, "heads": 0.0, "visual.*": 0.0, "scales": 0.5, "inherited": 1.0}
    moved = run(student=inherited(), lr_factors=factors, steps=2).moved()
    assert not {n for n in moved if ".gate." in n or n.endswith(".up")}
    visual = {n for n in moved if n.startswith("visual.")}
    assert all("running" in n or "num_batches" in n for n in visual)
    assert {n for n in moved if n.endswith("down.weight")}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_balance_term_evens_out_the_heads(run: Run, accumulate: int) -> None:
    model = inherited()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.bias"):
            parameter.data[0] = 2.0
    done = run({"task": 1.0, "balance": 10.0}, student=model, steps=12, lr=0.02,
               accumulate=accumulate)  # fmt: skip
    values = [line["loss/balance"] for line in done.lines]
    assert values[0] > 1.0
    assert values[-1] < 0.6 * values[0]


def test_balance_and_layers_are_the_same_in_chunks(run: Run) -> None:
    objective = {
        "task": 1.0, "balance": 1.0,
        "layers": {"weight": 1.0, "modules": ["visual.layer[1-4]", "transformer.resblocks.1"]},
    }  # fmt: skip
    common = {"batchnorm": "frozen", "steps": 4}
    whole = run(objective, student=inherited(), **common)
    chunks = run(objective, student=inherited(), accumulate=4, **common)
    torch.testing.assert_close(chunks.losses, whole.losses, rtol=1e-5, atol=1e-5)


def test_layer_distillation_brings_the_layers_nearer(run: Run) -> None:
    objective = {"layers": {"modules": ["visual.layer1", "transformer.resblocks.0"]}}
    losses = run(objective, steps=10, lr=1e-4, batchnorm="frozen").losses
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("modules", "message"), [(["visual.layer9"], "no module 'visual.layer9' in common")]
)
def test_layers_that_do_not_exist_are_refused(run: Run, modules: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run({"task": 1.0, "layers": {"modules": modules}})


def test_layers_of_another_width_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"layer visual\.layer1: the student's output is"):
        run({"task": 1, "layers": {"modules": ["visual.layer1"]}},
            student=build(tiny_model(4), seed=7))  # fmt: skip


def test_frozen_batchnorm_keeps_its_statistics_and_learns_its_affine(run: Run) -> None:
    moved = run(batchnorm="frozen", steps=2).moved()
    assert not {n for n in moved if "running" in n}
    assert "visual.bn1.weight" in moved


def test_recomputed_blocks_change_neither_losses_nor_statistics(run: Run) -> None:
    plain, recomputed = run(), run(checkpoint_activations=True)
    torch.testing.assert_close(recomputed.losses, plain.losses, rtol=1e-6, atol=1e-6)
    ours, theirs = (statistics(r.student.model) for r in (recomputed, plain))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(recomputed.student.model.visual.layer1[0])


def test_chunks_move_batchnorm_statistics_about_as_far_as_one_batch(run: Run) -> None:
    """With BatchNorm in training mode chunks are another model: measured, not equal."""
    whole, chunks = run(steps=1), run(steps=1, accumulate=4)
    for name, value in statistics(whole.student.model).items():
        if name == "visual.bn1.running_var":  # of the first layer the inputs are the same
            other = statistics(chunks.student.model)[name]
            torch.testing.assert_close(other, value, rtol=0.05, atol=0.01)
    assert abs(float(chunks.losses[0] - whole.losses[0])) < 0.5


@pytest.mark.slow
def test_compiled_towers_take_the_same_steps(run: Run) -> None:
    plain, compiled = run(steps=3), run(steps=3, compile=True)
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-3, atol=1e-3)
    assert compiled.student.model.visual._compiled_call_impl is None
    assert set(compiled.student.model.state_dict()) == set(plain.before)


def test_the_average_is_weighted_by_samples() -> None:
    """Two steps of 8 samples weigh as much as one of 16: each sample counts by its age."""
    values = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0])
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, half_life=16, batch_size=8)
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        average.update(step)
    weights = torch.tensor([0.5 ** ((len(values) - k) * 8 / 16) for k in range(1, 7)])
    expected = (weights * values).sum() / weights.sum()
    torch.testing.assert_close(average.model.weight.squeeze(), expected)
    average.give()
    torch.testing.assert_close(model.weight.squeeze(), expected)


def test_a_short_average_is_near_the_last_weights_and_is_what_is_kept(run: Run) -> None:
    plain, short, long = run(steps=6), run(steps=6, ema_samples=2), run(steps=6, ema_samples=10_000)
    torch.testing.assert_close(short.losses, plain.losses)

    def distance(other: Trained) -> float:
        states = (r.student.model.state_dict()["visual.conv1.weight"] for r in (plain, other))
        return float(torch.dist(*states))

    assert distance(short) < 0.05 * distance(long)


def test_an_averaging_training_resumes_exactly(run: Run) -> None:
    common: dict[str, Any] = {"steps": 6, "ema_samples": 32, "save_every": 2, "keep": 9}
    whole = run(**common)
    for late in (whole.folder / "resume/same").glob("step-*4"):
        shutil.rmtree(late)
    kept = copy.deepcopy(whole.student.model.state_dict())
    again = run(**common, folder=whole.folder)
    assert "resuming after step 2" in " ".join(again.said)
    for name, value in kept.items():
        assert torch.equal(value, again.student.model.state_dict()[name]), name


def scores(values: list[float]) -> Callable[[Clip], dict[str, float]]:
    waiting = iter(values)

    def look(clip: Clip) -> dict[str, float]:
        torch.rand(3)  # a look may draw random numbers and change the mode
        clip.model.eval()
        value = next(waiting)
        return {"quick/i2t_r1": value, "quick/t2i_r1": value, "quick/i2t_r5": 0.9}

    return look


def test_looks_keep_the_best_and_change_nothing(run: Run) -> None:
    plain = run(steps=6)
    looked = run(steps=6, validate=scores([0.2, 0.5, 0.3]), validate_every=2)
    torch.testing.assert_close(looked.losses, plain.losses, rtol=0, atol=0)
    assert [line.get("quick/i2t_r1") for line in looked.lines] == [None, 0.2, None, 0.5, None, 0.3]
    best = load_checkpoint(looked.folder / "best")
    assert (best.provenance["step"], best.provenance["score"]) == (4, 0.5)
    chosen = run(steps=6, validate=scores([0.2, 0.5, 0.3]), validate_every=2, select="best")
    state = chosen.student.model.state_dict()
    for name, value in best.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_score_is_the_mean_of_both_recalls_or_top1() -> None:
    assert score({"q/i2t_r1": 0.2, "q/t2i_r1": 0.4, "q/i2t_r5": 0.9}) == pytest.approx(0.3)
    assert score({"q/top1": 0.7, "q/top5": 0.9}) == pytest.approx(0.7)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_on_the_device_gives_the_same_crops(run: Run, workers: int) -> None:
    plain = run(steps=2, batchnorm="frozen")
    device = run(steps=2, batchnorm="frozen", decode="device", workers=workers)
    torch.testing.assert_close(device.losses, plain.losses, rtol=0.02, atol=0.02)


def test_tensorboard_gets_the_same_records(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(trackers=["tensorboard"])
    events = EventAccumulator(str(done.folder / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("loss")]
    torch.testing.assert_close(torch.tensor(values), done.losses, rtol=1e-5, atol=1e-5)


def test_wandb_works_offline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = run(trackers=["wandb"], steps=2)
    assert list((done.folder / "wandb").glob("offline-run-*/*.wandb"))


def test_bf16_autocast_trains_and_keeps_single_precision_weights(run: Run) -> None:
    done = run(precision="bf16", steps=6)
    assert done.losses[-1] < done.losses[0]
    assert {p.dtype for p in done.student.model.parameters()} == {torch.float32}
    assert {n.running_mean.dtype for n in batchnorms(done.student.model)} == {torch.float32}


def pair(change: Callable[[dict[str, Any]], None] | None = None) -> tuple[Clip, Clip]:
    """Return a student and a teacher whose architectures differ by `change`."""
    ours, theirs = tiny_model(), tiny_model()
    if change:
        change(theirs)
    return Clip(build(ours, seed=7), ours), Clip(build(theirs, seed=8), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["vision_cfg"].update(image_size=64), "differ in image size: 32 and 64"),
        (lambda a: a["text_cfg"].update(context_length=16), "differ in context length: 24 and 16"),
        (lambda a: a["text_cfg"].update(vocab_size=512), "differ in vocabulary"),
        (lambda a: a.update(preprocess={"mean": [0.5] * 3}), "differ in normalisation"),
    ],
)
def test_a_teacher_that_reads_other_input_is_refused(
    scenes: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    student, teacher = pair(change)
    with pytest.raises(UserError, match=message) as fault:
        train(distilling(student, teacher, scenes, tmp_path), join("cpu"))
    assert "give them the same input" in str(fault.value)


def distilling(student: Clip, teacher: Clip | None, shards: Path, folder: Path) -> Job:
    return Job(
        "tiny", student, teacher, build_objective("clip_kd", 32, 32),
        ShardSet.find(shards, "scenes-train-*.tar"), TrainSettings(steps=2, batch_size=16), 3,
        folder, "same", lambda _: None,
    )  # fmt: skip


def test_a_teacher_inside_the_optimizer_is_refused(scenes: Path, tmp_path: Path) -> None:
    student, _ = pair()
    job = distilling(student, Clip(student.model, student.architecture), scenes, tmp_path)
    with pytest.raises(UserError, match="the teacher is the model being trained"):
        train(job, join("cpu"))
    with pytest.raises(UserError, match="needs a teacher"):
        train(distilling(student, None, scenes, tmp_path), join("cpu"))


def test_fewer_shards_than_ranks_are_enough(scenes: Path) -> None:
    """Samples are dealt out, not shards: one shard feeds four ranks with equal, disjoint parts."""
    one = ShardSet.find(scenes, "scenes-train-000000.tar")
    parts = [next(BatchSchedule(one, 4, rank, 4, 3).batches(0)) for rank in range(4)]
    together = [int(index) for part in parts for index in part]
    assert len(set(together)) == 16
    with pytest.raises(UserError, match="batch"):
        next(BatchSchedule(one, 64, 0, 4, 3).batches(0))
