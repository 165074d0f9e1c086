# A CUDA-capable image with lora_trainer in it, run as an ordinary user.
#
#   docker build -t lora_trainer .
#   docker run --rm --gpus all -v "$PWD:/work" lora_trainer train --config configs/sd15_character.yaml data.dir=images
#
# torch from PyPI brings its CUDA libraries along; the host needs only the NVIDIA driver and container toolkit.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 trainer
WORKDIR /opt/lora_trainer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lora_trainer ./lora_trainer
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt .
COPY configs ./configs
COPY demo ./demo
COPY train.py ./

USER trainer
WORKDIR /work
ENTRYPOINT ["lora-trainer"]
CMD ["--help"]
