"""A LoRA fine-tuning trainer for Stable Diffusion whose learning-rate schedule is a first-class object."""

__version__ = "0.1.0"
