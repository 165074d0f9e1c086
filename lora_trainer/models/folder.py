"""Look at a base checkpoint without loading it: what it is, whether it is whole, how large its layers are.

Never imports torch. Only diffusers folders of safetensors are taken; anything else is recognised and refused with what
to do about it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_trainer.errors import ModelError, Problem
from lora_trainer.storage.atomic_files import read_json

_CONVERT = (
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_single_file('{file}').save_pretrained('{folder}')\""
)
_KINDS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "conditioner.embedders.1.": "SDXL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "cond_stage_model.transformer.": "Stable Diffusion 1",
    "model.diffusion_model.": "Stable Diffusion",
}
"""Parts of tensor names that tell what a single file holds, the first found."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A diffusers folder that has all it needs."""

    path: Path
    family: str
    denoiser: str
    """The component whose layers get adapters."""
    models: tuple[str, ...]
    """Components with weights."""
    others: tuple[str, ...]
    """Components that are settings and vocabularies alone."""

    def weights(self, component: str) -> list[Path]:
        """The safetensors files of a component: the whole ones, or its shards."""
        return _find_weights(self.path / component)[1]

    def variant(self, component: str) -> str | None:
        """What diffusers and transformers must be told to find these files: `fp16` where there are no others."""
        return _find_weights(self.path / component)[0]

    def component_config(self, component: str) -> dict[str, Any]:
        """The component's JSON configuration."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_object(self.path / component / name)

    def prediction_type(self, asked: str = "auto") -> str:
        """What the denoiser predicts: as asked, else as the scheduler says; `flow` under a flow-matching one.

        Raises:
            ModelError: the scheduler has neither betas nor flow matching, or what is asked contradicts it.
        """
        settings = self.component_config("scheduler")
        named, where = str(settings.get("_class_name", "")), str(self.path / "scheduler")
        if named.startswith("FlowMatch"):
            if asked != "auto":
                what = f"prediction type `{asked}` does not fit the base's {named}"
                raise ModelError(Problem(what, where, fix="write model.prediction_type: auto"))
            return "flow"
        if "beta_schedule" not in settings and "trained_betas" not in settings:
            raise ModelError(Problem(f"the scheduler `{named}` has no noise schedule that is known", where))
        return str(settings.get("prediction_type", "epsilon")) if asked == "auto" else asked

    def denoiser_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every layer of the denoiser that has a matrix or kernel, by the layer's name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weights(self.denoiser):
            with safe_open(file, framework="np") as opened:
                for key in opened.keys():
                    shape = tuple(opened.get_slice(key).get_shape())
                    if key.endswith(".weight") and len(shape) >= 2:
                        shapes[key.removesuffix(".weight")] = shape
        return shapes

    def num_weights(self, component: str) -> int:
        """Numbers in all tensors of a component."""
        total = 0
        for file in self.weights(component):
            with safe_open(file, framework="np") as opened:
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())
        return total

    def digests(self) -> dict[str, str]:
        """Identity of each component's content, wherever the folder lies."""
        return {component: self._digest(component) for component in (*self.models, *self.others)}

    def _digest(self, component: str) -> str:
        place, digest = self.path / component, hashlib.sha256()
        weights = self.weights(component) if component in self.models else []
        for file in [*sorted(place.glob("*.json")), *sorted(place.glob("*.txt")), *weights]:
            with file.open("rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def locate_base(path: str, revision: str | None, components: Sequence[str]) -> Path:
    """The local folder of a base: the folder itself, or a Hub snapshot of these components at a fixed revision.

    Raises:
        ModelError: there is no such folder, or it cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        if revision is not None:
            raise ModelError(Problem("`model.revision` has no effect on a folder", path, fix="remove model.revision"))
        return folder
    if _HUB_ID.fullmatch(path) is None or Path(path).parent.exists():
        fix = "set model.path; relative paths start where you are"
        raise ModelError(Problem("the base folder does not exist", str(folder.absolute()), fix=fix))
    if revision is None:
        what = f"`{path}` is no folder here; as a Hub id it needs a fixed revision"
        why, fix = (
            "`main` may mean other weights tomorrow",
            "add model.revision: <commit>, as shown on the model's page",
        )
        raise ModelError(Problem(what, "model.revision", why, fix))
    return _fetch(path, revision, components)


def pipeline_name(folder: Path) -> str:
    """The class of pipeline that a diffusers folder is for.

    Raises:
        ModelError: it is something else, and what.
    """
    if not folder.is_dir() and not folder.is_file():
        raise ModelError(Problem("the base is neither a folder nor a file", str(folder.absolute())))
    if folder.is_file():
        raise ModelError(_single_file(folder))
    file = folder / "model_index.json"
    if not file.is_file():
        singles = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".ckpt", ".pt")]
        what, fix = "no diffusers base here: model_index.json is missing", "set model.path to a diffusers folder"
        raise ModelError(_single_file(singles[0]) if singles else Problem(what, str(folder.absolute()), fix=fix))
    return str(read_object(file).get("_class_name"))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file's content.

    Raises:
        ModelError: it cannot be read, or is no object.
    """
    try:
        content = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(Problem(f"not valid JSON: {error}", str(file), fix="fetch the base again")) from error
    if not isinstance(content, dict):
        raise ModelError(Problem("a JSON object is expected", str(file), fix="fetch the base again"))
    return content


def missing_parts(base: BaseFolder) -> list[Problem]:
    """Every component of a base that is not there, or whose files are damaged."""
    problems = [problem for component in base.models for problem in _check_component(base.path, component)]
    files = {component: f"{component}/{component}_config.json" for component in base.others}
    lacking = [component for component, file in files.items() if not (base.path / file).is_file()]
    return [*problems, *(incomplete(base.path, component, files[component]) for component in lacking)]


def _single_file(file: Path) -> Problem:
    """What a file is that was given as a base, and what to do about it."""
    if file.suffix != ".safetensors":
        what = "a pickled checkpoint can run any code when it is loaded, so it is never opened"
        return Problem(what, str(file), fix="use the .safetensors version of this base, as a diffusers folder")
    keys, fault = _header_keys(file)
    if fault is not None:
        return Problem("the file is no safetensors file", str(file), fault, "fetch it again")
    if any("lora_" in key for key in keys):
        fix = "set model.path to the base it was made for"
        return Problem("this is a LoRA, not a base checkpoint", str(file), fix=fix)
    kind = next((kind for part, kind in _KINDS.items() if any(part in key for key in keys)), "no base that is known")
    if not kind.startswith("Stable Diffusion") or kind.endswith("3"):
        fix = "use a diffusers folder of Stable Diffusion 1.x or 2.x"
        return Problem(f"the file holds {kind}, which is not supported", str(file), fix=fix)
    fix = f"convert it once to a folder:\n         {_CONVERT.format(file=file, folder=file.with_suffix(''))}"
    return Problem(f"a single-file base is not read yet (this one is {kind})", str(file), fix=fix)


def _check_component(folder: Path, component: str) -> list[Problem]:
    place = folder / component
    if not (place / "config.json").is_file():
        return [incomplete(folder, component, f"{component}/config.json")]
    read_object(place / "config.json")
    _, files = _find_weights(place)
    if not files:
        pickled = sorted([*place.glob("*.bin"), *place.glob("*.ckpt")])
        if pickled:
            what = f"the {component} has only pickled weights, which are never opened"
            fix = "use a base saved with safe_serialization=True (*.safetensors)"
            return [Problem(what, str(pickled[0]), fix=fix)]
        return [incomplete(folder, component, f"{component}/*.safetensors")]
    return [
        Problem(f"the {component}'s weights are damaged", str(file), fault, "fetch the file again")
        for file in files
        if (fault := _header_keys(file)[1]) is not None
    ]


def _find_weights(place: Path) -> tuple[str | None, list[Path]]:
    """Full-precision files where there are any, else the fp16 variant's with its name: one, or an index's shards."""
    for variant, ending in ((None, ""), ("fp16", ".fp16")):
        for stem in ("diffusion_pytorch_model", "model"):
            whole = place / f"{stem}{ending}.safetensors"
            if whole.is_file():
                return variant, [whole]
            index = place / f"{stem}.safetensors.index{ending}.json"
            if index.is_file():
                shards = read_object(index).get("weight_map")
                if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                    raise ModelError(Problem("the index of the shards is damaged", str(index), fix="fetch it again"))
                shards = sorted(set(shards.values()))
                return variant, [place / Path(shard).name for shard in shards]
    return None, []


def _header_keys(file: Path) -> tuple[list[str], str | None]:
    """Tensor names of a safetensors file, or why it is none."""
    try:
        start = file.open("rb").read(64)
        if start.startswith(b"version https://git-lfs"):
            return [], "it is a Git LFS pointer: run `git lfs pull`"
        if start.lstrip()[:1] == b"<":
            return [], "it is an HTML page"
        with safe_open(file, framework="np") as opened:
            return list(opened.keys()), None
    except (SafetensorError, OSError) as error:
        return [], str(error)


def incomplete(folder: Path, component: str, missing: str) -> Problem:
    """That a file of the base is missing."""
    what, fix = f"the base is incomplete: no {component}", "fetch the whole diffusers folder"
    return Problem(what, str(folder / missing), fix=fix)


def _fetch(repository: str, revision: str, components: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [f"{part}/*{ending}" for part in components for ending in (".json", ".txt", ".safetensors")]
    wanted, unwanted = ["model_index.json", *files], ["*.fp16.*", "*non_ema*"]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what, why = f"`{repository}` at `{revision}` cannot be fetched from the Hub", str(error).splitlines()[0]
        fix = "check the name and your network, or download it and give the folder"
        raise ModelError(Problem(what, "model.path", why, fix)) from error
    return Path(folder)
