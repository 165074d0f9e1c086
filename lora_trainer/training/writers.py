"""What training leaves: a checkpoint for all trials of a group; logs, samples, LoRAs and diagnosis of each trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_trainer.config import places
from lora_trainer.errors import Problem, SystemSetupError
from lora_trainer.evidence.diagnosis.diagnose import LiveDiagnosis
from lora_trainer.evidence.diagnosis.log import RunFacts
from lora_trainer.evidence.statistics.paired import levels
from lora_trainer.lora_files.files import Layout, base_facts, write_lora
from lora_trainer.planning.prepare import Prepared
from lora_trainer.storage import atomic_files, disk_space
from lora_trainer.storage.checkpoint import prune, save_checkpoint
from lora_trainer.tracking.console import MainConsole, TrainingLine, needless
from lora_trainer.tracking.metrics import MetricsLog, StepRow, damage_note
from lora_trainer.training.denoiser import Sampler, save_samples
from lora_trainer.training.gradient_check import checks_due
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.optimizer_step import StepResult
from lora_trainer.training.resume import ResumePoint
from lora_trainer.training.run_files import recipe_of, write_run_files
from lora_trainer.training.setup import Setup
from lora_trainer.training.trial import Tensors, Trial
from lora_trainer.training.validation import Measurement

if TYPE_CHECKING:
    from lora_trainer.tracking.tensorboard import TensorBoardLog

Emit = Callable[[str], None]
RESERVE_FILE = ".reserve"
"""Holds the room of the final LoRA files while the run lasts."""


class GroupWriter:
    """One `TrialWriter` per trial in the main process; without any, in the others, nothing is written.

    A solo run says all of its trial on the console, a group says what matters.

    Args:
        on_save: called after each checkpoint, in the main process.
    """

    def __init__(self, group: TrialGroup, setup: Setup, console: MainConsole, on_save: Callable[[], None]) -> None:
        shared, self._runtime = group.shared.config, setup.denoiser.runtime
        self._group, self._setup, self._console, self._on_save = group, setup, console, on_save
        self._periods = group.shared.plan.periods
        self._sampler = Sampler(setup.denoiser, setup.prompts, shared.sample, shared.data.resolution)
        self._keeps_best = shared.validation is not None and shared.validation.keep_best
        self._is_solo = len(group.members) == 1
        emit = console.print if self._is_solo and not group.log_only else lambda line: None
        self._writers = [
            TrialWriter(member.prepared, trial, self._sampler, emit, log_only=group.log_only)
            for member, trial in zip(group.members, setup.trials, strict=True)
            if self._runtime.launch.is_main
        ]

    def open(self, point: ResumePoint | None) -> None:
        """Continue every log where the checkpoint left it."""
        for writer in self._writers:
            for note in writer.open(point):
                self._console.print(note)
        if point is not None:
            self._console.print(f"resuming after step {point.step} of {self._group.num_steps}")

    def close(self) -> None:
        for writer in self._writers:
            with needless(f"the last lines of {writer.config.name}'s log", self._console.print):
                writer.close()

    def begin(self, measured: Sequence[Measurement]) -> None:
        """What is seen before the first update: the base's own samples, the same for every trial, and its probes."""
        if self._writers and self._group.shared.config.sample.prompts:
            self._console.print("step 0: drawing the base's own samples")
        images = self._sampler.draw(self._writers[0].trial) if self._writers else []
        for writer in self._writers:
            with self._disk_faults(0, "samples"):
                writer.sample(0, images)
        self.measured(0, measured)

    def update(self, step: int, result: StepResult, seconds: float, line: TrainingLine) -> None:
        """A row in the log of every trial that was updated, a `skip` event in the others', one line on the console."""
        rows = [row for writer in self._writers if (row := writer.row(step, result, seconds)) is not None]
        if self._group.log_only:
            line.advance(step)
        elif self._is_solo and rows:
            line.step(rows[0])
        elif rows:
            losses = [row.loss for row in rows]
            numbers = f"{len(rows)} trials, loss {min(losses):.4f}..{max(losses):.4f}"
            line.show(step, numbers, f"{numbers}, {seconds:.2f} s/update")
        for writer in self._writers:
            if writer.trial.name in result.trials:
                writer.learning(step)
            elif writer.trial.name in result.skipped:
                writer.skip(step, result)
        self._tell_endings()

    def measured(self, step: int, measurements: Sequence[Measurement]) -> None:
        """The probes in each trial's log and the best LoRA so far; of several trials the best three on the console."""
        by_trial = {measurement.trial.name: measurement for measurement in measurements}
        for writer in self._writers:
            if (measurement := by_trial.get(writer.trial.name)) is not None:
                writer.measured(step, measurement)
                if measurement.is_best and self._keeps_best:
                    with self._disk_faults(step, "best LoRA"):
                        writer.export(places.best_lora_file(writer.config), step)
            writer.diagnose(step)
        losses = {measurement.trial.name: measurement.held_out.relative for measurement in measurements}
        level = levels(filter(math.isfinite, losses.values()))
        leading = sorted((name for name in losses if losses[name] in level), key=lambda name: level[losses[name]])[:3]
        if step and leading and not (self._is_solo or self._group.log_only):
            listed = ", ".join(f"{name} {losses[name]:.4f}" for name in leading)
            self._console.print(f"step {step}: held-out loss over the base's, smallest first: {listed}")
        self._tell_endings()

    def save(self, step: int, *, now: bool) -> None:
        """One checkpoint for all trials, where it is due or the group ends here."""
        if not self._writers or self._group.log_only or not (now or _due(step, self._periods.checkpoint)):
            return
        with self._disk_faults(step, "checkpoint", needed=now and step < self._group.num_steps):
            tensors: dict[str, Tensors] = {}
            trials: dict[str, Any] = {}
            for writer in self._writers:
                trial = writer.trial
                parts, plain = trial.state()
                for part, named in parts.items():
                    tensors.setdefault(part, {}).update({f"{trial.name}/{key}": value for key, value in named.items()})
                writer.log.event("checkpoint", step)
                trials[trial.name] = {
                    **plain,
                    "identity": writer.prepared.identity() | self._runtime.facts(),
                    "metrics_bytes": writer.log.sync(),  # all of it on the disk
                    "parent": None if trial.parent is None else trial.parent.name,
                }
            state = {"step": step, "trials_per_pass": self._setup.trials_per_pass, "trials": trials}
            saved = save_checkpoint(self._group.checkpoints, step, tensors, state)
            self._console.print(f"step {step}: wrote {saved.parent.name}/{saved.name}")
            try:
                prune(self._group.checkpoints, self._group.shared.config.checkpoint.keep_last)
            except OSError as error:  # the new one is whole: no reason to stop
                self._console.print(f"an old checkpoint could not be removed ({error}); training goes on")
        self._on_save()

    def export_and_sample(self, step: int) -> None:
        """Exports and samples due after an update, of every trial that goes on; the last one's are left to `finish`."""
        for writer in self._live():
            if _due(step, self._periods.export):
                with self._disk_faults(step, "export"):
                    writer.export(file := places.lora_file(writer.config, step), step)
                    self._console.print(f"step {step}: wrote {file.name}")
            if _due(step, self._periods.sample):
                with self._disk_faults(step, "samples"):
                    writer.sample(step)

    def finish(self, step: int) -> None:
        """The LoRA of every trial that came to the end."""
        live = [] if self._group.log_only else self._live()
        for writer in live if self._is_solo else self._console.track(live, "exporting", len(live)):
            writer.conclude(step)
            with needless("the last samples", self._console.print):
                writer.sample(step)
            writer.diagnose(step)
            with needless("the grid of samples", self._console.print):
                writer.draw_grid()

    def _live(self) -> list[TrialWriter]:
        return [writer for writer in self._writers if writer.trial.is_live]

    def _tell_endings(self) -> None:
        others = "" if self._is_solo else "; the others go on"
        for writer in self._writers:
            if (line := writer.ending()) is not None:
                self._console.print(line + others)

    @contextmanager
    def _disk_faults(self, step: int, what: str, *, needed: bool = False) -> Iterator[None]:
        """What a full or failing disk refuses inside the block is said; the run goes on, or stops as the config says.

        Args:
            needed: the run ends here, so that going on without it is no choice.

        Raises:
            SystemSetupError: it stops; every trial that goes on has left a LoRA of this step.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in disk_space.DISK_FAULTS:
                raise
            writers = self._live() or self._writers
            for writer in writers:
                writer.log.event("disk", step, refused=what, reason=error.strerror)
            if not needed and self._group.shared.config.checkpoint.on_disk_full == "continue":
                self._console.print(f"step {step}: the disk took no {what} ({error.strerror}); training goes on")
                return
            names = [writer.rescue(step) for writer in writers]
            fix = "free some space; the same command goes on from the newest checkpoint. The LoRA of this step is "
            where = str(error.filename or self._group.folder)
            stopped = f"stopped at step {step}: the disk took no {what}"
            raise SystemSetupError(Problem(stopped, where, error.strerror, fix + names[0])) from error


class TrialWriter:
    """Writes what happens to a trial in its run directory.

    Args:
        emit: shows a line to a person.
        log_only: no exports, no diagnosis.
    """

    def __init__(self, prepared: Prepared, trial: Trial, sampler: Sampler, emit: Emit, *, log_only: bool) -> None:
        self.trial, self.prepared, self.config, self.run_dir = trial, prepared, prepared.config, prepared.run_dir
        self._denoiser, self._sampler, self._emit, self._log_only = sampler.denoiser, sampler, emit, log_only
        self._has_ended = not trial.is_live
        self._tensorboard: TensorBoardLog | None = None
        self._opened = ExitStack()

    def open(self, point: ResumePoint | None) -> list[str]:
        """Write what this run is, and continue its log where the checkpoint left it; what is wrong with the log."""
        name = self.trial.name
        step, size = (0, 0) if point is None else (point.step, point.trials[name]["metrics_bytes"])
        for folder in (self.run_dir, places.diffusers_lora_file(self.config).parent, self.run_dir / places.SAMPLES):
            atomic_files.clear_temporaries(folder)
        write_run_files(self.prepared, self._denoiser.runtime)
        if not self._log_only:
            room = self.prepared.plan.export_bytes(self.config.export.dtype)
            atomic_files.reserve_space(self.run_dir / RESERVE_FILE, room)
        file, notes = self.run_dir / places.METRICS_FILE, list[str]()
        if size > (file.stat().st_size if file.exists() else 0):
            notes.append(f"{file} is shorter than it was at step {step}: rows before it are missing")
        self.log = self._opened.enter_context(closing(MetricsLog(file, keep_bytes=size)))
        if self.config.tracking.tensorboard:
            with needless("TensorBoard's log", notes.append):
                from lora_trainer.tracking.tensorboard import TensorBoardLog

                events = TensorBoardLog(self.run_dir / "tensorboard", start_step=step, emit=self._emit)
                self._tensorboard = self._opened.enter_context(closing(events))
        if point is not None:
            self.log.event("resume", step)
            if (before := point.names[name]) != name:
                self._event("renamed", step, before=before)
        self._diagnosis = LiveDiagnosis(file, RunFacts.of(self.prepared.plan, self.config))
        if self._diagnosis.log.num_damaged:
            notes.append(damage_note(str(file), self._diagnosis.log.num_damaged))
        return notes

    def close(self) -> None:
        """Close what was opened, be it all or a part."""
        self._opened.close()

    def row(self, step: int, result: StepResult, seconds: float) -> StepRow | None:
        """Log a completed update; None where it was not applied to this trial."""
        update = result.trials.get(self.trial.name)
        if update is None:
            return None
        row = StepRow(
            step=step,
            trial=self.trial.name,
            epoch=step / self.prepared.plan.steps_per_epoch,
            base_loss=result.base_loss,
            draws=result.draws,
            images_per_s=result.num_samples / seconds,
            peak_memory_gib=self._denoiser.runtime.peak_memory_gib(),
            **asdict(update),
        )
        self.log.step(row)
        if self._tensorboard is not None:
            self._tensorboard.step(row)
        return row

    def learning(self, step: int) -> None:
        """In the first updates: whether every layer learns, or which do not and why."""
        for check in checks_due(self.trial.computed_by, self._denoiser.bank, self.config.seed, step):
            self._event("proof", step, **asdict(check))
            if check.missing:
                listed = "\n  ".join(f"{name}: {reason}" for name, reason in check.missing.items())
                count = f"{len(check.missing)} of {check.num_tensors} tensors do not"
                self._emit(f"step {step}: {check.claim}, but {count}:\n  {listed}")

    def skip(self, step: int, result: StepResult) -> None:
        """An update that was not applied: why, and on which files."""
        reason, files = result.skipped[self.trial.name], list(result.files)
        self._event("skip", step, reason=reason, files=files)
        self._emit(f"step {step} skipped: {reason} not finite ({', '.join(files)})")
        self.diagnose(step)

    def measured(self, step: int, measurement: Measurement) -> None:
        """A row per probe and the reductions of plateau schedules."""
        for probe, reading in measurement.readings.items():
            self._event("validation", step, probe=probe, **reading.as_event())
            if self._tensorboard is not None:
                self._tensorboard.scalars(step, {f"loss/{probe}": reading.relative})
        for group in measurement.reduced:
            self._event("plateau", step, group=group)
        held_out = measurement.held_out
        self._emit(
            f"step {step}: held-out loss {held_out.relative:.4f} of the base's "
            f"(+-{held_out.gain_se:.4f} over images){', the best so far' if measurement.is_best else ''}"
        )

    def diagnose(self, step: int) -> None:
        """What has become of the verdict. The LR is never touched."""
        with needless("the diagnosis", self._emit):
            for note in () if self._log_only else self._diagnosis.look():
                self._event(note.event, step, **note.content)
                for line in note.lines:
                    self._emit(line)

    def ending(self) -> str | None:
        """How the trial ended before its group, in words, logged and told once."""
        ending = None if self._has_ended else self.trial.ending
        if ending is None:
            return None
        self._has_ended = True
        self._event(ending.status, ending.step, reason=ending.reason)
        return f"{self.trial.name} {ending.status} after step {ending.step}: {ending.reason}"

    def export(self, file: Path, step: int, layout: Layout = "kohya") -> None:
        """A LoRA file: the average where one is kept, else the adapter itself."""
        family, dtype = self._denoiser.family, self.config.export.dtype
        recipe = recipe_of(self.config, self.prepared.plan, base_facts(family, self.prepared.prediction_type), step)
        lost = write_lora(file, self.trial.weights(), recipe, family, layout=layout, dtype=dtype)
        if lost and layout == "kohya":
            self._emit(f"{file.name}: {lost}")

    def rescue(self, step: int) -> str:
        """Write this step's LoRA into the space kept for it, where the disk takes no checkpoint; its name."""
        atomic_files.remove_file(self.run_dir / RESERVE_FILE)
        file = places.lora_file(self.config, step)
        self.export(file, step)
        return file.name

    def sample(self, step: int, images: Sequence[Image.Image] | None = None) -> None:
        """Images of the prompts with what would be exported now, or those given."""
        if images is None and self.config.sample.prompts:
            self._emit(f"step {step}: drawing {len(self.config.sample.prompts)} samples")
        drawn = self._sampler.draw(self.trial) if images is None else images
        if drawn:
            files = save_samples(self.run_dir / places.SAMPLES, step, drawn)
            self.log.event("sample", step, files=[file.name for file in files])
            if self._tensorboard is not None:
                self._tensorboard.images(step, files)

    def conclude(self, step: int) -> None:
        """The LoRA, with the space that was kept for it."""
        atomic_files.remove_file(self.run_dir / RESERVE_FILE)
        self.export(places.lora_file(self.config), step)
        self.export(places.diffusers_lora_file(self.config), step, "diffusers")

    def draw_grid(self) -> None:
        """All samples in one picture."""
        from lora_trainer.report.pictures import draw_grid

        if texts := [prompt.prompt for prompt in self.config.sample.prompts]:
            draw_grid(self.run_dir / places.SAMPLES, texts, self.run_dir / places.SAMPLES / places.GRID_FILE)

    def _event(self, name: str, step: int, **content: Any) -> None:
        """A line of this trial in its log."""
        self.log.event(name, step, trial=self.trial.name, **content)


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
