"""What a run's log says about its health. Never imports torch; reads `metrics.jsonl`, `plan.json` and `config.yaml`."""
