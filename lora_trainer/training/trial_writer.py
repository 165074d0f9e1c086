"""What one trial leaves in its run directory: log, samples, exports, diagnosis. Main process only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from PIL import Image

from lora_trainer import __version__
from lora_trainer.config.load import to_yaml
from lora_trainer.config.places import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    GRID_FILE,
    METRICS_FILE,
    PLAN_FILE,
    SAMPLES,
    VALIDATION_FILE,
    best_lora_file,
    diffusers_lora_file,
    lora_file,
)
from lora_trainer.config.schema import RunConfig
from lora_trainer.evidence.diagnosis.diagnose import LiveDiagnosis
from lora_trainer.evidence.diagnosis.log import RunFacts
from lora_trainer.lora_files.files import BaseFacts, DataFacts, Layout, LoopFacts, Recipe, base_facts, write_lora
from lora_trainer.planning.prepare import Prepared
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.report.pictures import draw_grid
from lora_trainer.runtime.runtime import Runtime, environment_report
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import MetricsLog, StepRow, damage_note
from lora_trainer.tracking.tensorboard import TensorBoardLog
from lora_trainer.training.gradient_check import checks_due
from lora_trainer.training.optimizer_step import StepResult
from lora_trainer.training.sampling import Sampler, save_samples
from lora_trainer.training.setup import Setup
from lora_trainer.training.trial import Ending, Trial
from lora_trainer.training.validation import Measurement

RESERVE_FILE = ".reserve"
"""Holds the room of the final LoRA files while the run lasts."""


class TrialWriter:
    """Writes what happens to a trial.

    Args:
        say: for what a person should hear of it.
        log_only: no exports, no diagnosis.
    """

    def __init__(
        self,
        prepared: Prepared,
        trial: Trial,
        setup: Setup,
        sampler: Sampler,
        *,
        say: Callable[[str], None],
        log_only: bool,
    ) -> None:
        self.trial, self.run_dir, self._say, self._log_only = trial, prepared.run_dir, say, log_only
        self._prepared, self._config, self._plan = prepared, prepared.config, prepared.plan
        self._setup, self._sampler = setup, sampler
        self._runtime: Runtime = setup.denoiser.runtime
        self._has_ended = not trial.is_live
        self._opened = ExitStack()

    def open(self, step: int, *, metrics_bytes: int, resumed_as: str | None) -> list[str]:
        """Write what this run is, and continue its log where the checkpoint left it; what is wrong with the log.

        Args:
            resumed_as: the name that the trial had in the checkpoint; None where it begins.
        """
        for folder in (self.run_dir, diffusers_lora_file(self._config).parent, self.run_dir / SAMPLES):
            atomic_files.clear_temporaries(folder)
        write_run_files(self._prepared, self._runtime)
        if not self._log_only:
            size = self._plan.export_bytes(self._config.export.dtype)
            atomic_files.reserve_space(self.run_dir / RESERVE_FILE, size)
        log, notes = self.run_dir / METRICS_FILE, []
        if metrics_bytes > (log.stat().st_size if log.exists() else 0):
            notes.append(f"{log} is shorter than it was at step {step}: rows before it are missing")
        self._metrics = self._opened.enter_context(closing(MetricsLog(log, keep_bytes=metrics_bytes)))
        self._tensorboard = None
        if self._config.tracking.tensorboard:
            events = TensorBoardLog(self.run_dir / "tensorboard", start_step=step, say=self._say)
            self._tensorboard = self._opened.enter_context(closing(events))
        if resumed_as is not None:
            self._metrics.event("resume", step)
        if resumed_as not in (None, self.trial.name):
            self._metrics.event("renamed", step, trial=self.trial.name, before=resumed_as)
        self._diagnosis = LiveDiagnosis(log, RunFacts.of(self._plan, self._config))
        if self._diagnosis.log.num_damaged:
            notes.append(damage_note(str(log), self._diagnosis.log.num_damaged))
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
            epoch=step / self._plan.updates_per_epoch,
            loss=update.loss,
            lrs=update.lrs,
            step_size=update.step_size,
            base_loss=result.base_loss,
            draws=result.draws,
            grad_norm=update.grad_norm,
            clipped=update.clipped,
            images_per_s=result.num_samples / seconds,
            peak_memory_gib=self._runtime.peak_memory_gib(),
        )
        self._metrics.step(row)
        if self._tensorboard is not None:
            self._tensorboard.step(row)
        return row

    def learning(self, step: int) -> None:
        """In the first updates: whether every layer learns, or which do not and why."""
        bank, seed = self._setup.denoiser.bank, self._config.seed
        for check in checks_due(self.trial.computed_by, bank, seed, step):
            result = {"claim": check.claim, "num_tensors": check.num_tensors, "missing": check.missing}
            self._metrics.event("proof", step, trial=self.trial.name, **result)
            if check.missing:
                listed = "\n  ".join(f"{name}: {reason}" for name, reason in check.missing.items())
                count = f"{len(check.missing)} of {check.num_tensors} tensors do not"
                self._say(f"step {step}: {check.claim}, but {count}:\n  {listed}")

    def skip(self, step: int, result: StepResult) -> None:
        """An update that was not applied: why, and on which files."""
        reason, files = result.skipped[self.trial.name], list(result.files)
        self._metrics.event("skip", step, trial=self.trial.name, reason=reason, files=files)
        self._say(f"step {step} skipped: {reason} not finite ({', '.join(files)})")
        self.diagnose(step)

    def measured(self, step: int, measurement: Measurement) -> None:
        """A row per probe and the reductions of plateau schedules."""
        for probe, reading in measurement.readings.items():
            self._metrics.event("validation", step, trial=self.trial.name, probe=probe, **reading.as_event())
        for group in measurement.reduced:
            self._metrics.event("plateau", step, trial=self.trial.name, group=group)
        held_out = measurement.held_out
        self._say(
            f"step {step}: held-out loss {held_out.relative:.4f} of the base's "
            f"(+-{held_out.gain_se:.4f} over images){', the best so far' if measurement.is_best else ''}"
        )

    def diagnose(self, step: int) -> None:
        """What has become of the verdict. The LR is never touched."""
        for note in () if self._log_only else self._diagnosis.look():
            self._metrics.event(note.event, step, trial=self.trial.name, **note.content)
            for line in note.lines:
                self._say(line)

    def ending(self) -> Ending | None:
        """How the trial ended before its group, logged and told once."""
        ending = None if self._has_ended else self.trial.ending
        if ending is not None:
            self._has_ended = True
            self._metrics.event(ending.status, ending.step, trial=self.trial.name, reason=ending.reason)
        return ending

    def refused(self, step: int, what: str, reason: str | None) -> None:
        """That the disk took something not."""
        self._metrics.event("disk", step, refused=what, reason=reason)

    def mark_checkpoint(self, step: int) -> int:
        """Note in the log that a checkpoint follows; the log's length in bytes, all of it on the disk."""
        self._metrics.event("checkpoint", step)
        return self._metrics.sync()

    def export_best(self, step: int) -> None:
        if self._config.validation is not None and self._config.validation.keep_best:
            self._export(best_lora_file(self._config).name, step)

    def export_numbered(self, step: int) -> None:
        self._export(lora_file(self._config, step).name, step)

    def rescue(self, step: int) -> str:
        """Write this step's LoRA into the space kept for it, where the disk takes no checkpoint; its name."""
        atomic_files.remove_file(self.run_dir / RESERVE_FILE)
        self.export_numbered(step)
        return lora_file(self._config, step).name

    def sample(self, step: int, images: Sequence[Image.Image] | None = None) -> None:
        """Images of the prompts with what would be exported now, or those given."""
        drawn = self._sampler.draw(self.trial) if images is None else images
        if drawn:
            files = save_samples(self.run_dir / SAMPLES, step, drawn)
            self._metrics.event("sample", step, files=[file.name for file in files])

    def conclude(self, step: int) -> None:
        """The LoRA, with the space that was kept for it; the last samples and the last diagnosis."""
        atomic_files.remove_file(self.run_dir / RESERVE_FILE)
        self._export(lora_file(self._config).name, step)
        self._export(str(diffusers_lora_file(self._config).relative_to(self.run_dir)), step, layout="diffusers")
        self.sample(step)
        self.diagnose(step)
        if self._config.sample.prompts:
            texts = [prompt.prompt for prompt in self._config.sample.prompts]
            draw_grid(self.run_dir / SAMPLES, texts, self.run_dir / SAMPLES / GRID_FILE)

    def _export(self, name: str, step: int, layout: Layout = "kohya") -> None:
        """A LoRA file: the average where one is kept, else the adapter itself."""
        family = self._setup.denoiser.family
        recipe = recipe_of(self._config, self._plan, base_facts(family, self._prepared.prediction_type), step)
        dtype = self._config.export.dtype
        write_lora(self.run_dir / name, self.trial.weights(), recipe, family, layout=layout, dtype=dtype)


