"""The checks of a run that need no tensor, shared by `check`, `plan`, `--dry-run` and `train`. Never imports torch."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from lora_trainer.config.optimizers import cannot_build, optimizer_row
from lora_trainer.config.places import CHECKPOINTS, cache_folder, run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.data.captions import Captioned, long_captions
from lora_trainer.data.folders import few_of_a_kind, some
from lora_trainer.errors import ConfigError, DataError, ModelError, Problem, SystemSetupError
from lora_trainer.models.family import Family
from lora_trainer.models.folder import BaseFolder
from lora_trainer.planning.run_plan import RunPlan
from lora_trainer.storage import disk_space

_SETTINGS = {
    "negative_prompt beside the prompt": "n no",
    "seed beside the prompt": "d seed",
    "data.resolution (samples are squares)": "w h ar",
    "sample.guidance_scale": "l g cfg",
    "sample.num_inference_steps": "s steps",
    "nothing in its place: there is no such setting": "am ss cn ctr rn fs v q niji iw stylize style chaos tile",
}
_OPTIONS = {option: setting for setting, options in _SETTINGS.items() for option in options.split()}
"""Options that other programs take from a prompt, with what stands for each here."""
_OPTION = re.compile(rf"(?<!\S)--({'|'.join(_OPTIONS)})(?!\S)")


def check_places(config: RunConfig) -> None:
    """The run's and the cache's folder take files, which is tried, and the run's does not lie among the images.

    Raises:
        ConfigError, SystemSetupError: they do not.
    """
    run_dir = run_directory(config)
    folders = [config.data.dir] if config.data.dir else [source.dir for source in config.data.sources or ()]
    for folder in folders:
        if folder and run_dir.resolve().is_relative_to(Path(folder).expanduser().resolve()):
            what = "the run directory would lie inside the image folder"
            raise ConfigError(Problem(what, str(run_dir.resolve()), fix="set another output_dir"))
    problems = [_unwritable(cache_folder(config), "data.cache_dir"), _unwritable(run_dir, "output_dir")]
    if found := [problem for problem in problems if problem is not None]:
        raise SystemSetupError(*{problem.where: problem for problem in found}.values())


def _unwritable(folder: Path, key: str) -> Problem | None:
    """Why a folder that is there, or is to be made, takes no files."""
    place, fix = folder.absolute(), f"set another {key}, or mend the folder"
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            return Problem("something that is no folder is in the way", str(place), fix=fix)
        with tempfile.TemporaryDirectory(prefix=".lora-trainer-", dir=place) as tried:
            Path(tried, "file").write_bytes(b"x")
    except OSError as error:
        return Problem("nothing can be written here", str(place), error.strerror, fix)
    return None


def check_packages(config: RunConfig) -> None:
    """What the config names and nobody installed.

    Raises:
        SystemSetupError: with the line that installs it.
    """
    row = optimizer_row(config.optimizer.type)
    package = row.build.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        raise SystemSetupError(cannot_build(row, f"No module named {package!r}"))


def check_room(config: RunConfig, plan: RunPlan, cache_bytes: int) -> None:
    """The checkpoints kept, one more while it is written, what is reserved for the LoRA files and the cache must fit.

    Args:
        cache_bytes: what the cache still lacks.
    """
    run_dir, cache, kept = run_directory(config), cache_folder(config), config.checkpoint.keep_last
    one = plan.checkpoint_bytes(with_average=config.train.ema_decay is not None)
    there = disk_space.size_of(run_dir / CHECKPOINTS)
    needed = max(one, (kept + 1) * one - there) + plan.export_bytes(config.export.dtype)
    purpose = f"{kept + 1} checkpoints of about {disk_space.mib(one)} and the LoRA files"
    latents = f"latents and prompts to encode, {disk_space.mib(cache_bytes)},"
    if disk_space.is_same_disk(run_dir, cache):
        disk_space.check_room(run_dir, needed + cache_bytes, f"{purpose} and the {latents}" if cache_bytes else purpose)
    else:
        disk_space.check_room(run_dir, needed, purpose)
        disk_space.check_room(cache, cache_bytes, f"the {latents}")


def check_prompts(config: RunConfig) -> None:
    """Options of other programs in a prompt, which would be drawn as words.

    Raises:
        ConfigError: with all of them.
    """
    problems = [
        Problem(
            f"`--{option}` is no option here: it would be drawn as words", where, fix=f"take it out; {_OPTIONS[option]}"
        )
        for where, text in _prompts(config)
        for option in dict.fromkeys(_OPTION.findall(text))
    ]
    if problems:
        raise ConfigError(*problems)


def _prompts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every text to draw or steer away from, with its key."""
    for index, prompt in enumerate(config.sample.prompts):
        yield f"sample.prompts[{index}]", prompt.prompt
        yield f"sample.prompts[{index}].negative_prompt", prompt.negative_prompt


