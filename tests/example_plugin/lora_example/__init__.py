"""A plug-in for lora_trainer: one schedule and one optimizer."""
