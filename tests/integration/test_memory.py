"""The plan's memory against what autograd and the optimizers really hold, and what is said where it does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import MAX_TOKENS, toy_unet

from lora_trainer.cli.plan import prepare_plan
from lora_trainer.cli.program import main
from lora_trainer.config.load import load_config
from lora_trainer.config.schema import LoraConfig
from lora_trainer.models.adapters.bank import AdapterBank, peft_config
from lora_trainer.models.adapters.targets import select_targets
from lora_trainer.models.stable_diffusion import StableDiffusion
from lora_trainer.models.unet_activations import AdaptedLayer, ForwardShape, kept_activations
from lora_trainer.planning.memory import estimate_memory, memory_rows
from lora_trainer.planning.run_plan import lora_parameters
from lora_trainer.runtime import device as device_module
from lora_trainer.runtime.device import Device
from lora_trainer.training.trial import Trial

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
RANK = 4


class Saved:
    """A tensor that a backward waits for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Forward:
    """A UNet with LoRAs on some layers, run once."""

    def __init__(self, unet: UNet2DConditionModel, targets: str, *, num_trials: int = 1, **options: Any) -> None:
        self.unet = unet.requires_grad_(False)
        named = ((name, p) for name, p in unet.named_parameters() if name.endswith(".weight") and p.dim() > 1)
        shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in named}
        self.targets = select_targets(shapes, targets, StableDiffusion.target_presets)
        self.names, self.config = [f"t{k}" for k in range(num_trials)], LoraConfig(rank=RANK, alpha=RANK, **options)
        adapter = peft_config(self.config, [*self.targets])
        self.bank = AdapterBank(self.unet, "unet", dict.fromkeys(self.names, adapter), seed=0)
        self.unet.train()

    def kept(self, batch: int, side: int, num_tokens: int, precision: torch.dtype) -> int:
        """Bytes of the storages that the forward saves, but for those of parameters."""
        num = batch * len(self.names)
        frozen = {p.untyped_storage()._cdata for p in self.unet.parameters()}
        saved = WeakSet[Saved]()

        def pack(tensor: torch.Tensor) -> Saved:
            box = Saved(tensor)
            saved.add(box)
            return box

        noisy, width = torch.zeros(num, 4, side, side), self.unet.config.cross_attention_dim
        cast = nullcontext() if precision == torch.float32 else torch.autocast("cpu", dtype=precision)
        with self.bank.active(self.names), torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            with cast:
                prompt = torch.zeros(num, num_tokens, width, dtype=precision)
                predicted = self.unet(noisy, torch.zeros(num), prompt, return_dict=False)[0]
            loss = ((predicted.float() - noisy) ** 2).mean()
        storages = {s._cdata: s.nbytes() for s in (box.tensor.untyped_storage() for box in saved)}
        del loss
        return sum(size for key, size in storages.items() if key not in frozen)

    def counted(self, batch: int, side: int, num_tokens: int, precision: torch.dtype, *, checkpointing: bool) -> int:
        """The same by the plan's walk."""
        layers = {name: AdaptedLayer(RANK, lora_parameters(shape, RANK)) for name, shape in self.targets.items()}
        options = {"use_dora": self.config.use_dora, "dropout": self.config.dropout > 0}
        size, trials = precision.itemsize, len(self.names)
        shape = ForwardShape(
            batch, side, num_tokens, size, on_gpu=False, num_trials=trials, checkpointing=checkpointing, **options
        )
        kept = kept_activations(self.unet.config, layers, shape)
        assert kept is not None
        return kept.by_forward


