"""Log-probabilities as clients read them: chat's list of objects, completions' parallel lists, vLLM's for prompts.

-inf is sent as -9999.0: JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.core.text_request import PositionLogprobs, TextLogprob

LOGPROB_MIN = -9999.0


def finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)


def token_name(token: TextLogprob, as_id: bool) -> str:
    return f"token_id:{token.token_id}" if as_id else token.text


def chat_logprobs(positions: Iterable[PositionLogprobs], *, top: int, as_ids: bool) -> dict[str, object]:
    def entry(token: TextLogprob) -> dict[str, object]:
        name = token_name(token, as_ids)
        return {"token": name, "logprob": finite(token.logprob), "bytes": list(name.encode() if as_ids else token.utf8)}

    content = []
    for position in positions:
        alternatives = position.top if top == -1 else position.top[:top]
        content.append(entry(position.token) | {"top_logprobs": [entry(token) for token in alternatives]})
    return {"content": content}


def completion_logprobs(
    positions: Sequence[PositionLogprobs | None], *, first_text: str, as_ids: bool, offset: int
) -> tuple[dict[str, object], int]:
    """The four parallel lists, and the text offset after them.

    Args:
      positions: None is a prompt's first token, which nothing precedes; `first_text` is its text.
      offset: characters before the first position.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for position in positions:
        name = first_text if position is None else token_name(position.token, as_ids)
        tokens.append(name)
        offsets.append(offset)
        offset += len(name)
        if position is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(finite(position.token.logprob))
        top: dict[str, float] = {}
        for token in (*position.top, position.token):   # the sampled one too, which may not be among the best
            top.setdefault(token_name(token, as_ids), finite(token.logprob))
        tops.append(top)
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}, offset


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, object] | None] | None:
    """vLLM's shape: for each prompt token a map from token id to its log-probability, rank and text."""
    if positions is None:
        return None
    return [None if position is None else _by_id(position) for position in positions]


def _by_id(position: PositionLogprobs) -> dict[str, object]:
    entries: dict[str, object] = {}
    for rank, token in enumerate(position.top, 1):
        entries[str(token.token_id)] = _ranked(token, token.rank or rank)
    entries.setdefault(str(position.token.token_id), _ranked(position.token, position.token.rank))
    return entries


def _ranked(token: TextLogprob, rank: int | None) -> dict[str, object]:
    return {"logprob": finite(token.logprob), "rank": rank, "decoded_token": token.text}
