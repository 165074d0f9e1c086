# A CUDA-capable image with lora_trainer in it, run as an ordinary user.
#
#   docker build -t lora_trainer .
#   docker run --rm --gpus all --user "$(id -u)" -v "$PWD:/work" lora_trainer \
#       train --config /opt/lora_trainer/configs/sd15_character.yaml model.path=sd15 data.dir=images
#   docker run ... --entrypoint torchrun lora_trainer --nproc-per-node 2 /opt/lora_trainer/train.py --config my.yaml
#
# Paths are those of the folder where you start it. All optimizers are in it.
# torch from PyPI brings its CUDA libraries along; the host needs only the NVIDIA driver and container toolkit.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 trainer
WORKDIR /opt/lora_trainer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lora_trainer ./lora_trainer
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt '.[optimizers,8bit]'
COPY configs ./configs
COPY demo ./demo
COPY train.py ./

USER trainer
WORKDIR /work
ENV HOME=/tmp
ENTRYPOINT ["lora-trainer"]
CMD ["--help"]
