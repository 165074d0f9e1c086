"""Everything that a run leaves in its directory: log, samples, checkpoints, exports, pictures. Main process only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lora_trainer import atomicio, disk
from lora_trainer.adapters.bank import AdapterBank
from lora_trainer.checkpoint import Progress, prune, save_checkpoint
from lora_trainer.config.load import to_yaml
from lora_trainer.config.places import best_lora_file, diffusers_lora_file, lora_file, report_file
from lora_trainer.data.holdout import HELD_OUT
from lora_trainer.diagnosis.live import LiveDiagnosis
from lora_trainer.diagnosis.run_facts import RunFacts
from lora_trainer.errors import HostError, Problem
from lora_trainer.export.lora_files import base_facts, write_lora
from lora_trainer.export.recipe import Recipe, recipe_of
from lora_trainer.families.stable_diffusion import StableDiffusion
from lora_trainer.prepare import PLAN_FILE, VALIDATION_FILE, Prepared
from lora_trainer.probing import Measurement
from lora_trainer.proof import proofs_due
from lora_trainer.report.curves import draw_curves
from lora_trainer.report.page import write_report
from lora_trainer.report.sample_grid import draw_grid
from lora_trainer.runtime import Runtime, environment_report
from lora_trainer.sampling import Sampler, save_samples
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.tracking.metrics import MetricsLog, StepRow, damage_note
from lora_trainer.tracking.tensorboard import TensorBoardLog
from lora_trainer.trial import Ending, Trial
from lora_trainer.update import Updater, UpdateResult

RESERVE_FILE = ".reserve"
"""Holds the room of the final LoRA files while the run lasts."""


class Recorder:
    """Writes what happens; reads the state of trials and updater where it is asked to save it."""

    def __init__(
        self,
        prepared: Prepared,
        runtime: Runtime,
        family: StableDiffusion,
        bank: AdapterBank,
        trials: Sequence[Trial],
        updater: Updater,
        sampler: Sampler,
        screen: Screen,
    ) -> None:
        self._prepared, self._config, self._plan = prepared, prepared.config, prepared.plan
        self._runtime, self._family, self._bank, self._trials = runtime, family, bank, list(trials)
        self._updater, self._sampler, self._screen = updater, sampler, screen
        self._run_dir = prepared.run_dir

    @property
    def trial(self) -> Trial:
        """The one whose LoRA is exported and sampled."""
        return self._trials[0]

    def open(self, start: Progress, *, resuming: bool) -> list[str]:
        """Say what this run is, and continue its log where the checkpoint left it; what is wrong with the log."""
        for folder in (self._run_dir, diffusers_lora_file(self._config).parent, self._run_dir / "samples"):
            atomicio.clear_temporaries(folder)
        write_run_files(self._prepared, self._runtime)
        kept = self._plan.export_bytes(self._config.export.dtype)
        self._reserve = disk.Reserve(self._run_dir / RESERVE_FILE, kept)
        log, notes = self._run_dir / "metrics.jsonl", []
        if start.metrics_bytes > (log.stat().st_size if log.exists() else 0):
            notes.append(f"{log} is shorter than it was at step {start.step}: rows before it are missing")
        self._metrics = MetricsLog(log, keep_bytes=start.metrics_bytes)
        self._tensorboard = None
        if self._config.tracking.tensorboard:
            self._tensorboard = TensorBoardLog(
                self._run_dir / "tensorboard", start_step=start.step, say=self._screen.say
            )
        if resuming:
            self._metrics.event("resume", start.step)
            self._screen.say(f"resuming after step {start.step} of {self._plan.num_updates}")
        self._diagnosis = LiveDiagnosis(log, {t.name: RunFacts.of(self._plan, t.config) for t in self._trials})
        if self._diagnosis.num_damaged:
            notes.append(damage_note(str(log), self._diagnosis.num_damaged))
        return notes

    def close(self) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def update(self, progress: Progress, result: UpdateResult, seconds: float, line: TrainingLine) -> None:
        """One row per trial for a completed update."""
        for row in self.log(progress, result, seconds):
            line.step(row)

    def log(self, progress: Progress, result: UpdateResult, seconds: float) -> list[StepRow]:
        """Write the rows of this recorder's trials."""
        rows = []
        for name in [trial.name for trial in self._trials if trial.name in result.trials]:
            trial = result.trials[name]
            row = StepRow(
                step=progress.step,
                attempt=progress.attempt,
                trial=name,
                epoch=progress.attempt / self._plan.updates_per_epoch,
                loss=trial.loss,
                lrs=trial.lrs,
                step_size=trial.step_size,
                base_loss=result.base_loss,
                draws=result.draws,
                grad_norm=trial.grad_norm,
                clipped=trial.clipped,
                images_per_s=result.num_samples / seconds,
                peak_memory_gib=self._runtime.peak_memory_gib(),
            )
            self._metrics.step(row)
            if self._tensorboard is not None:
                self._tensorboard.step(row)
            rows.append(row)
        return rows

    def prove(self, progress: Progress) -> None:
        """In the first updates: that every layer of every trial learns, or which do not and why."""
        for trial in self._trials:
            for proof in proofs_due(trial.source, self._bank, self._config.seed, progress.step):
                self._metrics.event(
                    "proof",
                    progress.step,
                    trial=trial.name,
                    claim=proof.claim,
                    num_tensors=proof.num_tensors,
                    missing=proof.missing,
                )
                if proof.missing:
                    listed = "\n  ".join(f"{name}: {reason}" for name, reason in proof.missing.items())
                    count = f"{len(proof.missing)} of {proof.num_tensors} tensors do not"
                    self._screen.say(f"step {progress.step}: {proof.claim}, but {count}:\n  {listed}")

    def skip(self, progress: Progress, result: UpdateResult) -> None:
        """A skipped update: why, and on which files."""
        files = list(result.files)
        self._metrics.event("skip", progress.step, attempt=progress.attempt, reason=result.skipped, files=files)
        self._screen.say(f"attempt {progress.attempt} skipped: {result.skipped} not finite ({', '.join(files)})")
        self._diagnose(progress)

    def validation(self, progress: Progress, measured: Sequence[Measurement]) -> None:
        """A row per probe, the reductions of plateau schedules, and the best LoRA so far."""
        for each in measured:
            for probe, reading in each.readings.items():
                self._metrics.event(
                    "validation", progress.step, trial=each.trial.name, probe=probe, **reading.as_event()
                )
            for group in each.reduced:
                self._metrics.event("plateau", progress.step, trial=each.trial.name, group=group)
            held_out = each.readings[HELD_OUT]
            self._screen.say(
                f"step {progress.step}: held-out loss {held_out.relative:.4f} of the base's "
                f"(+-{held_out.gain_se:.4f} over images){', the best so far' if each.is_best else ''}"
            )
            if each.is_best and self._config.validation is not None and self._config.validation.keep_best:
                with self.disk_faults(progress, "best LoRA"):
                    self._write_kohya(best_lora_file(self._config), each.trial, progress)
        self._diagnose(progress)

    def _diagnose(self, progress: Progress) -> None:
        """Log and say what has become of the verdict. The LR is never touched."""
        for note in self._diagnosis.look():
            self._metrics.event(note.event, progress.step, trial=note.trial, **note.content)
            for line in note.lines:
                self._screen.say(line)

    def save(self, progress: Progress, *, now: bool) -> None:
        """A checkpoint, where one is due after this update or the run ends here."""
        if now or (progress.owed and _due(progress.step, self._plan.periods.checkpoint)):
            self._checkpoint(progress, needed=now and progress.step < self._plan.num_updates)

    def deliver(self, progress: Progress) -> None:
        """Exports and samples due after a completed update; the last one's are left to `finish`."""
        periods = self._plan.periods
        with self.disk_faults(progress, "export"):
            if _due(progress.step, periods.export):
                self.export(progress, numbered=True)
        with self.disk_faults(progress, "samples"):
            if _due(progress.step, periods.sample):
                self.sample(progress)

    def finish(self, progress: Progress) -> None:
        """The results, the curves and the report."""
        self.conclude(progress)
        draw_curves(self._run_dir / "metrics.jsonl", self._run_dir / "curves.png", self._config.name)
        write_report([self._run_dir], report_file(self._config))

    def conclude(self, progress: Progress) -> None:
        """The LoRA, with the space that was kept for it; the last samples and the last diagnosis."""
        self._reserve.release()
        self.export(progress, numbered=False)
        self.sample(progress)
        self._diagnose(progress)
        if self._config.sample.prompts:
            texts = [prompt.prompt for prompt in self._config.sample.prompts]
            draw_grid(self._run_dir / "samples", texts, self._run_dir / "samples" / "grid.png")

    def _checkpoint(self, progress: Progress, *, needed: bool) -> None:
        with self.disk_faults(progress, "checkpoint", needed=needed):
            states = [trial.state() for trial in self._trials]
            progress = replace(progress, metrics_bytes=self.mark_checkpoint(progress))
            plain = {trial.name: own for trial, (_, own) in zip(self._trials, states, strict=True)}
            folder, identity = self._run_dir / "checkpoints", self._prepared.identity()
            save_state(folder, progress, [parts for parts, _ in states], plain, identity, self._updater.state())
            self.prune_checkpoints(folder)

    def mark_checkpoint(self, progress: Progress) -> int:
        """Note in the log that a checkpoint follows; the log's length in bytes, all of it on the disk."""
        self._metrics.event("checkpoint", progress.step)
        return self._metrics.sync()

    def prune_checkpoints(self, folder: Path) -> None:
        """Remove all but the newest; a disk that refuses does not stop the run."""
        try:
            prune(folder, self._config.checkpoint.keep_last)
        except OSError as error:
            self._screen.say(f"an old checkpoint could not be removed ({error}); training goes on")

    def end(self, ending: Ending) -> None:
        """The trial ends before its group: no more rows follow."""
        self._metrics.event(ending.status, ending.step, trial=self.trial.name, reason=ending.reason)

    @contextmanager
    def disk_faults(self, progress: Progress, what: str, *, needed: bool = False) -> Iterator[None]:
        """What a full or failing disk refuses inside the block is said; the run goes on, or stops as the config says.

        Args:
            needed: the run ends here, so that going on without it is no choice.
        """
        try:
            yield
        except OSError as error:
            if not disk.is_disk_fault(error):
                raise
            self._metrics.event("disk", progress.step, refused=what, reason=error.strerror)
            if needed or self._config.checkpoint.on_disk_full == "stop":
                raise self._stop_for_disk(progress, what, error) from error
            self._screen.say(f"step {progress.step}: the disk took no {what} ({error.strerror}); training goes on")

    def _stop_for_disk(self, progress: Progress, what: str, error: OSError) -> HostError:
        self.rescue(progress)
        return HostError(
            Problem(
                f"stopped at step {progress.step}: the disk took no {what}",
                str(error.filename or self._run_dir),
                error.strerror,
                f"free some space; the same command goes on from the newest checkpoint. The LoRA of this step is "
                f"{lora_file(self._config, progress.step).name}",
            )
        )

    def rescue(self, progress: Progress) -> None:
        """Write this step's LoRA into the space kept for it: what is left where the disk takes no checkpoint."""
        self._reserve.release()
        self.export(progress, numbered=True)

    def export(self, progress: Progress, *, numbered: bool) -> None:
        """The LoRA files of the first trial: the average where one is kept, else the adapter itself."""
        trial = self.trial
        self._write_kohya(lora_file(self._config, progress.step if numbered else None), trial, progress)
        if not numbered:
            file, dtype = diffusers_lora_file(self._config), self._config.export.dtype
            write_lora(file, trial.weights(), self._recipe(progress), self._family, "diffusers", dtype)

    def _write_kohya(self, file: Path, trial: Trial, progress: Progress) -> None:
        write_lora(file, trial.weights(), self._recipe(progress), self._family, "kohya", self._config.export.dtype)

    def _recipe(self, progress: Progress) -> Recipe:
        facts = base_facts(self._family, self._prepared.prediction_type)
        return recipe_of(self._config, self._plan, facts, progress.step)

    def sample(self, progress: Progress) -> None:
        """Images of the prompts with what would be exported now."""
        self.keep_samples(progress, self.draw())

    def draw(self) -> list[Image.Image]:
        """An image per prompt, with the trial's exported weights."""
        if not self._config.sample.prompts:
            return []
        adapter = self.trial.adapter
        with self._bank.active([adapter]), self._bank.swapped(adapter, self.trial.weights()):
            return self._sampler.draw()

    def keep_samples(self, progress: Progress, images: Sequence[Image.Image]) -> None:
        if images:
            files = save_samples(self._run_dir / "samples", progress.step, images)
            self._metrics.event("sample", progress.step, files=[file.name for file in files])


