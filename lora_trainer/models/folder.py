"""Look at a base checkpoint without loading it: what it is, whether it is whole, how large its layers are.

Never imports torch. Only diffusers folders of safetensors are taken; anything else is recognised and refused with what
to do about it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from lora_trainer.errors import ModelError, Problem, SystemSetupError, remedy_of_absence
from lora_trainer.storage.atomic_files import read_json, read_regular, write_json
from lora_trainer.storage.records import read_record, shape, shape_fault
from lora_trainer.strict_model import Count

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
_CHUNK_BYTES = 2**24
_EXPONENTS = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF << 52),
}
_MARKED = dict[str, tuple[int, int, int, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what is done, how many) -> the same items


_SHAPES = {
    "vae": shape({"block_out_channels": Annotated[list[int], Field(min_length=1, max_length=8)]}),
    "text_encoder": shape({"max_position_embeddings": Count}),
}
"""What is counted on in the components' configurations."""


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
    asked_prediction: str = "auto"
    """`model.prediction_type`."""

    def weights(self, component: str) -> list[Path]:
        """The safetensors files of a component: the whole ones, or its shards."""
        return _find_weights(self.path / component)[1]

    def variant(self, component: str) -> str | None:
        """What diffusers and transformers must be told to find these files: `fp16` where there are no others."""
        return _find_weights(self.path / component)[0]

    def component_config(self, component: str) -> dict[str, Any]:
        """The component's JSON configuration."""
        file = self.path / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        content = read_object(file)
        if component in _SHAPES and (fault := shape_fault(content, _SHAPES[component])) is not None:
            raise ModelError(Problem("not what a base has here", str(file), fault, "fetch the base again"))
        return content

    def prediction_type(self) -> str:
        """What the denoiser predicts: as asked, else as the scheduler says; `flow` under a flow-matching one.

        Raises:
            ModelError: what is asked contradicts the scheduler.
        """
        settings = self.component_config("scheduler")
        named = str(settings.get("_class_name", ""))
        if not named.startswith("FlowMatch"):
            said = settings.get("prediction_type", "epsilon")
            return str(said) if self.asked_prediction == "auto" else self.asked_prediction
        if self.asked_prediction != "auto":
            what = f"prediction type `{self.asked_prediction}` does not fit the base's {named}"
            raise ModelError(Problem(what, str(self.path / "scheduler"), fix="write model.prediction_type: auto"))
        return "flow"

    @property
    def most_inference_steps(self) -> int:
        """The most steps that a sample can take along the scheduler's betas."""
        settings = self.component_config("scheduler")
        return int(settings.get("num_train_timesteps", 1000)) - int(settings.get("steps_offset", 0))

    def tensor_shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a component, by its name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weights(component):
            with safe_open(file, framework="np") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        return shapes

    def denoiser_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every layer of the denoiser that has a matrix or kernel, by the layer's name."""
        shapes = self.tensor_shapes(self.denoiser).items()
        return {key.removesuffix(".weight"): shape for key, shape in shapes if key.endswith(".weight") and shape[1:]}

    def num_weights(self, component: str) -> int:
        """Numbers in all tensors of a component."""
        return sum(math.prod(shape) for shape in self.tensor_shapes(component).values())

    def digests(self, memory: Path | None = None, progress: Progress = lambda items, *_: items) -> dict[str, str]:
        """Identity of each component's content, wherever the folder lies.

        Args:
            memory: remembers the digests of weights by path, size, time and inode of their files.
            progress: shows how far it is, where they are computed.
        """
        weights = {component: self.weights(component) for component in self.models}
        known = _weight_digests([file for files in weights.values() for file in files], memory, progress)
        digests = {}
        for component in (*self.models, *self.others):
            place, digest = self.path / component, hashlib.sha256()
            for file in [*sorted(place.glob("*.json")), *sorted(place.glob("*.txt")), *weights.get(component, ())]:
                content = known.get(file) or hashlib.sha256(_small(file)).hexdigest()
                digest.update(file.name.encode() + bytes.fromhex(content))
            digests[component] = digest.hexdigest()
        return digests


