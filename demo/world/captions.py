"""Training captions of the demo base: full, partial and with words that mean nothing, and the tokenizer for them."""

from __future__ import annotations

import json
import string

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from demo.world.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption

MAX_TOKENS = 32
FILLER_WORDS = ("a", "an", "the", "of", "photo", "picture", "with", "and", "on", "background", "shape")


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One way to say the scene: 10 % nothing at all, 60 % in full, the rest with words left out or unknown.

    A word left out or a nonsense word in the shape's place teaches the base that what is not said is free: the
    trigger of a LoRA, unknown to the base, then draws any shape of the world.
    """
    dice = rng.random()
    if dice < 0.1:
        return ""
    if dice < 0.7:
        return caption(scene)
    keep = rng.random(5) < 0.7
    size = f"{scene.size} " if keep[0] else ""
    colour = f"{scene.colour} " if keep[1] else ""
    shape = scene.shape if keep[2] else ("shape" if rng.random() < 0.4 else _nonsense(rng))
    position = f" {scene.position}" if keep[3] else ""
    background = f", {scene.background} background" if keep[4] else ""
    return f"a {size}{colour}{shape}{position}{background}"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world is one token and any other text falls into bytes."""
    words = sorted(
        {w for phrase in (*SIZES, *COLOURS, *SHAPES, *POSITIONS, *BACKGROUNDS, *FILLER_WORDS) for w in phrase.split()}
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator(words, trainer)
    merges = _merges_of(learner)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [f"{letter}</w>" for letter in alphabet] + [left + right for left, right in merges]
    tokens = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )


def _merges_of(learner: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def _nonsense(rng: np.random.Generator) -> str:
    letters = rng.choice(list(string.ascii_lowercase), size=int(rng.integers(3, 8)))
    return "".join(letters)
