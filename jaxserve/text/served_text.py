"""The text side of one served model: tokenizer, chat template, defaults, and what a prompt must satisfy.

Shared by the server's text engine and the offline `LLM`; knows no engine, only its EngineInfo.
Invariant: what `engine_requests` gives is valid for that engine: ids below the vocabulary, lengths within the context.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.core.config import ModelConfig
from jaxserve.core.errors import ModelError, RequestError
from jaxserve.core.request import EngineInfo, EngineRequest
from jaxserve.core.sampling_params import SamplingParams, check_against
from jaxserve.core.text_request import TextRequest
from jaxserve.text.chat_template import ChatTemplate, load_chat_template
from jaxserve.text.folder import read_json, tokenizer_folder
from jaxserve.text.generation_config import default_params, eos_token_ids
from jaxserve.text.tokenizer import Tokenizer

logger = logging.getLogger("jaxserve.start")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedText:
    """What belongs to the model and not to a request; `tokenizer` is None under `--skip-tokenizer-init`."""

    tokenizer: Tokenizer | None
    template: ChatTemplate
    eos_token_ids: tuple[int, ...] = ()
    default_params: dict[str, object] = field(default_factory=dict)
    max_logprobs: int = 20
    seeds: random.Random = field(default_factory=random.Random)   # for requests that bring none

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, chat_template: str | None = None, download_dir: str | None = None
    ) -> ServedText:
        """Reads the text files of a model folder. Raises ModelError or ConfigError."""
        tokenizer, text_folder = None, None
        if not config.skip_tokenizer_init:
            text_folder = tokenizer_folder(folder, config, download_dir)
            tokenizer = Tokenizer.from_folder(text_folder)
            _check_vocabulary(tokenizer, folder, config)
        return cls(
            tokenizer=tokenizer,
            template=load_chat_template(text_folder, chat_template, tokenizer.special_tokens if tokenizer else {}),
            eos_token_ids=eos_token_ids(folder, config, tokenizer.eos_token_id if tokenizer else None),
            default_params=default_params(folder, config),
            max_logprobs=config.max_logprobs,
            seeds=random.Random(config.seed),
        )

    def need_tokenizer(self) -> Tokenizer:
        """Raises RequestError where the model is served without one."""
        if self.tokenizer is None:
            raise RequestError(
                "This model is served without a tokenizer (--skip-tokenizer-init): prompts must be token ids, "
                "and detokenize must be false.",
                param="prompt",
            )
        return self.tokenizer

    def check(self, request: TextRequest, info: EngineInfo) -> None:
        """What can be told before the prompt is encoded. Raises RequestError."""
        params, limit = request.params, info.max_model_len
        if (request.prompt is None) == (request.prompt_token_ids is None):
            raise RequestError("give either a prompt or prompt_token_ids, not both.", param="prompt")
        if params.max_tokens is not None and params.max_tokens > limit:
            raise RequestError(
                f"max_tokens={params.max_tokens} cannot be greater than max_model_len={limit}. "
                "Please request fewer output tokens.",
                param="max_tokens", value=params.max_tokens,
            )
        check_against(params, vocab_size=info.vocab_size, logprobs_max=self.max_logprobs)
        _check_ids(request.prompt_token_ids or (), info.vocab_size)
        if request.prompt is not None or params.stop or params.bad_words:
            self.need_tokenizer()

    def engine_requests(self, request: TextRequest, prompt_ids: Sequence[int], info: EngineInfo) -> list[EngineRequest]:
        """One a choice, `<request_id>/<choice>`, after `check`. Raises RequestError where the length does not fit."""
        ids = tuple(_truncated(prompt_ids, request, info.max_model_len))
        _check_ids(ids, info.vocab_size)   # a tokenizer of another model may give ids that this one does not have
        room = _room(ids, info.max_model_len)
        params = self._engine_params(request.params, room)
        seed = self.seeds.getrandbits(63) if params.seed is None else params.seed
        return [
            EngineRequest(
                request_id=f"{request.request_id}/{choice}",
                prompt_token_ids=ids,
                params=params,
                choice=choice,
                seed=seed,
                eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
                priority=request.priority,
                cache_salt=request.cache_salt,
                arrival_s=request.arrival_s,
            )
            for choice in range(params.n)
        ]

    def _engine_params(self, params: SamplingParams, room: int) -> SamplingParams:
        changes: dict[str, object] = {}
        if params.max_tokens is None or params.max_tokens > room:
            changes["max_tokens"] = room
        if params.bad_words:
            changes["bad_words_token_ids"] = self.need_tokenizer().encode_bad_words(params.bad_words)
        return params.with_(**changes) if changes else params


def _check_vocabulary(tokenizer: Tokenizer, folder: Path, config: ModelConfig) -> None:
    """A tokenizer may know fewer tokens than the embedding has rows, and added ones beyond it that no prompt uses
    (Gemma 3 has one for images): such a prompt is refused when it comes. Ordinary tokens beyond it are another model's.
    """
    content = read_json(folder / "config.json") | config.hf_overrides
    part = content.get("text_config")
    rows = content.get("vocab_size", part.get("vocab_size") if isinstance(part, dict) else None)
    if not isinstance(rows, int):       # a default of the family: no one says it here
        return
    if (ordinary := tokenizer.id_max(with_added_tokens=False)) >= rows:
        raise ModelError(
            f"the tokenizer gives ids up to {ordinary}, the model's embedding has {rows} rows (vocab_size): they do "
            "not belong together. --tokenizer names another folder"
        )
    if (added := tokenizer.id_max(with_added_tokens=True)) >= rows:
        logger.warning(
            "added tokens of the tokenizer have ids up to %d, the model's embedding has %d rows: prompts with such "
            "tokens will be refused", added, rows,
        )


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:   # a boolean is an int, but no id
            message = f"Token id {token_id} is out of vocabulary: ids are in [0, {vocab_size - 1}]."
            raise RequestError(message, param="prompt", value=token_id)


def _truncated(ids: Sequence[int], request: TextRequest, limit: int) -> Sequence[int]:
    keep = request.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == -1:
        keep = max(1, limit - (request.params.max_tokens or 1))
    if not 1 <= keep <= limit:
        raise RequestError(
            f"truncate_prompt_tokens must be in [1, {limit}] (max_model_len), or -1 for as many as fit, got {keep}.",
            param="truncate_prompt_tokens", value=keep,
        )
    return ids[-keep:]


def _room(ids: Sequence[int], limit: int) -> int:
    """Tokens that may follow the prompt."""
    if not ids:
        raise RequestError("The prompt cannot be empty: it must give at least one token.", param="prompt")
    if len(ids) > limit:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, your prompt contains {len(ids)} input "
            "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
            "prompt.",
            param="input_tokens", value=len(ids),
        )
    if len(ids) == limit:
        raise RequestError("max_tokens must be at least 1, got 0.", param="max_tokens", value=0)
    return limit - len(ids)
