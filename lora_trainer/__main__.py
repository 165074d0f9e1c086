"""`python -m lora_trainer` is the same program as `lora-trainer`."""

from lora_trainer.cli.program import main

if __name__ == "__main__":
    main()