def cut_texts(config: RunConfig, family: Family, images: Iterable[Captioned]) -> list[str]:
    """Notes on captions and prompts that are cut.

    Raises:
        DataError, ConfigError: captions or prompts are too long and the policy refuses them.
    """
    long, lost = long_captions(family, images)
    prompts, limit = list(_long_prompts(config, family)), family.max_tokens - 2
    if config.data.captions.too_long == "error":
        if long:
            raise DataError(*few_of_a_kind(long))
        if prompts:
            raise ConfigError(*prompts)
    return [
        f"{len(names)} {kind} are longer than the {limit} tokens that the text encoder reads and are cut: {some(names)}"
        for kind, names in (("captions", lost), ("sample prompts", [str(prompt.where) for prompt in prompts]))
        if names
    ]


def _long_prompts(config: RunConfig, family: Family) -> Iterator[Problem]:
    limit, fix = family.max_tokens, "shorten it, or set data.captions.too_long: cut"
    for where, text in _prompts(config):
        if (n := family.count_tokens(text)) > limit:
            yield Problem(f"the prompt has {n - 2} tokens, the text encoder reads {limit - 2}", where, fix=fix)


def prediction_type(config: RunConfig, base: BaseFolder, family: Family) -> str:
    """What the denoiser predicts.

    Raises:
        ModelError: the family cannot be trained on it.
        ConfigError: a loss weighting has no meaning on it.
    """
    chosen = base.prediction_type()
    if chosen not in family.prediction_types:
        what = f"prediction type `{chosen}` is not supported with the family {family.name}"
        fix = f"set model.prediction_type to one of {', '.join(family.prediction_types)}, if the base was trained so"
        raise ModelError(Problem(what, str(base.path / "scheduler"), fix=fix))
    if chosen == "epsilon" and base.component_config("scheduler").get("rescale_betas_zero_snr"):
        what, where = (
            "at zero terminal SNR there is no signal left, of which epsilon could tell",
            base.path / "scheduler",
        )
        fix = "write model.prediction_type: v_prediction, if it was trained so"
        raise ModelError(Problem(what, str(where), fix=fix))
    for name in config.objective.model_dump(exclude_none=True) if chosen == "flow" else ():
        what, why = f"`objective.{name}` weights the timesteps of a noise schedule of betas", "the base has none"
        raise ConfigError(Problem(what, str(base.path / "scheduler"), why, f"write objective.{name}: null"))
    return chosen


def check_inference_steps(config: RunConfig, base: BaseFolder, prediction: str) -> None:
    """The samples must not ask for more denoising steps than the base's scheduler has."""
    most = base.most_inference_steps
    if config.sample.prompts and prediction != "flow" and config.sample.num_inference_steps > most:
        what, fix = f"the base's scheduler has no more than {most} steps", f"write sample.num_inference_steps={most}"
        raise ConfigError(Problem(what, "sample.num_inference_steps", fix=f"{fix} or fewer"))


def check_resolution(config: RunConfig, family: Family) -> None:
    """Pixels must fill whole latents."""
    side, factor = config.data.resolution, family.latent_factor
    if side % factor:
        what = f"`data.resolution` {side} is no multiple of {factor}, the factor of the base's autoencoder"
        fix = f"write {side // factor * factor} or {side // factor * factor + factor}"
        raise ConfigError(Problem(what, "data.resolution", fix=fix))
