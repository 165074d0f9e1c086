"""Look at a base checkpoint without loading it: what it is, whether it is whole, how large its layers are.

Never imports torch. Only diffusers folders of safetensors are taken; anything else is recognised and refused with what
to do about it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_trainer.errors import ModelError, Problem

_CONVERT = (
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_single_file('{file}').save_pretrained('{folder}')\""
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FAMILY_OF_PIPELINE = {"StableDiffusionPipeline": "sd"}
_WEIGHT_COMPONENTS = {"sd": ("unet", "vae", "text_encoder")}
_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_CONFIG_FILES = {"sd": ("tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json")}


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A diffusers folder that has all it needs."""

    path: Path
    family: str

    def weights(self, component: str) -> list[Path]:
        """The safetensors files of a component: the whole ones, or its shards."""
        return _find_weights(self.path / component)[1]

    def variant(self, component: str) -> str | None:
        """What diffusers and transformers must be told to find these files: `fp16` where there are no others."""
        return _find_weights(self.path / component)[0]

    def component_config(self, component: str) -> dict[str, Any]:
        """The component's JSON configuration."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return json.loads((self.path / component / name).read_text())

    def denoiser_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every layer of the denoiser that has a matrix or kernel, by the layer's name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weights("unet"):
            with safe_open(file, framework="np") as opened:
                for key in opened.keys():
                    shape = tuple(opened.get_slice(key).get_shape())
                    if key.endswith(".weight") and len(shape) >= 2:
                        shapes[key.removesuffix(".weight")] = shape
        return shapes

    def digests(self) -> dict[str, str]:
        """Identity of each component's content, wherever the folder lies."""
        return {component: self._digest(component) for component in _COMPONENTS}

    def _digest(self, component: str) -> str:
        place, digest = self.path / component, hashlib.sha256()
        weights = self.weights(component) if component in _WEIGHT_COMPONENTS[self.family] else []
        for file in [*sorted(place.glob("*.json")), *sorted(place.glob("*.txt")), *weights]:
            with file.open("rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def locate_base(path: str, revision: str | None) -> Path:
    """The local folder of a base: the folder itself, or a Hub snapshot at a fixed revision.

    Raises:
        ModelError: there is no such folder, or it cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        if revision is not None:
            raise ModelError(Problem("`model.revision` has no effect on a folder", path, fix="remove model.revision"))
        return folder
    if _HUB_ID.fullmatch(path) is None:
        raise ModelError(
            Problem(
                "the base folder does not exist",
                str(folder.absolute()),
                fix="set model.path; relative paths start where you are",
            )
        )
    if revision is None:
        raise ModelError(
            Problem(
                f"`{path}` is no folder here; as a Hub id it needs a fixed revision",
                "model.revision",
                "`main` may mean other weights tomorrow",
                "add model.revision: <commit>, as shown on the model's page",
            )
        )
    return _fetch(path, revision)


def inspect_base(folder: Path, family: str = "auto") -> BaseFolder:
    """Check that the folder is a whole diffusers checkpoint of a known family, and which.

    Raises:
        ModelError: it is something else (it says what), or parts are missing or damaged (it names each).
    """
    if folder.is_file():
        raise ModelError(_single_file(folder))
    index = _read_index(folder)
    pipeline = index.get("_class_name")
    found = _FAMILY_OF_PIPELINE.get(str(pipeline))
    if found is None:
        raise ModelError(
            Problem(
                f"a `{pipeline}` is not supported",
                str(folder / "model_index.json"),
                fix="use a Stable Diffusion 1.x or 2.x base",
            )
        )
    if family not in ("auto", found):
        raise ModelError(Problem(f"model.family is {family}, but the base is {found}", str(folder), fix="write auto"))
    problems = [p for component in _WEIGHT_COMPONENTS[found] for p in _check_component(folder, component)]
    problems += [
        _incomplete(folder, file.partition("/")[0], file)
        for file in _CONFIG_FILES[found]
        if not (folder / file).is_file()
    ]
    problems += _check_vocabulary(folder)
    if problems:
        raise ModelError(*problems)
    return BaseFolder(folder, found)


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        singles = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".ckpt", ".pt")]
        if singles:
            raise ModelError(_single_file(singles[0]))
        raise ModelError(
            Problem(
                "no diffusers base here: model_index.json is missing",
                str(folder.absolute()),
                fix="set model.path to a diffusers folder",
            )
        )
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(Problem(f"not valid JSON: {error}", str(file))) from error
    return index if isinstance(index, dict) else {}


def _single_file(file: Path) -> Problem:
    if file.suffix != ".safetensors":
        return Problem(
            "a pickled checkpoint can run any code when it is loaded, so it is never opened",
            str(file),
            fix="use the .safetensors version of this base, as a diffusers folder",
        )
    keys, fault = _header_keys(file)
    if fault is not None:
        return Problem("the file is no safetensors file", str(file), fault, "fetch it again")
    if any("lora_" in key for key in keys):
        return Problem(
            "this is a LoRA, not a base checkpoint", str(file), fix="set model.path to the base it was made for"
        )
    recipe = _CONVERT.format(file=file, folder=file.with_suffix(""))
    return Problem(
        "a single-file base is not read yet", str(file), fix=f"convert it once to a folder:\n         {recipe}"
    )


def _check_component(folder: Path, component: str) -> list[Problem]:
    place = folder / component
    if not (place / "config.json").is_file():
        return [_incomplete(folder, component, f"{component}/config.json")]
    _, files = _find_weights(place)
    if not files:
        pickled = sorted([*place.glob("*.bin"), *place.glob("*.ckpt")])
        if pickled:
            return [
                Problem(
                    f"the {component} has only pickled weights, which are never opened",
                    str(pickled[0]),
                    fix="use a base saved with safe_serialization=True (*.safetensors)",
                )
            ]
        return [_incomplete(folder, component, f"{component}/*.safetensors")]
    return [
        Problem(f"the {component}'s weights are damaged", str(file), fault, "fetch the file again")
        for file in files
        if (fault := _header_keys(file)[1]) is not None
    ]


def _check_vocabulary(folder: Path) -> list[Problem]:
    """The tokenizer has its vocabulary, and the text encoder an embedding for each token and no more.

    transformers makes an empty vocabulary where the files are missing, and every caption means the same.
    """
    place, config = folder / "tokenizer", folder / "text_encoder" / "config.json"
    if not (place / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (place / name).is_file()]
        if missing:
            files = "tokenizer/tokenizer.json" if len(missing) == 2 else f"tokenizer/{missing[0]}"
            return [_incomplete(folder, "tokenizer vocabulary", files)]
    try:
        known = len(_tokens(place))
        embedded = _read_json(config).get("vocab_size", known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "the tokenizer cannot be compared with the text encoder's config.json"
        return [Problem(what, str(place), f"{type(error).__name__}: {error}", "fetch both folders again")]
    if known == embedded:
        return []
    return [
        Problem(
            f"the tokenizer has {known} tokens, the text encoder {embedded}",
            str(place),
            "they do not belong together: captions would be read as other words",
            "fetch tokenizer and text_encoder of one base again",
        )
    ]


def _tokens(place: Path) -> set[str]:
    """Every token of a CLIP tokenizer's folder, with those added to the vocabulary."""
    whole, said = _read_json(place / "tokenizer.json"), _read_json(place / "tokenizer_config.json")
    special = _read_json(place / "special_tokens_map.json")
    vocabulary = whole["model"]["vocab"] if whole else _read_json(place / "vocab.json")
    added = [
        *("<|startoftext|>", "<|endoftext|>"),
        *whole.get("added_tokens", ()),
        *_read_json(place / "added_tokens.json"),
        *said.get("added_tokens_decoder", {}).values(),
        *(own[name] for own in (said, special) for name in _NAMED_TOKENS if own.get(name) is not None),
        *(token for own in (said, special) for key in _MORE_TOKENS for token in own.get(key) or ()),
    ]
    return {*vocabulary, *(token if isinstance(token, str) else token["content"] for token in added)}


def _read_json(file: Path) -> Any:
    """The file's content; an empty object where there is none."""
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _find_weights(place: Path) -> tuple[str | None, list[Path]]:
    """Full-precision files where there are any, else the fp16 variant's with its name: one, or an index's shards."""
    for variant, ending in ((None, ""), ("fp16", ".fp16")):
        for stem in ("diffusion_pytorch_model", "model"):
            whole = place / f"{stem}{ending}.safetensors"
            if whole.is_file():
                return variant, [whole]
            index = place / f"{stem}.safetensors.index{ending}.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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


def _incomplete(folder: Path, component: str, missing: str) -> Problem:
    return Problem(
        f"the base is incomplete: no {component}", str(folder / missing), fix="fetch the whole diffusers folder"
    )


def _fetch(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = [f"{part}/*{ending}" for part in _COMPONENTS for ending in (".json", ".txt", ".safetensors")]
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["model_index.json", *wanted],
                ignore_patterns=["*.fp16.*", "*non_ema*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            Problem(
                f"`{repository}` at `{revision}` cannot be fetched from the Hub",
                "model.path",
                str(error).splitlines()[0],
                "check the name and your network, or download it and give the folder",
            )
        ) from error
