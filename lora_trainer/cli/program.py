"""The command line. Each command imports what it needs when it is called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_trainer import __version__
from lora_trainer.cli import schedule_commands
from lora_trainer.cli.options import ConfigFile, DryRun, Measure, Overrides, Plugins, Program, finite

app = typer.Typer(
    name="lora-trainer",
    help="Train LoRAs for Stable Diffusion, with learning-rate schedules that do what they say.",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(schedule_commands.app, name="schedules")


Layout = Literal["kohya", "diffusers"]
Dtype = Literal["fp32", "bf16", "fp16"]
Weights = Literal["exported", "raw"]
_UsageError: Any = typer.BadParameter.__base__  # click's, which some versions of typer bring along
_debug = False


@app.callback(invoke_without_command=True)
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of reported errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        print(f"lora_trainer {__version__}")
        raise typer.Exit


@app.command(
    epilog="Examples:  lora-trainer train -c configs/demo.yaml   |   "
    "lora-trainer train -c configs/demo.yaml optimizer.lr=3e-4 train.max_steps=600   |   "
    "accelerate launch train.py --config configs/demo.yaml"
)
def train(
    config: ConfigFile,
    overrides: Overrides,
    _plugins: Plugins = False,
    dry_run: DryRun = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run aside and start anew.")] = False,
    measure: Measure = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a reported error.")] = False,
) -> None:
    """Train a LoRA. The same command resumes a run that was stopped."""
    global _debug
    _debug = _debug or debug
    from lora_trainer.cli.train import train as run

    if measure and not dry_run:
        raise typer.BadParameter("--measure adds to what --dry-run prints: give both")
    run(config[0], overrides, dry_run=dry_run, fresh=fresh, measure=measure)


@app.command(
    epilog="Examples:  lora-trainer sweep -c configs/demo_sweep.yaml   |   "
    "lora-trainer sweep -c configs/demo_sweep.yaml --dry-run --measure   |   "
    "lora-trainer sweep -c configs/demo_sweep.yaml --status   |   "
    "lora-trainer sweep -c configs/demo_sweep.yaml --confirm"
)
def sweep(
    config: ConfigFile,
    overrides: Overrides,
    _plugins: Plugins = False,
    dry_run: DryRun = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run aside and start anew.")] = False,
    measure: Measure = False,
    status: Annotated[bool, typer.Option("--status", help="Say where it stands, also while it runs.")] = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="After a finished sweep: train its leaders again, on fresh seeds.")
    ] = False,
) -> None:
    """Train many trials on one frozen base. The same command resumes; trials and seeds may be added."""
    from lora_trainer.cli.train import show_status
    from lora_trainer.cli.train import sweep as run

    if confirm:
        from lora_trainer.cli.train import confirm as run
    if status:
        show_status(config[0], overrides, confirmation=confirm)
    else:
        run(config[0], overrides, dry_run=dry_run, fresh=fresh, measure=measure)


@app.command(
    epilog="Example:  lora-trainer sample --lora runs/demo/demo.safetensors --prompt 'a large pink zinnia' -n 4 -o out"
)
def sample(
    lora: Annotated[Path, typer.Option("--lora", help="LoRA file (.safetensors) in either layout.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Base folder; default: that of the run the LoRA lies in.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a Hub id given as --model.")] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="What to steer away from.")] = "",
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**62, help="Seed of the first image; others count up.")
    ] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, max=10_000, help="Images per prompt.")] = 1,
    num_inference_steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option("--guidance", min=1, callback=finite, help="Of the prompt.")] = 7.5,
    lora_scale: Annotated[
        float, typer.Option("--scale", callback=finite, help="Of the LoRA; 0: the base alone.")
    ] = 1.0,
    size: Annotated[
        int | None, typer.Option("--size", min=8, max=8192, help="Width and height, px; default: the base's.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")] = Path(),
) -> None:
    """Draw images with a LoRA, through stock diffusers."""
    from lora_trainer.cli.sample import SampleRequest
    from lora_trainer.cli.sample import sample as run

    request = SampleRequest(
        tuple(prompt), negative_prompt, seed, num_images, num_inference_steps, guidance_scale, lora_scale, size
    )
    run(lora, model, revision, request, output)


@app.command(
    epilog="Examples:  lora-trainer export runs/demo --step 200 -o early.safetensors   |   "
    "lora-trainer export runs/demo/demo.safetensors --layout diffusers -o for-diffusers.safetensors"
)
def export(
    source: Annotated[Path, typer.Argument(help="A run directory, or a LoRA file that lora-trainer wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="LoRA file to write.")],
    layout: Annotated[Layout, typer.Option("--layout", help="kohya: A1111, ComfyUI. diffusers: load_lora_weights.")] = (
        "kohya"
    ),
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the tensors in the file.")] = "fp16",
    step: Annotated[int | None, typer.Option("--step", help="Checkpoint of a run; default: the newest.")] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="exported: the moving average if the run keeps one; raw: without it.")
    ] = "exported",
    model: Annotated[
        str | None, typer.Option("--model", help="Base folder; default: that of the run the file lies in.")
    ] = None,
) -> None:
    """Write a LoRA file from a run's checkpoint, or a LoRA file in another layout or dtype."""
    from lora_trainer.tracking.console import LOADING, MainConsole

    MainConsole().aside(LOADING)
    from lora_trainer.cli.export import convert_file, export_run

    if source.is_dir():
        export_run(source, step, layout, dtype, weights, output)
    else:
        convert_file(source, layout, dtype, model, output)
    MainConsole().print(str(output))


