"""CLIP text encoders and their tokenizers. What is checked needs no torch; it is imported where a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import Problem, TrainerError
from lora_trainer.models.folder import incomplete, read_object

if TYPE_CHECKING:
    import torch


def last_hidden_state(tokenizer: Any, encoder: Any, text: str) -> torch.Tensor:
    """Embeddings [L, D] of a text, padded and cut to the encoder's length as the SD pipeline does."""
    tokens = tokenizer(
        [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0][0]


def check_vocabulary(folder: Path, load: Callable[[], Any]) -> list[Problem]:
    """What is wrong where the tokenizer cannot be used, or the text encoder has other tokens.

    transformers makes an empty vocabulary where the files are missing, and every caption means the same.

    Args:
        load: the tokenizer, as it is used.
    """
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (place / name).is_file()]
        if missing:
            file = "tokenizer.json" if len(missing) == 2 else missing[0]
            return [incomplete(folder, "tokenizer vocabulary", f"tokenizer/{file}")]
    fix = "fetch tokenizer and text_encoder of one base again"
    try:
        tokenizer, encoder = load(), read_object(folder / "text_encoder" / "config.json")
        faults = [*_token_faults(tokenizer, encoder)]
    except TrainerError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers package raises nothing narrower
        what, why = "the tokenizer cannot be used", f"{type(error).__name__}: {error}".partition("\n")[0]
        return [Problem(what, str(place), why, fix)]
    return [Problem(what, str(place), why, fix) for what, why in faults]


def _token_faults(tokenizer: Any, encoder: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What captions would become that the encoder was not trained on."""
    why, known, embedded = "captions would be read as other words", len(tokenizer), encoder.get("vocab_size", 49408)
    if known != embedded:
        yield f"the tokenizer has {known} tokens, the text encoder {embedded}", f"they do not belong together: {why}"
        return
    words = tokenizer.get_vocab()
    if sorted(words.values()) != [*range(known)]:
        yield f"the ids of the tokenizer's {known} tokens are not 0 to {known - 1}, each once", why
        return
    for name, unset in (("bos_token_id", 0), ("eos_token_id", 2)):  # which the configs of OpenAI's CLIP have
        own, said = getattr(tokenizer, name), encoder.get(name)
        if said not in (None, unset, own):
            yield f"`{name}` is {own} in the tokenizer, {said} in the text encoder", why
    length = tokenizer.model_max_length
    ids = tokenizer(["a"], padding="max_length", max_length=length, truncation=True).input_ids[0]
    if len(ids) != length or ids[0] != tokenizer.bos_token_id or tokenizer.eos_token_id not in ids[1:]:
        yield "the tokenizer does not put captions between its first and last token", why