def _small(file: Path) -> bytes:
    """The content of a file of settings or words."""
    try:
        return read_regular(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise ModelError(Problem("the base holds what cannot be read", str(file), why, "take it out")) from error


def _weight_digests(files: Sequence[Path], memory: Path | None, progress: Progress) -> dict[Path, str]:
    """sha256 of each file: as remembered, where nothing tells that it is another file now, else computed."""
    try:
        remembered = read_record(memory, _MARKED) if memory is not None else {}
    except (OSError, ValueError):
        remembered = {}
    marks = {file: _mark(file) for file in files}
    anew = [file for file, mark in marks.items() if remembered.get(str(file.resolve()), ())[:-1] != mark]
    num_bytes, hashes = sum(marks[file][0] for file in anew), {file: hashlib.sha256() for file in anew}
    if anew:
        what = f"computing the digest of {num_bytes / 1e9:.2g} GB, once"
        for file, chunk in progress(_chunks(anew), what, math.ceil(num_bytes / _CHUNK_BYTES)):
            hashes[file].update(chunk)
        if faults := [(file, key) for file in anew if (key := _not_finite(file)) is not None]:
            what = "the weight `{}` holds NaN or infinite values"
            raise ModelError(*(Problem(what.format(key), str(f), fix="fetch the base again") for f, key in faults))
        same = {file: digest.hexdigest() for file, digest in hashes.items() if _mark(file) == marks[file]}
        remembered |= {str(file.resolve()): [*marks[file], digest] for file, digest in same.items()}
        if memory is not None:
            with suppress(OSError, SystemSetupError):  # it is computed again next time
                write_json(memory, remembered)
    return {file: hashes[file].hexdigest() if file in hashes else remembered[str(file.resolve())][-1] for file in files}


def _not_finite(file: Path) -> str | None:
    """The first tensor of a safetensors file that holds a number with all bits of the exponent set."""
    content = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, entry in json.loads(content[8:start].tobytes()).items():
        bits, exponent = _EXPONENTS.get(entry.get("dtype"), (np.uint8, None))
        first, end = entry.get("data_offsets", (0, 0))
        numbers = content[start + first : start + end].view(bits)
        parts = range(0, len(numbers), _CHUNK_BYTES)
        if exponent and any((numbers[at : at + _CHUNK_BYTES] & exponent == exponent).any() for at in parts):
            return str(name)
    return None


def _mark(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _chunks(files: Sequence[Path]) -> Iterator[tuple[Path, bytes]]:
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                yield file, chunk


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
        fix = remedy_of_absence(path, "model.path")
        raise ModelError(Problem("the base folder does not exist", str(folder.absolute()), fix=fix))
    if revision is None:
        what = f"`{path}` is no folder here; as a Hub id it needs a fixed revision"
        why, fix = (
            "`main` may mean other weights tomorrow",
            "set model.path to the base's folder, or add model.revision: <commit>, as shown on the Hub's page",
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
    except (OSError, ValueError) as error:
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
    _, files, shards = _find_weights(place)
    if not files:
        pickled = sorted([*place.glob("*.bin"), *place.glob("*.ckpt")])
        if pickled:
            what = f"the {component} has only pickled weights, which are never opened"
            fix = "use a base saved with safe_serialization=True (*.safetensors)"
            return [Problem(what, str(pickled[0]), fix=fix)]
        problem = incomplete(folder, component, f"{component}/{_stem(place)}.safetensors")
        strays = ", ".join(sorted(file.name for file in place.glob("*.safetensors*"))[:3])
        why = f"there are {strays}; shards without their index and variants other than fp16 are not read"
        return [replace(problem, why=why) if strays else problem]
    if lacking := [file for file in files if not file.is_file()]:
        return [incomplete(folder, f"shard of the {component}", f"{component}/{file.name}") for file in lacking]
    headers = {file: _header_keys(file) for file in files}
    if faults := [(file, fault) for file, (_, fault) in headers.items() if fault is not None]:
        what, fix = f"the {component}'s weights are damaged", "fetch the file again"
        return [Problem(what, str(file), fault, fix) for file, fault in faults]
    held = {(key, file.name) for file, (keys, _) in headers.items() for key in keys}
    if absent := sorted(shards.items() - held):
        what = f"{len(absent)} tensors of the {component} are not in the shards that its index names"
        return [Problem(what, str(place), f"such as `{absent[0][0]}`", "fetch index and shards again")]
    return []


def _stem(place: Path) -> str:
    """What the weights' files of a component are called: diffusers' models and transformers' differ."""
    return "diffusion_pytorch_model" if "_class_name" in read_object(place / "config.json") else "model"


def _find_weights(place: Path) -> tuple[str | None, list[Path], dict[str, str]]:
    """Full-precision files where there are any, else the fp16 variant's with its name: one, or shards by tensor.

    Where there are both the same counts as in the library that loads them: diffusers' shards, transformers' whole file.
    """
    stem = _stem(place)
    for variant, ending in ((None, ""), ("fp16", ".fp16")):
        whole, index = place / f"{stem}{ending}.safetensors", place / f"{stem}.safetensors.index{ending}.json"
        if index.is_file() and not (stem == "model" and whole.is_file()):
            content = read_object(index)
            shards = content.get("weight_map") if isinstance(content.get("metadata"), dict) else None
            if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
                raise ModelError(Problem("the index of the shards is damaged", str(index), fix="fetch it again"))
            return variant, [place / name for name in sorted(set(shards.values()))], shards
        if whole.is_file():
            return variant, [whole], {}
    return None, [], {}


def _header_keys(file: Path) -> tuple[list[str], str | None]:
    """Tensor names of a safetensors file, or why it is none."""
    try:
        with file.open("rb") as raw:
            start = raw.read(64)
        if start.startswith(b"version https://git-lfs"):
            return [], "it is a Git LFS pointer: run `git lfs pull`"
        if start.lstrip()[:1] == b"<":
            return [], "it is an HTML page"
        with safe_open(file, framework="np") as opened:
            return list(opened.keys()), None
    except (SafetensorError, OSError, MemoryError) as error:
        return [], str(error)


def incomplete(folder: Path, component: str, missing: str) -> Problem:
    """That a file of the base is missing."""
    what, fix = f"the base is incomplete: no {component}", "fetch the whole diffusers folder"
    return Problem(what, str(folder / missing), fix=fix)


def _fetch(repository: str, revision: str, components: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [f"{part}/*{ending}" for part in components for ending in (".json", ".txt", ".safetensors")]
    wanted, unwanted = ["model_index.json", *files], ["*non_ema*", "*.fp16.*"]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        if any(not [*config.parent.glob("*.safetensors")] for config in Path(folder).glob("*/config.json")):
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted[:1]
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what, why = f"`{repository}` at `{revision}` cannot be fetched from the Hub", str(error).splitlines()[0]
        fix = "check the name and your network, or download it and give the folder"
        raise ModelError(Problem(what, "model.path", why, fix)) from error
    return Path(folder)
