"""Everything that a run leaves in its directory: log, samples, checkpoints, exports, pictures. Main process only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_trainer import atomicio
from lora_trainer.adapters.bank import AdapterBank
from lora_trainer.checkpoint import Checkpoint, Progress, save_checkpoint
from lora_trainer.config.load import to_yaml
from lora_trainer.config.places import best_lora_file, diffusers_lora_file, lora_file
from lora_trainer.data.holdout import HELD_OUT
from lora_trainer.export.lora_files import base_facts, write_lora
from lora_trainer.export.recipe import Recipe, recipe_of
from lora_trainer.families.stable_diffusion import StableDiffusion
from lora_trainer.prepare import VALIDATION_FILE, Prepared
from lora_trainer.probing import Measurement
from lora_trainer.report.curves import draw_curves
from lora_trainer.report.sample_grid import draw_grid
from lora_trainer.runtime import Runtime, environment_report
from lora_trainer.sampling import Sampler, save_samples
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.tracking.metrics import MetricsLog, StepRow
from lora_trainer.tracking.tensorboard import TensorBoardLog
from lora_trainer.trial import Trial
from lora_trainer.update import Updater, UpdateResult


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

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Say what this run is, and continue its log where the checkpoint left it."""
        start = Progress() if checkpoint is None else checkpoint.progress
        write_run_files(self._prepared, self._runtime)
        self._metrics = MetricsLog(self._run_dir / "metrics.jsonl", keep_bytes=start.metrics_bytes)
        self._tensorboard = None
        if self._config.tracking.tensorboard:
            self._tensorboard = TensorBoardLog(self._run_dir / "tensorboard", start_step=start.step)
        if checkpoint is not None:
            self._metrics.event("resume", start.step)
            self._screen.say(f"resuming after step {start.step} of {self._plan.num_updates}")

    def close(self) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def update(self, progress: Progress, result: UpdateResult, seconds: float, line: TrainingLine) -> None:
        """One row per trial for a completed update."""
        for name, trial in result.trials.items():
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
            line.step(row)

    def skip(self, progress: Progress, result: UpdateResult) -> None:
        """A skipped update: why, and on which files."""
        files = list(result.files)
        self._metrics.event("skip", progress.step, attempt=progress.attempt, reason=result.skipped, files=files)
        self._screen.say(f"attempt {progress.attempt} skipped: {result.skipped} not finite ({', '.join(files)})")

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
                self._write_kohya(best_lora_file(self._config), each.trial, progress)

    def after_update(self, progress: Progress) -> None:
        """What is due after a completed update; the last one's is left to `finish`."""
        periods = self._plan.periods
        if _due(progress.step, periods.export):
            self.export(progress, numbered=True)
        if _due(progress.step, periods.checkpoint):
            self.checkpoint(progress)
        if _due(progress.step, periods.sample):
            self.sample(progress)

    def finish(self, progress: Progress) -> None:
        """The LoRA, the last samples and the pictures."""
        self.export(progress, numbered=False)
        self.sample(progress)
        draw_curves(self._run_dir / "metrics.jsonl", self._run_dir / "curves.png", self._config.name)
        if self._config.sample.prompts:
            texts = [prompt.prompt for prompt in self._config.sample.prompts]
            draw_grid(self._run_dir / "samples", texts, self._run_dir / "samples" / "grid.png")

    def checkpoint(self, progress: Progress) -> None:
        """All that a resume needs, with the length of the log at this moment."""
        parts: dict[str, dict[str, Any]] = {}
        plain = {}
        for trial in self._trials:
            own, plain[trial.name] = trial.state()
            for part, tensors in own.items():
                parts.setdefault(part, {}).update(tensors)
        self._metrics.event("checkpoint", progress.step)
        save_checkpoint(
            self._run_dir / "checkpoints",
            Progress(progress.step, progress.attempt, self._metrics.sync()),
            parts,
            plain=plain,
            identity=self._prepared.identity(),
            scaler=self._updater.state(),
            keep_last=self._config.checkpoint.keep_last,
        )

    def export(self, progress: Progress, *, numbered: bool) -> None:
        """The LoRA files of the first trial: the average where one is kept, else the adapter itself."""
        trial = self._trials[0]
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
        if not self._config.sample.prompts:
            return
        trial = self._trials[0]
        with self._bank.active([trial.adapter]), self._bank.swapped(trial.adapter, trial.weights()):
            images = self._sampler.draw()
        files = save_samples(self._run_dir / "samples", progress.step, images)
        self._metrics.event("sample", progress.step, files=[file.name for file in files])


def write_run_files(prepared: Prepared, runtime: Runtime) -> None:
    """config.yaml, plan.json, environment.json: what this run is, for people and for a rerun."""
    atomicio.write_file(prepared.run_dir / "config.yaml", to_yaml(prepared.config).encode())
    atomicio.write_json(prepared.run_dir / "plan.json", prepared.plan.as_json() | {"identity": prepared.identity()})
    atomicio.write_json(prepared.run_dir / "environment.json", environment_report(runtime))
    if prepared.split.probes:
        sets = {"images_held_out": prepared.split.held_out, **prepared.split.probes}
        chosen = {name: [record.sha256 for record in records] for name, records in sets.items()}
        atomicio.write_json(prepared.run_dir / VALIDATION_FILE, chosen)


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
