"""What other trainers and libraries call our settings, schedules and optimizers, and which of theirs we lack.

People type these names from memory, so an unknown one is looked up here first. Names as in torch, transformers,
diffusers and its example scripts, kohya sd-scripts, OneTrainer and ai-toolkit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

_PEERS = {
    "model.path": "pretrained_model_name_or_path base_model_name name_or_path",
    "model.prediction_type: v_prediction": "v_parameterization is_v_pred",
    "data.dir": "data.path data.image_dir image_dir train_data_dir instance_data_dir folder_path",
    "data.sources[].repeats": "num_repeats",
    "data.captions.extension": "caption_extension caption_ext",
    "data.captions.dropout": "caption_dropout_rate",
    "data.crop: random": "random_crop",
    "data.crop: center": "center_crop",
    "data.flip": "flip_aug random_flip",
    "name": "output_name",
    "adapter.targets": "target_modules adapter.target_modules lora_target_modules",
    "adapter.rank": "adapter.r network_dim linear lora_rank dim",
    "adapter.alpha": "network_alpha linear_alpha lora_alpha",
    "adapter.dropout": "network_dropout lora_dropout",
    "adapter.use_dora": "use_dora",
    "optimizer.type": "optimizer_type",
    "optimizer.type: adamw_8bit": "use_8bit_adam",
    "optimizer.lr": "learning_rate unet_lr lr",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.weight_decay": "adam_weight_decay",
    "optimizer.lr: 1e-2, with scale_parameter: true and a constant schedule": "relative_step",
    "lr_scheduler.warmup_steps": "num_warmup_steps warmup warmup_ratio warmup_init lr_warmup_steps "
    "learning_rate_warmup_steps",
    "lr_scheduler.gamma": "lr_scheduler.decay_rate lr_decay",
    "lr_scheduler.rate": "lr_scheduler.decay",
    "lr_scheduler.t_max": "T_max",
    "lr_scheduler.t_0": "T_0",
    "lr_scheduler.t_mult": "T_mult",
    "lr_scheduler.type": "lr_scheduler_type",
    "lr_scheduler.num_cycles": "lr_scheduler_num_cycles lr_num_cycles",
    "lr_scheduler.power": "lr_scheduler_power lr_power",
    "lr_scheduler.min_ratio": "lr_scheduler_min_lr_ratio",
    "train.max_steps": "num_training_steps total_steps max_train_steps steps num_iter num_iters iters",
    "train.epochs": "max_train_epochs num_train_epochs",
    "train.batch_size": "train_batch_size",
    "train.gradient_accumulation_steps": "gradient_accumulation",
    "train.max_grad_norm": "gradient_clipping max_grad_clip clip_grad_norm",
    "train.precision": "mixed_precision",
    "train.ema_decay": "use_ema",
    "export.every_steps": "save_every_n_steps save_every save_every_n_epochs",
    "export.dtype": "save_precision",
    "checkpoint.every_steps": "checkpointing_steps",
    "checkpoint.keep_last": "checkpoints_total_limit",
    "sample.prompts": "sample_prompts validation_prompt",
    "sample.every_steps": "sample_every_n_steps sample_every sample_every_n_epochs validation_epochs",
    "objective.min_snr_gamma": "min_snr_gamma snr_gamma",
}
PEER_NAMES = {peer: ours for ours, peers in _PEERS.items() for peer in peers.split()}
"""By a peer's name, with its section where only there it means this."""

_TYPES = {
    "adamw_8bit": "pagedadamw8bit adamwbnb8bit",
    "schedule_free_adamw": "adamwschedulefree schedulefree",
    "sgd": "sgdnesterov",
    "constant_with_warmup": "getconstantschedulewithwarmup",
    "cosine": "cosinewithwarmup cosinewithminlr getcosinewithminlrschedulewithwarmup",
    "cosine_with_restarts": "cosinerestarts getcosinewithhardrestartsschedulewithwarmup",
    "cosine_warm_restarts": "cosineannealingwarmrestarts sgdr",
    "linear": "linearwithwarmup",
    "plateau": "reducelronplateau",
    "warmup_stable_decay": "wsd getwsdschedule",
    "phases": "sequentiallr",
    "torch": "linearlr constantlr",
}
"""Names of types that `_bare` does not make equal to ours; in small letters, without `_`."""

