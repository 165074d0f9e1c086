"""What a group leaves: one checkpoint for all its trials, what a disk refused, and what is said on the console."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_trainer.errors import HostError, Problem
from lora_trainer.evidence.statistics.paired import levels
from lora_trainer.storage import disk_space
from lora_trainer.storage.checkpoint import prune, save_checkpoint
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.optimizer_step import StepResult
from lora_trainer.training.resume import ResumePoint, identity_of
from lora_trainer.training.sampling import Sampler
from lora_trainer.training.setup import Setup
from lora_trainer.training.trial import Tensors
from lora_trainer.training.trial_writer import TrialWriter
from lora_trainer.training.validation import Measurement


class GroupWriter:
    """One `TrialWriter` per trial; main process only. A solo run says all of its trial, a group says what matters.

    Args:
        on_save: called after each checkpoint.
    """

    def __init__(self, group: TrialGroup, setup: Setup, screen: Screen, on_save: Callable[[], None]) -> None:
        shared = group.shared.config
        self._group, self._setup, self._screen, self._on_save = group, setup, screen, on_save
        self._periods = group.shared.plan.periods
        self._sampler = Sampler(setup.denoiser, setup.prompts, shared.sample, shared.data.resolution)
        self._is_solo = len(group.members) == 1
        say = screen.say if self._is_solo and not group.log_only else lambda line: None
        self._writers = [
            TrialWriter(member.prepared, trial, setup, self._sampler, say=say, log_only=group.log_only)
            for member, trial in zip(group.members, setup.trials, strict=True)
        ]

    def open(self, point: ResumePoint | None) -> None:
        """Continue every log where the checkpoint left it."""
        step = 0 if point is None else point.step
        for writer in self._writers:
            name = writer.trial.name
            length = 0 if point is None else point.trials[name]["metrics_bytes"]
            resumed_as = None if point is None else point.names[name]
            for note in writer.open(step, metrics_bytes=length, resumed_as=resumed_as):
                self._screen.say(note)
        if point is not None:
            self._screen.say(f"resuming after step {step} of {self._group.num_updates}")

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def begin(self, measured: Sequence[Measurement]) -> None:
        """What is seen before the first update: the base's own samples, the same for every trial, and its probes."""
        images = self._sampler.draw(self._writers[0].trial)
        for writer in self._writers:
            writer.sample(0, images)
        self.measured(0, measured)

    def update(self, step: int, result: StepResult, seconds: float, line: TrainingLine) -> None:
        """A row in the log of every trial that was updated, a `skip` event in the others', one line on the screen."""
        rows = [row for writer in self._writers if (row := writer.row(step, result, seconds)) is not None]
        if self._group.log_only:
            line.advance(step)
        elif self._is_solo and rows:
            line.step(rows[0])
        elif rows:
            losses = [row.loss for row in rows]
            line.show(step, f"{len(rows)} trials, loss {min(losses):.4f} .. {max(losses):.4f}, {seconds:.2f} s/update")
        for writer in self._live():
            if writer.trial.name in result.trials:
                writer.learning(step)
        for writer in self._writers:
            if writer.trial.name in result.skipped:
                writer.skip(step, result)
        self._tell_endings()

    def measured(self, step: int, measurements: Sequence[Measurement]) -> None:
        """The probes in each trial's log and the best LoRA so far; of several trials the best three on the screen."""
        by_trial = {measurement.trial.name: measurement for measurement in measurements}
        for writer in self._writers:
            if (measurement := by_trial.get(writer.trial.name)) is not None:
                writer.measured(step, measurement)
                if measurement.is_best:
                    with self._disk_faults(step, "best LoRA"):
                        writer.export_best(step)
            writer.diagnose(step)
        losses = {measurement.trial.name: measurement.held_out.relative for measurement in measurements}
        level = levels(filter(math.isfinite, losses.values()))
        leading = sorted((name for name in losses if losses[name] in level), key=lambda name: level[losses[name]])[:3]
        if step and leading and not (self._is_solo or self._group.log_only):
            listed = ", ".join(f"{name} {losses[name]:.4f}" for name in leading)
            self._screen.say(f"step {step}: held-out loss over the base's, smallest first: {listed}")
        self._tell_endings()

    def save(self, step: int, *, now: bool) -> None:
        """One checkpoint for all trials, where it is due or the group ends here."""
        if self._group.log_only or not (now or _due(step, self._periods.checkpoint)):
            return
        with self._disk_faults(step, "checkpoint", needed=now and step < self._group.num_updates):
            tensors: dict[str, Tensors] = {}
            trials: dict[str, Any] = {}
            for member, writer in zip(self._group.members, self._writers, strict=True):
                parts, plain = writer.trial.state()
                for part, named in parts.items():
                    tensors.setdefault(part, {}).update(named)
                trials[member.name] = {
                    **plain,
                    "identity": identity_of(member.prepared, self._setup.denoiser.runtime),
                    "metrics_bytes": writer.mark_checkpoint(step),
                    "parent": None if writer.trial.parent is None else writer.trial.parent.name,
                }
            state = {"step": step, "trials_per_pass": self._setup.trials_per_pass, "trials": trials}
            save_checkpoint(self._group.checkpoints, step, tensors, state)
            self._prune()
        self._on_save()

    def export_and_sample(self, step: int) -> None:
        """Exports and samples due after an update, of every trial that goes on; the last one's are left to `finish`."""
        for writer in self._live():
            if _due(step, self._periods.export):
                with self._disk_faults(step, "export"):
                    writer.export_numbered(step)
            if _due(step, self._periods.sample):
                with self._disk_faults(step, "samples"):
                    writer.sample(step)

    def finish(self, step: int) -> None:
        """The LoRA of every trial that came to the end."""
        live = [] if self._group.log_only else self._live()
        for writer in live if self._is_solo else self._screen.track(live, "exporting", len(live)):
            writer.conclude(step)

    def _live(self) -> list[TrialWriter]:
        return [writer for writer in self._writers if writer.trial.is_live]

    def _tell_endings(self) -> None:
        for writer in self._writers:
            if (ending := writer.ending()) is not None:
                others = "" if self._is_solo else "; the others go on"
                line = f"{writer.trial.name} {ending.status} after step {ending.step}: {ending.reason}{others}"
                self._screen.say(line)

    def _prune(self) -> None:
        """Remove all checkpoints but the newest; a disk that refuses does not stop the run."""
        try:
            prune(self._group.checkpoints, self._group.shared.config.checkpoint.keep_last)
        except OSError as error:
            self._screen.say(f"an old checkpoint could not be removed ({error}); training goes on")

    @contextmanager
    def _disk_faults(self, step: int, what: str, *, needed: bool = False) -> Iterator[None]:
        """What a full or failing disk refuses inside the block is said; the run goes on, or stops as the config says.

        Args:
            needed: the run ends here, so that going on without it is no choice.

        Raises:
            HostError: it stops; every trial that goes on has left a LoRA of this step.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in disk_space.DISK_FAULTS:
                raise
            writers = self._live() or self._writers
            for writer in writers:
                writer.refused(step, what, error.strerror)
            if not needed and self._group.shared.config.checkpoint.on_disk_full == "continue":
                self._screen.say(f"step {step}: the disk took no {what} ({error.strerror}); training goes on")
                return
            names = [writer.rescue(step) for writer in writers]
            fix = "free some space; the same command goes on from the newest checkpoint. The LoRA of this step is "
            where = str(error.filename or self._group.folder)
            stopped = f"stopped at step {step}: the disk took no {what}"
            raise HostError(Problem(stopped, where, error.strerror, fix + names[0])) from error


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
