"""Bases, whole, damaged or mislabelled: `check` and a one-step `train` say the same of each."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from toys import build_toy_base, tiny_unet

from lora_trainer.cli.plan import check
from lora_trainer.cli.sample import SampleRequest, sample
from lora_trainer.cli.train import train
from lora_trainer.diffusion.noise_paths import BetaPath
from lora_trainer.errors import ConfigError, ExitCode, ModelError
from lora_trainer.models.noise_scheduler import BETA_SCHEDULERS
from lora_trainer.models.registry import open_base, open_family

Edit = Callable[[Path], object]
UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"
SCHEDULER, TOKENIZER, VOCABULARY = "scheduler/scheduler_config.json", "tokenizer", "tokenizer/tokenizer.json"
NORM = "final_layer_norm.bias"
SHORT = ("train.max_steps=1", "train.batch_size=1", "lr_scheduler={type: constant}", "sample={}", "data.resolution=32")


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_base(tmp_path_factory.mktemp("small"), unet=tiny_unet)


def settings(file: str, **changes: Any) -> Edit:
    def edit(base: Path) -> None:
        content = json.loads((base / file).read_text()) | changes
        (base / file).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))

    return edit


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(base: Path) -> None:
        content = json.loads((base / VOCABULARY).read_text())
        change(content)
        (base / VOCABULARY).write_text(json.dumps(content))

    return edit


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(base: Path) -> None:
        tensors = load_file(base / f"{file}.safetensors")
        change(tensors)
        save_file(tensors, base / f"{file}.safetensors", {"format": "pt"})

    return edit


def saved(then: Edit = lambda base: None, **options: Any) -> Edit:
    """The base saved otherwise by diffusers, in fp16, and then changed."""

    def edit(base: Path) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16)
        shutil.rmtree(base)
        pipeline.save_pretrained(base, **options)
        then(base)

    return edit


def renamed(file: str, name: str) -> Edit:
    return lambda base: (base / file).rename((base / file).with_name(name))


def removed(pattern: str) -> Edit:
    return lambda base: [file.unlink() for file in base.glob(pattern)]


def twice(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.cat([tensors[key]] * 2)})


SHARDED = {"max_shard_size": "10KB"}
BASES: dict[str, tuple[Edit, str | None]] = {
    "whole": (lambda base: None, None),
    "a PNDM scheduler": (settings(SCHEDULER, _class_name="PNDMScheduler"), None),
    "betas of its own": (settings(SCHEDULER, trained_betas=[0.01] * 1000, beta_schedule="absent"), None),
    "v, zero SNR": (settings(SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True), None),
    "fp16 in shards": (saved(variant="fp16", **SHARDED), None),
    "shards beside an old whole file": (
        saved(lambda base: (base / f"{UNET}.safetensors").write_bytes(b"old"), **SHARDED),
        None,
    ),
    "names of an older CLIP": (
        weights(TEXT, lambda tensors: [tensors.update({f"text_model.{k}": tensors.pop(k)}) for k in [*tensors]]),
        None,
    ),
    "flow matching": (
        settings(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "has no noise schedule of betas",
    ),
    "flow sigmas": (
        settings(SCHEDULER, _class_name="UniPCMultistepScheduler", use_flow_sigmas=True),
        "no noise schedule",
    ),
    "no betas": (settings(SCHEDULER, _class_name="EDMEulerScheduler"), "`EDMEulerScheduler` has no noise schedule"),
    "an unknown beta schedule": (settings(SCHEDULER, beta_schedule="laplace"), "`beta_schedule` is laplace"),
    "beta text": (settings(SCHEDULER, beta_start="0.1", beta_end=None), "`beta_start` is 0.1"),
    "too few betas": (settings(SCHEDULER, trained_betas=[0.1]), "`trained_betas`"),
    "no timesteps": (settings(SCHEDULER, num_train_timesteps=0), "`num_train_timesteps` is 0"),
    "predicts the sample": (settings(SCHEDULER, prediction_type="sample"), "`sample` is not supported"),
    "a missing shard": (saved(removed("unet/*-00002-of-*"), **SHARDED), "no shard of the unet"),
    "shards without an index": (saved(removed("unet/*.index.json"), **SHARDED), "shards without their index"),
    "another variant": (renamed(f"{UNET}.safetensors", "diffusion_pytorch_model.bf16.safetensors"), "variants other"),
    "the wrong library's name": (renamed(f"{UNET}.safetensors", "model.safetensors"), "there are model.safetensors"),
    "tokenizers refuses it": (vocabulary(lambda c: c["model"].update(type="Nope")), "tokenizer cannot be used"),
    "an id too large": (vocabulary(lambda c: c["model"]["vocab"].update(a=99_999)), "ids of the tokenizer's 514"),
    "another first token": (settings("tokenizer/tokenizer_config.json", bos_token="a"), "`bos_token_id`"),
    "no padding": (settings("tokenizer/tokenizer_config.json", pad_token=None), "tokenizer cannot be used"),
    "one token more": (weights(TEXT, twice("embeddings.token_embedding.weight")), "weights do not fit its config"),
    "a wide UNet": (weights(UNET, twice("time_embedding.linear_1.weight")), "`time_embedding.linear_1` is 64 x 8"),
    "a missing weight": (weights(UNET, lambda tensors: tensors.pop("conv_in.weight")), "`conv_in` is missing"),
    "a NaN in fp32": (
        weights(UNET, lambda tensors: tensors["conv_out.bias"].fill_(torch.nan)),
        "`conv_out.bias` holds NaN",
    ),
    "an infinity in fp16": (
        weights(TEXT, lambda tensors: tensors.update({NORM: tensors[NORM].half().fill_(torch.inf)})),
        f"`{NORM}` holds NaN or inf",
    ),
    "a NaN in bf16": (
        weights(TEXT, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16().fill_(torch.nan)})),
        f"`{NORM}` holds NaN or inf",
    ),
    "an inpainting UNet": (settings("unet/config.json", in_channels=9), "`in_channels` is 9"),
    "more layers than there are": (settings("unet/config.json", layers_per_block=2), "is missing"),
    "a text encoder of more layers": (settings("text_encoder/config.json", num_hidden_layers=3), "is missing"),
    "the last layer of the text encoder skipped": (settings("text_encoder/config.json", num_hidden_layers=1), None),
    "no last token": (settings("text_encoder/config.json", eos_token_id=None), "`eos_token_id`"),
    "a VAE of fewer blocks": (settings("vae/config.json", down_block_types=["DownEncoderBlock2D"]), "not as long as"),
    "a VAE of other widths": (settings("vae/config.json", block_out_channels=[8, 16, 8, 16]), "weights do not fit"),
    "a VAE without sizes": (settings("vae/config.json", block_out_channels="absent"), "`block_out_channels`"),
    "a million layers": (settings("unet/config.json", layers_per_block=10**6), "`layers_per_block`"),
    "groups that do not fit": (settings("vae/config.json", norm_num_groups=7), "`norm_num_groups` 7 does not divide"),
    "heads that do not fit": (settings("text_encoder/config.json", num_attention_heads=7), "does not divide"),
    "no middle": (settings("unet/config.json", mid_block_type=None), "`mid_block_type` is None"),
    "a pipe among the words": (lambda base: os.mkfifo(base / "tokenizer" / "x.txt"), "what cannot be read"),
    "a scale of nothing": (settings("vae/config.json", scaling_factor=None), "`scaling_factor` is None"),
}


def outcome(command: Callable[[], object]) -> tuple[ExitCode, str]:
    try:
        command()
    except ModelError as error:
        return error.exit_code, str(error)
    return ExitCode.DONE, ""


@pytest.mark.parametrize("name", BASES)
def test_check_and_train_agree(name: str, small_base: Path, toy_config: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(small_base, tmp_path / "base"))
    edit, said = BASES[name]
    edit(base)
    overrides = [*SHORT, f"model.path={base}"]
    checked = outcome(lambda: check(toy_config, overrides))
    assert outcome(lambda: train(toy_config, overrides)) == checked
    assert checked[0] == (ExitCode.DONE if said is None else ExitCode.MODEL)
    assert (said or "") in checked[1]
    assert (tmp_path / "runs" / "toy" / "toy.safetensors").is_file() == (said is None)


def test_samples_take_no_more_steps_than_the_scheduler_has(small_base: Path, toy_config: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(small_base, tmp_path / "base"))
    settings(SCHEDULER, num_train_timesteps=10)(base)
    asked = [*SHORT[:-2], SHORT[-1], f"model.path={base}", "sample={prompts: [x], num_inference_steps: 10}"]
    with pytest.raises(ConfigError, match=r"write (sample\.num_inference_steps=9) or fewer") as caught:
        check(toy_config, asked)
    train(toy_config, [*asked, str(caught.value).partition("write ")[2].removesuffix(" or fewer")])
    lora = tmp_path / "runs" / "toy" / "toy.safetensors"
    for steps, refused in ((10, pytest.raises(ConfigError, match="--steps 9")), (9, nullcontext())):
        with refused:
            sample(lora, None, None, SampleRequest(("x",), "", 0, 1, steps, 1.0, 1.0, 32), tmp_path / "drawn")


@pytest.mark.parametrize("change", [lambda tensors, key: tensors.pop(key), lambda tensors, key: twice(key)(tensors)])
def test_weights_that_do_not_fit_inside_are_refused_when_they_are_loaded(
    change: Callable[..., object], small_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_base, tmp_path / "base"))
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weights(UNET, lambda tensors: change(tensors, key))(base)
    with pytest.raises(ModelError, match=re.escape(key)):
        open_family(open_base(str(base))).load_denoiser(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", BETA_SCHEDULERS)
def test_betas_are_those_of_the_schedulers_own_class(kind: str, small_base: Path) -> None:
    for change in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.01] * 100}):
        schedule = json.loads((small_base / SCHEDULER).read_text()) | {"num_train_timesteps": 100} | change
        try:
            alphas = getattr(diffusers, f"{kind}Scheduler").from_config(schedule).alphas_cumprod
        except ImportError as error:
            pytest.skip(str(error))
        path = BetaPath(schedule, "v_prediction", {}, torch.device("cpu"))
        noised = path.at(torch.ones(100, 1, 1, 1), torch.zeros(100, 1, 1, 1), torch.arange(100))
        torch.testing.assert_close(noised.noisy_BChw.flatten(), alphas.sqrt())
