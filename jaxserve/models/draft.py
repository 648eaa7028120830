"""Whether one model can draft for another: the same tokens, pages that fit, room for the longest sequence.

Reads the two folders' tokenizers; computes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import ModelSpec


def check_draft(spec: ModelSpec, draft: ModelSpec, *, folder: Path, draft_folder: Path) -> None:
    """Raises ConfigError naming what does not fit."""
    where = f"speculative-config: draft model {draft_folder}"
    if draft.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"{where} has a vocabulary of {draft.vocab_size:,} tokens, the served model one of {spec.vocab_size:,}; "
            "choose a draft model of the same family"
        )
    ours, theirs = _tokens(folder), _tokens(draft_folder)
    if ours is not None and theirs is not None and ours != theirs:
        odd = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise ConfigError(
            f"{where} has another tokenizer than the served model (token {odd!r} is number {theirs.get(odd)} there, "
            f"{ours.get(odd)} here); choose a draft model of the same family"
        )
    if len(spec.kv_groups) > 1 or spec.kv_groups[0].window is not None:
        raise ConfigError(
            f"speculative-config: drafting for a model with sliding windows ({spec.family}) is not built yet; use ngram"
        )
    groups = draft.kv_groups
    if len(groups) > 1 or groups[0].window is not None:
        raise ConfigError(f"{where} ({draft.family}) has sliding windows: not built yet; choose one without")
    if not groups[0].has_values:
        raise ConfigError(f"{where} ({draft.family}) has latent attention: not built yet; choose one without")
    if draft.rope_switch is not None:
        raise ConfigError(f"{where} ({draft.family}) turns long contexts another way: not built yet; choose another")


def check_length(draft: ModelSpec, length_max: int) -> None:
    """Raises ConfigError where sequences may become longer than the draft model can see."""
    if draft.context_length < length_max:
        raise ConfigError(
            f"speculative-config: the draft model was made for {draft.context_length:,} positions, and sequences may "
            f"reach {length_max:,}; serve with --max-model-len {draft.context_length}"
        )


def _tokens(folder: Path) -> dict[str, int] | None:
    """Number of each token; None where the folder has no tokenizer.json that tells."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, list):     # unigram: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return vocabulary | added