@app.command(
    epilog="Example:  lora-trainer check -c configs/demo.yaml   |   lora-trainer check -c my.yaml --config-only"
    "   |   lora-trainer check -c my.yaml --show 8"
)
def check(
    config: ConfigFile,
    overrides: Overrides,
    _plugins: Plugins = False,
    config_only: Annotated[bool, typer.Option("--config-only", help="Leave base and images alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="List every file of the image folders as JSON.")] = False,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Write N crops and captions, as they are trained on.")
    ] = 0,
) -> None:
    """Check a configuration, its base and every image and caption. Never loads torch, trains nothing."""
    if as_json + config_only + (show > 0) > 1:
        raise typer.BadParameter("--config-only, --json and --show exclude each other")
    from lora_trainer.cli.plan import check as run
    from lora_trainer.cli.plan import check_files

    if as_json:
        check_files(config[0], overrides)
    else:
        run(config[0], overrides, config_only=config_only, show=show)


@app.command(
    epilog="Examples:  lora-trainer plan -c configs/demo.yaml   |   lora-trainer plan -c demo.yaml --processes 4"
)
def plan(
    config: ConfigFile,
    overrides: Overrides,
    _plugins: Plugins = False,
    processes: Annotated[int | None, typer.Option("--processes", min=1, max=10**5, help="As for this many.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a few updates, too; loads torch.")] = False,
) -> None:
    """Explain batch, accumulation, processes, repeats, epochs, updates, LR and memory of a run."""
    from lora_trainer.cli.plan import plan as run

    groups = run(config[0], overrides, processes)
    if measure:
        from lora_trainer.cli.train import measure_groups

        measure_groups(groups)


