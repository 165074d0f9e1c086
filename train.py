"""`accelerate launch train.py --config configs/x.yaml [key.path=value ...]`: the same as `lora-trainer train`."""

import sys

from lora_trainer.cli.program import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
