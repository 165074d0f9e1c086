"""A base is looked at before it is loaded: what it is, what is missing, and that nothing pickled is ever opened."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from lora_trainer.errors import ExitCode, ModelError
from lora_trainer.models.folder import locate_base
from lora_trainer.models.registry import open_base, open_family


@pytest.fixture
def base(toy_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_base, tmp_path / "base"))


def refusal(folder: Path, family: str = "auto") -> str:
    with pytest.raises(ModelError) as caught:
        open_base(str(folder), family=family)
    assert caught.value.exit_code == ExitCode.MODEL
    return str(caught.value)


def test_a_whole_folder_is_taken(base: Path) -> None:
    found = open_base(str(base))
    assert found.family == "sd"
    assert found.denoiser_shapes()["conv_in"] == (16, 4, 3, 3)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(base: Path, component: str) -> None:
    shutil.rmtree(base / component)
    assert f"no {component}" in refusal(base)


def test_missing_weights_are_named(base: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    message = refusal(base)
    assert "unet" in message
    assert "vae" in message


def test_pickled_weights_are_refused_and_never_opened(base: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (canary,))  # type: ignore[return-value]

    payload = pickle.dumps(Hostile())
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(payload)
    assert "only pickled weights" in refusal(base)
    for name in ("model.ckpt", "model.pt", "model.safetensors"):
        single = tmp_path / name
        single.write_bytes(payload)
        refusal(single)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x00" * 100, "damaged"),
        (b"", "damaged"),
    ],
)
def test_what_is_no_safetensors_file(base: Path, content: bytes, said: str) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert said in refusal(base)


def test_a_truncated_file_is_damaged(base: Path) -> None:
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "the vae's weights are damaged" in refusal(base)


def test_a_single_file_gets_the_conversion_recipe(tmp_path: Path) -> None:
    single = tmp_path / "sd15.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, single)
    assert "from_single_file" in refusal(single)
    assert "from_single_file" in refusal(tmp_path)


def test_a_lora_in_the_bases_place_is_told(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, lora)
    assert "this is a LoRA" in refusal(lora)


def test_another_pipeline_is_named(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (base / "model_index.json").write_text(json.dumps(index))
    assert "`FluxPipeline` is not supported" in refusal(base)


def test_no_folder_and_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        locate_base(str(tmp_path / "absent" / "deep"), None, ["unet"])
    with pytest.raises(ModelError, match="needs a fixed revision"):
        locate_base("org/name", None, ["unet"])
    with pytest.raises(ModelError, match="cannot be fetched"):
        locate_base("org/name", "main", ["unet"])
    with pytest.raises(ModelError, match="no effect on a folder"):
        locate_base(str(tmp_path), "main", ["unet"])


def test_a_hub_base_of_the_fp16_variant_alone_is_fetched(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))

    def download(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in base.rglob("*.*"):
            path = file.relative_to(base).as_posix()
            if any(map(partial(fnmatch, path), allow_patterns)) and not any(
                map(partial(fnmatch, path), ignore_patterns)
            ):
                target = tmp_path / "snapshot" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = open_base("org/name", "main")
    assert [opened.variant(component) for component in ("unet", "vae")] == ["fp16", None]


def tokenizer_json(base: Path) -> dict[str, Any]:
    return json.loads((base / "tokenizer" / "tokenizer.json").read_bytes())


def in_two_files(base: Path) -> Path:
    """The tokenizer as Stable Diffusion 1.5 has it: vocab.json and merges.txt."""
    place = base / "tokenizer"
    (place / "vocab.json").write_text(json.dumps(tokenizer_json(base)["model"]["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "tokenizer.json").unlink()
    return base


def test_a_tokenizer_without_its_vocabulary_is_refused(base: Path) -> None:
    (base / "tokenizer" / "tokenizer.json").unlink()
    assert "no tokenizer vocabulary" in refusal(base)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_both_files_of_a_vocabulary_are_needed(base: Path, name: str) -> None:
    open_base(str(in_two_files(base)))
    (base / "tokenizer" / name).unlink()
    assert f"tokenizer/{name}: the base is incomplete: no tokenizer vocabulary" in refusal(base)


def test_a_vocabulary_of_another_size_is_refused_with_both(base: Path) -> None:
    whole = tokenizer_json(base)
    whole["model"]["vocab"].pop("a")
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    assert re.search(r"tokenizer .*\b513\b.* text encoder .*\b514\b", refusal(base))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 1}', '{"model": {"vocab": 3}}'])
def test_a_damaged_vocabulary_is_refused(base: Path, content: str) -> None:
    (base / "tokenizer" / "tokenizer.json").write_text(content)
    message = refusal(base)
    assert str(base / "tokenizer") in message


ADDITIONS: dict[str, tuple[str, Any]] = {
    "none": ("added_tokens.json", {}),
    "added_tokens.json": ("added_tokens.json", {"<cat>": 514}),
    "the decoder of tokenizer_config.json": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"514": {"content": "<dog>", "special": False}}},
    ),
    "special_tokens_map.json": (
        "special_tokens_map.json",
        {"pad_token": "[PAD]", "bos_token": {"content": "<|startoftext|>"}, "additional_special_tokens": ["<x>", "a"]},
    ),
    "more special tokens": ("tokenizer_config.json", {"extra_special_tokens": ["<y>", "<z>"], "pad_token": "!!"}),
}


@pytest.mark.parametrize("split", [False, True], ids=["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("addition", ADDITIONS)
def test_tokens_are_counted_as_the_tokenizer_counts_them(base: Path, addition: str, split: bool) -> None:
    """Also those that were added to the vocabulary, wherever that is written."""
    if split:
        in_two_files(base)
    name, content = ADDITIONS[addition]
    file = base / "tokenizer" / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | content))
    count = len(CLIPTokenizer.from_pretrained(base / "tokenizer"))
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": count}))
    weights = load_file(base / "text_encoder" / "model.safetensors")
    save_file(
        weights | {"embeddings.token_embedding.weight": torch.zeros(count, 16)},
        base / "text_encoder" / "model.safetensors",
    )
    assert open_base(str(base)).path == base


def test_the_shipped_base_is_whole() -> None:
    assert open_base(str(Path(__file__).parents[2] / "demo" / "base")).family == "sd"


def test_digests_follow_content_component_by_component(base: Path) -> None:
    before = open_base(str(base)).digests()
    moved = base.rename(base.with_name("elsewhere"))
    assert open_base(str(moved)).digests() == before
    config = moved / "vae" / "config.json"
    config.write_text(config.read_text().replace("64", "65"))
    after = open_base(str(moved)).digests()
    assert {name for name in before if before[name] != after[name]} == {"vae"}


def test_digests_are_remembered_while_nothing_tells_of_another_file(base: Path, tmp_path: Path) -> None:
    memory, unet = tmp_path / "memory" / "digests.json", base / "unet" / "diffusion_pytorch_model.safetensors"
    opened = open_base(str(base))

    def computed() -> set[str]:
        """Files whose digests are computed anew; the result is right in any case."""
        files: set[str] = set()

        def watch(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
            assert re.fullmatch(r"computing the digest of [\d.e-]+ GB, once", what)
            for item in items:
                files.add(item[0].parent.name)
                yield item

        assert opened.digests(memory, watch) == opened.digests()
        return files

    every = {"unet", "vae", "text_encoder"}
    assert computed() == every
    assert computed() == set()
    status = unet.stat()
    os.utime(unet, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert computed() == {"unet"}
    other = unet.with_name("other")
    other.write_bytes(unet.read_bytes()[:-1] + b"?")
    shutil.copystat(unet, other)
    other.rename(unet)  # equal in size and time
    assert computed() == {"unet"}
    for garbage in ("", "[]", "[" * 10_000, '{"x": 1}', '{"x": []}', json.dumps({str(unet): [1, 2, 3, "f" * 64]})):
        memory.write_text(garbage)
        assert computed() == every
        assert computed() == set()
    shutil.rmtree(memory.parent)
    memory.parent.write_text("a file is in the way")
    assert computed() == every


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", {"in_channels": 9}, "`in_channels` is 9"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "`addition_embed_type`"),
        ("unet/config.json", {"cross_attention_dim": 2048}, "`cross_attention_dim` is 2048"),
        ("vae/config.json", {"latent_channels": 16}, "`latent_channels` is 16"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 5}, "`model_max_length` is 5"),
    ],
)
def test_a_base_is_judged_by_what_its_parts_are(base: Path, file: str, change: dict[str, Any], said: str) -> None:
    config = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(config | change))
    assert said in refusal(base)


def test_damaged_settings_are_refused(base: Path) -> None:
    (base / "unet" / "config.json").write_text("[" * 100_000)
    assert "unet/config.json" in refusal(base)


def test_a_single_file_is_named_by_its_family(tmp_path: Path) -> None:
    for key, said in (("conditioner.embedders.1.model.x", "SDXL"), ("double_blocks.0.x", "FLUX")):
        save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
        assert said in refusal(tmp_path / "x.safetensors")


def test_a_lora_says_the_prediction_type_that_it_was_trained_on(base: Path) -> None:
    families = [open_family(open_base(str(base), prediction_type=asked)) for asked in ("auto", "v_prediction")]
    config = base / "unet" / "config.json"  # as wide as the UNet of Stable Diffusion 2
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1024}))
    assert [family.kohya_version for family in families] == ["sd_v2", "sd_v2_v"]
    assert [family.architecture for family in families] == [
        f"stable-diffusion-v2-{kind}/lora" for kind in ("512", "768-v")
    ]