def write_run_files(prepared: Prepared, runtime: Runtime) -> None:
    """config.yaml, plan.json, environment.json: what this run is, for people and for a rerun."""
    atomic_files.write_file(prepared.run_dir / CONFIG_FILE, to_yaml(prepared.config).encode())
    atomic_files.write_json(prepared.run_dir / PLAN_FILE, prepared.plan.as_json() | {"identity": prepared.identity()})
    atomic_files.write_json(prepared.run_dir / ENVIRONMENT_FILE, environment_report(runtime))
    if prepared.split.probes:
        sets = {"images_held_out": prepared.split.held_out, **prepared.split.probes}
        chosen = {name: [record.sha256 for record in records] for name, records in sets.items()}
        atomic_files.write_json(prepared.run_dir / VALIDATION_FILE, chosen)


def recipe_of(config: RunConfig, plan: RunPlan, base: BaseFacts, step: int) -> Recipe:
    """The recipe of a run after `step` updates."""
    train, data = config.train, config.data
    return Recipe(
        version=__version__,
        name=config.name,
        step=step,
        seed=config.seed,
        base=base,
        adapter=config.adapter,
        objective=config.objective,
        optimizer=config.optimizer,
        lr_scheduler=config.lr_scheduler,
        loop=LoopFacts(
            num_images=plan.num_images,
            num_samples=plan.num_samples,
            num_updates=plan.num_updates,
            updates_per_epoch=plan.updates_per_epoch,
            warmup_updates=plan.lr_groups[0].warmup_updates,
            batch_size=plan.batch_size,
            accumulation=plan.accumulation,
            global_batch=plan.global_batch,
            max_grad_norm=train.max_grad_norm,
            ema_decay=train.ema_decay,
            gradient_checkpointing=train.gradient_checkpointing,
        ),
        data=DataFacts(
            resolution=data.resolution,
            random_crop=data.crop == "random",
            flip=data.flip,
            caption_dropout=data.captions.dropout,
        ),
    )