_LACKED = {
    "every image is cropped to one square, see `data.crop`": "enable_bucket bucket_no_upscale min_bucket_reso "
    "max_bucket_reso bucket_reso_steps aspect_ratio_bucketing",
    "text encoders stay frozen": "text_encoder_lr te_lr train_text_encoder network_train_unet_only "
    "network_train_text_encoder_only stop_text_encoder_training clip_skip",
    "every run begins with a new adapter": "network_weights dim_from_weights base_weights",
    "adapters are LoRA, rsLoRA or DoRA on the layers of `adapter.targets`": "network_module network_args conv_dim "
    "conv_alpha algo",
    "captions are trained as they are written": "shuffle_caption keep_tokens keep_tokens_separator trigger_word "
    "caption_prefix caption_suffix token_warmup_step weighted_captions",
    "the noise is plain": "noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale "
    "ip_noise_gamma input_perturbation",
    "latents and prompts are always cached": "cache_latents cache_latents_to_disk cache_text_encoder_outputs "
    "vae_batch_size",
    "attention is PyTorch's own": "xformers sdpa mem_eff_attn enable_xformers_memory_efficient_attention",
    "numbers go to metrics.jsonl and, by `tracking.tensorboard`, to TensorBoard": "report_to log_with logging_dir "
    "log_tracker_name tracker_project_name wandb_api_key wandb_run_name",
    "nothing is sent to the Hub": "push_to_hub hub_model_id hub_token huggingface_repo_id",
    "the same command resumes": "resume_from_checkpoint save_state",
    "prior images are measured, not trained on, see `validation.prior_dir`": "reg_data_dir class_data_dir class_prompt "
    "num_class_images with_prior_preservation prior_preservation prior_loss_weight",
    "the VAE is the base's own": "vae vae_path",
    "base and forward have `train.precision`, adapters fp32": "fp8_base full_fp16 full_bf16 quantize no_half_vae",
    "memory is saved by `train.gradient_checkpointing` and small batches": "lowram highvram blocks_to_swap "
    "fused_backward_pass deepspeed",
    "latents are cached, so nobody waits for images": "max_data_loader_n_workers persistent_data_loader_workers "
    "dataloader_num_workers",
    "a caption is as long as the text encoder reads, see `data.captions.too_long`": "max_token_length",
    "captions lie beside the images": "instance_prompt instance_token class_tokens",
    "the loss is the squared error, see `objective.min_snr_gamma`": "loss_type huber_c huber_schedule "
    "debiased_estimation_loss scale_v_pred_loss_like_noise_pred",
    "timesteps are drawn evenly from all": "min_timestep max_timestep",
    "the noise schedule is the base's own": "zero_terminal_snr",
    "the learning rate is used as it is written": "scale_lr",
    "weights are not scaled back": "scale_weight_norms",
    "LoRA files are .safetensors in both layouts": "save_model_as",
    "options are keys of their own, as `optimizer.weight_decay` and `lr_scheduler.warmup_steps`": "optimizer_args "
    "lr_scheduler_args",
    "every pixel counts the same": "masked_loss masked_training alpha_mask",
}
LACKED = {peer: instead for instead, peers in _LACKED.items() for peer in peers.split()}
"""What is done here in place of a peer's setting that we have not."""


def type_called(written: str, known: Collection[str]) -> str | None:
    """Our name of the schedule or optimizer that others call so, or that was mistyped; None where none is near."""
    plain, bare = re.sub(r"[-_ ]", "", written.rpartition(".")[2]).lower(), _bare(written)
    for name in known:
        if plain in _TYPES.get(name, "").split():
            return name
    equal = [name for name in known if _bare(name) == bare and plain not in _TYPES["torch"].split()]
    return next(iter(equal or difflib.get_close_matches(written.lower(), known, n=1, cutoff=0.75)), None)


def _bare(name: str) -> str:
    """A type's name without what libraries put around it, as in torch.optim.AdamW, StepLR, get_cosine_schedule."""
    plain = re.sub(r"[-_ ]", "", name.rpartition(".")[2]).lower()
    return re.sub(r"^get|(schedulewithwarmup|schedule|decay|lr|torch|fused)*$", "", plain)