@pytest.mark.parametrize("targets", ["attention", "transformer", "transformer+resnet"])
@pytest.mark.parametrize(
    ("precision", "batch", "num_trials", "checkpointing"),
    [
        (torch.float32, 1, 1, False),
        (torch.float32, 2, 1, True),
        (torch.float32, 2, 3, False),
        (torch.bfloat16, 1, 1, True),
        (torch.bfloat16, 2, 1, False),
        (torch.bfloat16, 2, 3, True),
    ],
)
def test_a_forward_keeps_what_is_counted(
    targets: str, precision: torch.dtype, batch: int, num_trials: int, checkpointing: bool
) -> None:
    forward = Forward(toy_unet().to(precision), targets, num_trials=num_trials)
    if checkpointing:
        forward.unet.enable_gradient_checkpointing()
    kept = forward.kept(batch, 8, MAX_TOKENS, precision)
    counted = forward.counted(batch, 8, MAX_TOKENS, precision, checkpointing=checkpointing)
    assert counted == pytest.approx(kept, rel=0.05)


def test_a_side_that_does_not_halve_evenly_is_counted() -> None:
    forward = Forward(toy_unet(), "transformer+resnet")
    kept = forward.kept(2, 9, MAX_TOKENS, torch.float32)
    assert forward.counted(2, 9, MAX_TOKENS, torch.float32, checkpointing=False) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.1}])
def test_dora_and_dropout_keep_what_is_counted(options: dict[str, Any]) -> None:
    forward = Forward(toy_unet(), "transformer+resnet", **options)
    kept = forward.kept(2, 8, MAX_TOKENS, torch.float32)
    assert forward.counted(2, 8, MAX_TOKENS, torch.float32, checkpointing=False) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "batch", "checkpointing"),
    [(torch.float32, 1, False), (torch.float32, 2, True), (torch.bfloat16, 1, True), (torch.bfloat16, 2, False)],
)
def test_the_shape_of_sd15_keeps_what_is_counted(precision: torch.dtype, batch: int, checkpointing: bool) -> None:
    cross = {kind: (f"CrossAttn{kind}Block2D",) * 3 for kind in ("Down", "Up")}
    blocks = {"down_block_types": (*cross["Down"], "DownBlock2D"), "up_block_types": ("UpBlock2D", *cross["Up"])}
    with torch.device("meta"):
        forward = Forward(UNet2DConditionModel(**SD15, **blocks).to(precision), "transformer")
    if checkpointing:
        forward.unet.enable_gradient_checkpointing()
    with FakeTensorMode():  # sizes alone, as on a CPU
        for module in forward.unet.modules():
            for name, p in module.named_parameters(recurse=False):
                fake = torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
                module.register_parameter(name, torch.nn.Parameter(fake, requires_grad=p.requires_grad))
        kept = forward.kept(batch, 64, 77, precision)
    counted = forward.counted(batch, 64, 77, precision, checkpointing=checkpointing)
    assert counted == pytest.approx(kept, rel=0.05)


NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) echo "0, GPU-aaa, Old Card, 8192, 8000, 7.5"; echo "1, GPU-bbb, Fine Card, 24576, {free}, 8.9" ;;
  --query-compute-apps=*) echo "GPU-aaa, 11, idle, 100"; echo "GPU-bbb, 4321, /usr/bin/comfyui, 20000" ;;
