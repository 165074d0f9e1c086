"""CLIP text encoders and their tokenizers. What is checked needs no torch; it is imported where a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import Problem
from lora_trainer.models.folder import incomplete
from lora_trainer.storage.atomic_files import read_json

if TYPE_CHECKING:
    import torch

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def last_hidden_state(tokenizer: Any, encoder: Any, text: str) -> torch.Tensor:
    """Embeddings [L, D] of a text, padded and cut to the encoder's length as the SD pipeline does."""
    tokens = tokenizer(
        [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0][0]


def check_vocabulary(folder: Path, tokenizer: str = "tokenizer", encoder: str = "text_encoder") -> list[Problem]:
    """What is wrong where the tokenizer lacks its vocabulary, or the text encoder has other tokens.

    transformers makes an empty vocabulary where the files are missing, and every caption means the same.
    """
    place, config = folder / tokenizer, folder / encoder / "config.json"
    if not (place / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (place / name).is_file()]
        if missing:
            file = "tokenizer.json" if len(missing) == 2 else missing[0]
            return [incomplete(folder, f"{tokenizer} vocabulary", f"{tokenizer}/{file}")]
    try:
        known = len(_tokens(place))
        embedded = _read_json(config).get("vocab_size", known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the {tokenizer} cannot be compared with the {encoder}'s config.json"
        return [Problem(what, str(place), f"{type(error).__name__}: {error}", "fetch both folders again")]
    if known == embedded:
        return []
    what = f"the {tokenizer.replace('_', ' ')} has {known} tokens, the {encoder.replace('_', ' ')} {embedded}"
    why = "they do not belong together: captions would be read as other words"
    return [Problem(what, str(place), why, f"fetch {tokenizer} and {encoder} of one base again")]


def _tokens(place: Path) -> set[str]:
    """Every token of a CLIP tokenizer's folder, with those added to the vocabulary."""
    whole, config = _read_json(place / "tokenizer.json"), _read_json(place / "tokenizer_config.json")
    special = _read_json(place / "special_tokens_map.json")
    vocabulary = whole["model"]["vocab"] if whole else _read_json(place / "vocab.json")
    added = [
        *("<|startoftext|>", "<|endoftext|>"),
        *whole.get("added_tokens", ()),
        *_read_json(place / "added_tokens.json"),
        *config.get("added_tokens_decoder", {}).values(),
        *(names[key] for names in (config, special) for key in _NAMED_TOKENS if names.get(key) is not None),
        *(token for names in (config, special) for key in _MORE_TOKENS for token in names.get(key) or ()),
    ]
    return {*vocabulary, *(token if isinstance(token, str) else token["content"] for token in added)}


def _read_json(file: Path) -> Any:
    """The file's content; an empty object where there is none."""
    return read_json(file) if file.is_file() else {}
