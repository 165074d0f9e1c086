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
_PROMPT_FILE = re.compile(r"\S+\.(txt|toml|json|ya?ml)")
_OPTION = re.compile(rf"(?<!\S)--({'|'.join(_OPTIONS)})(?!\S)")


def check_places(config: RunConfig) -> None:
    """The run's and the cache's folder take files, which is tried, and lie apart from what is read.

    Raises:
        ConfigError, SystemSetupError: they do not.
    """
    run_dir, cache = run_directory(config), cache_folder(config)
    if mixed := [*_among_images(config, run_dir, "output_dir"), *_among_images(config, cache, "data.cache_dir")]:
        raise ConfigError(*mixed)
    problems = [_unwritable(cache, "data.cache_dir"), _unwritable(run_dir, "output_dir")]
    if found := [problem for problem in problems if problem is not None]:
        raise SystemSetupError(*{problem.where: problem for problem in found}.values())


def _among_images(config: RunConfig, written: Path, key: str) -> Iterator[Problem]:
    """Where a folder that is written would lie in one that is read, or around it, as `--fresh` moves a run aside."""
    data, probes, place = config.data, config.validation, written.resolve()
    images = [data.dir, *(source.dir for source in data.sources or ())]
    images += [probes.dir, probes.prior_dir] if probes is not None else []
    for folder in [Path(folder).expanduser().resolve() for folder in dict.fromkeys(images) if folder]:
        if place.is_relative_to(folder):
            what = f"{key} would lie inside the image folder {folder}"
            yield Problem(what, str(place), fix=f"set another {key}")
        elif folder.is_relative_to(place):
            yield Problem(
                "an image folder lies inside this one, which is written", str(place), fix=f"set another {key}"
            )
    if Path(config.model.path).expanduser().resolve().is_relative_to(place):
        yield Problem("the base lies inside this folder, which is written", str(place), fix=f"set another {key}")


def _unwritable(folder: Path, key: str) -> Problem | None:
    """Why a folder that is there, or is to be made, takes no files."""
    place, fix = folder.absolute(), f"set another {key}, or mend the folder"
    try:
        while not os.path.lexists(place):
            place = place.parent
        if place.is_symlink() and not place.exists():
            fix = "mount or make what it leads to, or choose another place"
            return Problem("a link leads nowhere", str(place), f"to {place.readlink()}", fix)
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
        disk_space.check_room(cache, cache_bytes, f"the {latents}", "data.cache_dir")


def check_prompts(prompts: Iterable[tuple[str, str]]) -> None:
    """Options of other programs and names of files in texts to draw, given with their places: they would be drawn.

    Raises:
        ConfigError: with all of them.
    """
    problems = []
    for where, text in prompts:
        for option in dict.fromkeys(_OPTION.findall(text)):
            what = f"`--{option}` is no option here: it would be drawn as words"
            problems.append(Problem(what, where, fix=f"take it out; {_OPTIONS[option]}"))
        if _PROMPT_FILE.fullmatch(text):
            what, fix = (
                f"no file of prompts is read: `{text}` would be drawn",
                "write the prompts themselves, as a list",
            )
            problems.append(Problem(what, where, fix=fix))
    if problems:
        raise ConfigError(*problems)


def prompts_of(config: RunConfig) -> Iterator[tuple[str, str]]:
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
    prompts, limit = long_prompts(prompts_of(config), family), family.max_tokens - 2
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


def long_prompts(prompts: Iterable[tuple[str, str]], family: Family) -> list[Problem]:
    """The texts to draw that are longer than the text encoder reads."""
    limit, fix = family.max_tokens, "shorten it, or set data.captions.too_long: cut"
    counts = [(where, family.count_tokens(text)) for where, text in prompts]
    what = "the prompt has {} tokens, the text encoder reads {}"
    return [Problem(what.format(n - 2, limit - 2), where, fix=fix) for where, n in counts if n > limit]


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
        what = "at zero terminal SNR there is no signal left, of which epsilon could tell"
        fix = "write model.prediction_type: v_prediction, if it was trained so"
        raise ModelError(Problem(what, str(base.path / "scheduler"), fix=fix))
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