esac
"""


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the driver tell of two GPUs, of which this process may use the second."""

    def plug_in(free: int = 24000, visible: str = "1", *, torch_has_cuda: bool = True) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(NVIDIA_SMI.replace("{free}", str(free)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(device_module, "_torch_has_cuda", lambda: torch_has_cuda)

    return plug_in


def rows_of(config: Path, *overrides: str) -> list[tuple[str, str]]:
    return list(memory_rows(prepare_plan(load_config(config, overrides))))


@pytest.mark.process
def test_the_card_that_is_used_and_its_precision_are_named(toy_config: Path, card: Callable[..., None]) -> None:
    card()
    rows = dict(rows_of(toy_config))
    assert rows["device"] == "Fine Card, 23.4 GiB of 24.0 GiB free"
    assert rows["precision"] == "bf16, which `auto` is here"
    card(visible="GPU-aaa")
    assert dict(rows_of(toy_config))["precision"].startswith("fp16")
    for visible in ("", "-1", "7"):
        card(visible=visible)
        assert dict(rows_of(toy_config))["precision"].startswith("fp32")


@pytest.mark.process
def test_a_precision_that_the_card_lacks_is_refused_by_all(
    toy_config: Path, card: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    card(visible="0")
    for start in (["check"], ["train", "--dry-run"], ["train"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*start, "-c", str(toy_config), "train.precision=bf16"])
        assert exit_info.value.code == 5
        assert "this GPU has no bf16\n      why: Old Card" in capsys.readouterr().err


@pytest.mark.process
def test_a_card_that_this_torch_cannot_use_is_said(toy_config: Path, card: Callable[..., None]) -> None:
    card(torch_has_cuda=False)
    devices = [text for name, text in rows_of(toy_config) if name == "device"]
    assert len(devices) == 2
    assert "not used, as this torch is built without CUDA" in devices[1]


@pytest.mark.process
def test_a_driver_that_tells_nothing_is_said(
    toy_config: Path, card: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "nvidia-smi tells of no card" in dict(rows_of(toy_config))["device"]


@pytest.mark.process
def test_what_does_not_fit_names_who_holds_the_card_and_keys_that_help(
    toy_config: Path, card: Callable[..., None]
) -> None:
    asked = ("data.resolution=512", "train.batch_size=16", "train.gradient_accumulation_steps=1")
    card()
    (whole,) = (text for name, text in rows_of(toy_config, *asked) if name == "memory")
    size = float(whole.split()[1])
    card(free=int(size * (1024 if "GiB" in whole else 1)) - 100)
    rows = [text for _, text in rows_of(toy_config, *asked)]
    assert "warning: process 4321 (comfyui) holds 20,000 MiB" in rows
    (advice,) = (text for text in rows if text.startswith("it fits"))
    keys = shlex.split(advice.partition("with: ")[2])
    assert [key.partition("=")[0] for key in keys][:2] == ["train.batch_size", "train.gradient_accumulation_steps"]
    assert not any("do not fit" in text for _, text in rows_of(toy_config, *asked, *keys))
    card(free=10)
    assert any("it does not fit even with" in text for _, text in rows_of(toy_config, *asked))


OPTIMIZERS = (
    "type: adamw",
    "type: adam",
    "{type: sgd, lr: 0.1}",
    "{type: sgd, lr: 0.1, momentum: 0}",
    "{type: rmsprop, momentum: 0.9}",
    "type: adagrad",
    "type: adafactor",
    "{type: adafactor, beta1: 0.9}",
    "type: lion",
    "type: prodigy",
    "type: schedule_free_adamw",
)


@pytest.mark.parametrize("written", OPTIMIZERS)
def test_an_optimizers_state_is_what_is_counted(written: str, toy_config: Path) -> None:
    text = written if written.startswith("{") else f"{{{written}}}"
    schedule = ["lr_scheduler={type: constant}"] if "schedule_free" in written else []
    config = load_config(toy_config, [f"optimizer={text}", "adapter.targets=transformer+resnet", *schedule])
    prepared = prepare_plan(config)
    forward = Forward(toy_unet(), "transformer+resnet")
    trial = Trial(
        config, "t0", forward.bank.parameters("t0"), prepared.param_groups(), torch.amp.GradScaler("cpu", enabled=False)
    )
    for parameter in trial.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    trial.apply_update(0)
    held = sum(tensor.nbytes for tensor in trial.state()[0]["optimizer"].values())
    estimate = estimate_memory(prepared, config, Device("host", 0, 0))
    assert estimate is not None
    assert estimate.lines["adapters"] == sum(p.nbytes for p in trial.parameters.values())
    assert estimate.lines.get("optimizer state", 0) == pytest.approx(held, rel=0.1, abs=2000)


def test_measured_beside_estimated(toy_config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for start in (["plan"], ["train", "--dry-run"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*start, "--measure", "-c", str(toy_config)])
        assert not exit_info.value.code
        said = capsys.readouterr().out
        assert "s per update" in said
        assert "(estimated: " in said
    assert not (tmp_path / "runs" / "toy").exists()