def save_state(
    folder: Path,
    progress: Progress,
    trials: Sequence[Mapping[str, Mapping[str, Any]]],
    plain: Mapping[str, Any],
    identity: Mapping[str, Any],
    scaler: Mapping[str, Any],
) -> None:
    """One checkpoint of everything that a resume needs.

    Args:
        trials: tensors of each trial by part and name.
        plain: the trials' JSON values by their names.
    """
    parts: dict[str, dict[str, Any]] = {}
    for own in trials:
        for part, tensors in own.items():
            parts.setdefault(part, {}).update(tensors)
    save_checkpoint(folder, progress, parts, plain=plain, identity=identity, scaler=scaler)


def write_run_files(prepared: Prepared, runtime: Runtime) -> None:
    """config.yaml, plan.json, environment.json: what this run is, for people and for a rerun."""
    atomicio.write_file(prepared.run_dir / "config.yaml", to_yaml(prepared.config).encode())
    atomicio.write_json(prepared.run_dir / PLAN_FILE, prepared.plan.as_json() | {"identity": prepared.identity()})
    atomicio.write_json(prepared.run_dir / "environment.json", environment_report(runtime))
    if prepared.split.probes:
        sets = {"images_held_out": prepared.split.held_out, **prepared.split.probes}
        chosen = {name: [record.sha256 for record in records] for name, records in sets.items()}
        atomicio.write_json(prepared.run_dir / VALIDATION_FILE, chosen)


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
