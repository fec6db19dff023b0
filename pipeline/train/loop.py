"""The training loop: shards, student and objective in; trained student and `train.jsonl` out.

One loop serves one process and many nodes. What a step does depends on the step number, the seed
and the restored state alone, so an interrupted run ends with the same weights as an undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch

from data_prep.reader import BatchSchedule, CorruptionBudget
from pipeline.tracking import Rates, Record, Tracker, console_line, memory_gb
from pipeline.train.average import WeightAverage
from pipeline.train.best import Best
from pipeline.train.checkpoint import Position, ResumeFolder
from pipeline.train.compiled import compiled
from pipeline.train.decode import on_device
from pipeline.train.engine import start_engine
from pipeline.train.job import Job, check_models
from pipeline.train.liveness import Liveness
from pipeline.train.loader import Batch, TrainingPairs, training_batches
from pipeline.train.memory import checkpointed
from pipeline.train.normalisation import average_batchnorm, synchronised, training_mode
from pipeline.train.processes import Processes
from pipeline.train.settings import TrainSettings
from pipeline.train.signals import StopRequested, StopSignals
from pipeline.train.step import Trainee
from pipeline.train.update import Updater


def train(job: Job, processes: Processes) -> Position:
    """Train `job.student` in place for the steps that are still to do.

    Raises:
        UserError: the batch does not divide over the processes, too many corrupt samples, a loss
            that is not finite, no space for a checkpoint.
        StopRequested: a signal asked to stop; the state is saved.
        LostRank: another rank is gone.
    """
    check_models(job)
    settings = job.settings.with_steps(job.shards.num_samples)
    job = replace(job, settings=settings)
    torch.manual_seed(job.seed * 1_000_003 + processes.rank)
    if settings.batchnorm == "sync":
        job.student.model = synchronised(job.student.model, processes)
    training = _Training(job, processes)
    with ExitStack() as stack:
        alive = Liveness(processes, settings.silence_seconds, settings.timeout_minutes * 60)
        training.alive = stack.enter_context(alive)
        training.signals = stack.enter_context(StopSignals())
        if settings.checkpoint_activations:
            stack.enter_context(checkpointed(job.student.model))
        if settings.compile:
            stack.enter_context(compiled(job.student.model))
        try:
            position = training.run()
        except Exception as error:
            training.resume.wait(seconds=20)
            if isinstance(error, RuntimeError):
                raise alive.explain(error) from error
            raise
    training.choose_weights()
    job.student.model.eval()
    return position


class _Training:
    """One arm's training under way."""

    alive: Liveness
    signals: StopSignals

    def __init__(self, job: Job, processes: Processes) -> None:
        self.job, self.processes, self.settings = job, processes, job.settings
        settings, model = job.settings, job.student.model
        training_mode(model, settings.batchnorm == "frozen")
        trainee = Trainee(model, job.objective, settings.max_logit_scale)
        self.engine, optimizer = start_engine(trainee, settings, processes)
        self.average = (
            WeightAverage(model, settings.ema_samples, settings.batch_size)
            if settings.ema_samples
            else None
        )
        _place_teacher(job, settings, processes)
        self.update = Updater(job, processes, self.engine, optimizer)
        self.resume = ResumeFolder(job.folder / "resume", job.fingerprint, settings.keep, job.say)
        restored = self.resume.restore(self.engine, processes, self.average)
        self.position = restored or Position(0, 0)
        self.best = Best(job.folder / "best", fresh=restored is None and processes.is_main)
        if restored:
            job.say(f"{job.arm}: resuming after step {restored.step} of {settings.steps}")

    def run(self) -> Position:
        """Take the steps that are left."""
        job, settings, processes = self.job, self.settings, self.processes
        first = self.position.step
        budget = CorruptionBudget(settings.max_corrupt_share)
        budget.seen, budget.corrupt = self.position.samples, self.position.corrupt
        earlier, started = self.position.seconds, time.perf_counter()
        last_save, rates = started, Rates()
        assert settings.steps is not None
        with Tracker(job, self.position.step, processes.is_main) as tracker:
            for step, batch, waited in self._batches(first):
                record = self.update(step, batch)
                done = step + 1
                if self.average is not None:
                    self.average.update(done)
                elsewhere = int(processes.total(len(batch.corrupt))) - len(batch.corrupt)
                messages = [*batch.corrupt, *["one read by another rank"] * elsewhere]
                budget.count(settings.batch_size, messages)  # on all ranks alike
                rates.add(settings.batch_size, waited)
                seconds = earlier + time.perf_counter() - started
                seen = done * settings.batch_size
                self.position = Position(done, seen, budget.corrupt, seconds)
                looked = self._look(done)
                if looked or done % settings.log_every == 0 or done in (1, settings.steps):
                    record = {"step": done, "samples": seen, **record, **rates.read()}
                    record |= {"corrupt": budget.corrupt, "memory_gb": memory_gb(processes.device)}
                    record |= {"seconds": round(seconds, 3), **looked}
                    line = console_line(job.arm, record, settings.steps, started, first)
                    tracker.write(record, line)
                tracker.step(done)
                if self._save(done, time.perf_counter() - last_save):
                    last_save = time.perf_counter()
                    rates.reset()
        self.resume.finish(processes)
        return self.position

    def _save(self, done: int, since: float) -> bool:
        """Save where it is time, and stop where a signal asked for it, on all ranks alike.

        Raises:
            StopRequested: after saving.
            UserError: the checkpoint before could not be written.
        """
        settings = self.settings
        late = since > settings.save_every_minutes * 60
        code, due, failed = self.processes.maxima(
            self.signals.code, float(late), float(self.resume.failed)
        )
        if failed:
            self.resume.refuse_failure()
        if done == settings.steps or not (due or code or done % settings.save_every == 0):
            return False
        self.alive.note(done, "saving")
        self.resume.save(self.engine, self.position, self.processes, self.average)
        if code:
            self.resume.finish(self.processes)
            raise StopRequested(int(code), done)
        return True

    def _look(self, done: int) -> Record:
        """Measure the model on the quick set where it is time; return the metrics."""
        job, every = self.job, self.settings.validate_every
        if every is None or job.validate is None or (done % every and done != self.settings.steps):
            return {}
        self.alive.note(done, "validating")
        self._settle()
        model = job.student.model if self.average is None else self.average.model
        # looking must not change what follows: neither generators nor the training mode
        with torch.random.fork_rng():
            metrics = job.validate(replace(job.student, model=model))
        training_mode(job.student.model, self.settings.batchnorm == "frozen")
        if self.processes.is_main:
            self.best.offer(job.student, model, done, metrics)
        return metrics

    def _settle(self) -> None:
        """Make the BatchNorm statistics of all ranks equal."""
        average_batchnorm(self.job.student.model, self.processes)
        if self.average is not None:
            average_batchnorm(self.average.model, self.processes)

    def choose_weights(self) -> None:
        """Leave in the student what becomes the arm's checkpoint: last, average or best."""
        self._settle()
        if self.average is not None:
            self.average.give()
        if self.settings.select == "best":
            self.processes.barrier()
            self.best.load_into(self.job.student.model)

    def _batches(self, first: int) -> Iterator[tuple[int, Batch, float]]:
        """Yield (step, this rank's batch, seconds waited for it) from step `first` on."""
        job, settings, processes = self.job, self.settings, self.processes
        assert settings.steps is not None
        schedule = BatchSchedule(
            job.shards,
            settings.batch_size // processes.world_size,
            processes.rank,
            processes.world_size,
            job.seed,
        )
        pairs = TrainingPairs(
            job.shards,
            job.student.tokenizer(),
            job.student.image_size,
            settings.augment,
            job.seed,
            settings.cache_decoded,
            encoded=settings.decode == "device",
        )
        loader = training_batches(
            pairs,
            schedule,
            start=first,
            end=settings.steps,
            workers=settings.workers,
            pin=processes.device.type == "cuda",
        )
        asked = time.perf_counter()
        self.alive.note(first, "waiting for data")
        for step, batch in enumerate(on_device(loader, pairs, processes.device), first):
            self.alive.note(step, "step")
            yield step, batch, time.perf_counter() - asked
            asked = time.perf_counter()
            self.alive.note(step + 1, "waiting for data")


def _place_teacher(job: Job, settings: TrainSettings, processes: Processes) -> None:
    if job.teacher is None:
        return
    job.teacher.model.to(processes.device).eval().requires_grad_(False)
    if settings.channels_last:
        job.teacher.model.to(memory_format=torch.channels_last)