@app.command(
    "find-lr",
    epilog="Examples:  lora-trainer find-lr -c configs/demo.yaml 'validation={fraction: 0.2}'   |   "
    "lora-trainer find-lr -c demo.yaml --verify   |   lora-trainer find-lr -c demo.yaml --steps 200 --end-lr 0.1",
)
def find_lr(
    config: ConfigFile,
    overrides: Overrides,
    _plugins: Plugins = False,
    steps: Annotated[int, typer.Option("--steps", max=1_000_000, help="Updates of the ramp.")] = 100,
    start_lr: Annotated[
        float | None, typer.Option("--start-lr", help="First LR; default: the optimizer's default / 100.")
    ] = None,
    end_lr: Annotated[
        float | None, typer.Option("--end-lr", help="Last LR; default: the optimizer's default x 10,000, at most 1.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=2, max=10**6, help="Held-out images in each probe.")] = 4,
    verify: Annotated[
        bool, typer.Option("--verify", help="Confirm by short runs at five LRs from one state on the same batches.")
    ] = False,
    verify_steps: Annotated[
        int, typer.Option("--verify-steps", min=1, max=10**6, help="Updates of each of these.")
    ] = 50,
) -> None:
    """Find a base learning rate by a ramp on your data and base; the model and the run's folder stay untouched."""
    from lora_trainer.cli.find_lr import find_lr as run
    from lora_trainer.experiments.lr_finder.prepare import FinderOptions

    run(config[0], overrides, FinderOptions(steps, start_lr, end_lr, images, verify, verify_steps))


@app.command(
    epilog="Examples:  lora-trainer report runs/demo   |   lora-trainer report runs/cosine-* runs/rex-* -o compare.html"
    "   |   lora-trainer report runs/sweep --confirm runs/sweep-fresh"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories or sweeps; several are compared.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; default: RUN/report.html, of several report.html.")
    ] = None,
    min_effect: Annotated[
        float, typer.Option("--min-effect", min=0, callback=finite, help="Smallest share of the gain that matters.")
    ] = 0.01,
    confirm: Annotated[
        list[Path] | None,
        typer.Option("--confirm", help="Runs or a sweep of the leaders on fresh seeds; may be given several times."),
    ] = None,
) -> None:
    """Write one page about runs: verdict, curves, samples, settings. Also while they train (docs/verdicts.md)."""
    from lora_trainer.cli.report import report as run

    run(runs, output, min_effect, confirm or [])


@app.command(
    epilog="Examples:  lora-trainer diagnose runs/demo   |   lora-trainer diagnose runs/demo --json   |   "
    "lora-trainer diagnose runs/demo --check && lora-trainer sample ..."
)
def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory; the run may still be going on.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 7 where a fault was found.")] = False,
) -> None:
    """Say what a run's log shows: healthy, diverged, oscillating, overfit ..., with evidence and what to try.

    Exit codes: 0 judged, 7 a fault was found (only with --check), 2 the folder holds no run.
    """
    from lora_trainer.cli.report import diagnose_run

    raise typer.Exit(diagnose_run(run, as_json=as_json, check=check))


@app.command(epilog="Examples:  lora-trainer presets   |   lora-trainer presets prodigy")
def presets(name: Annotated[str | None, typer.Argument(help="Preset to show as settings.")] = None) -> None:
    """Starting points for learning rates and schedules, to paste into a config."""
    from lora_trainer.cli.plan import list_presets, show_preset
    from lora_trainer.tracking.console import MainConsole

    if name is None:
        MainConsole().table("Presets (lora-trainer presets NAME shows one)", list_presets())
    else:
        print(show_preset(name), end="")


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with its documented code."""
    from lora_trainer.cli.surroundings import settle
    from lora_trainer.errors import ConfigError, Problem, TrainerError
    from lora_trainer.storage.disk_space import faults_in_words

    settle()
    error: TrainerError
    try:
        with faults_in_words():
            sys.exit(app(arguments, standalone_mode=False) or 0)
    except _UsageError as wrong:
        if wrong.ctx is not None and wrong.message == wrong.ctx.get_help():  # asked for nothing, which asks for help
            wrong.show()
            sys.exit(wrong.exit_code)
        command = wrong.ctx.command_path if wrong.ctx is not None else "lora-trainer"
        error = ConfigError(Problem(wrong.format_message(), "command line", fix=f"{command} --help"))
    except TrainerError as fault:
        error = fault
    from lora_trainer.cli.session import report_error

    sys.exit(report_error(error, debug=_debug))
