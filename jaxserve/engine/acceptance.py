"""What can never run is refused when it arrives, with the bound and the fix. Pure functions over plain data.

Whether something can run *now* is the scheduler's. Invariant: a request that passes completes, whatever else runs.
"""

from __future__ import annotations

from jaxserve.core.config import SchedulerConfig
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.core.plan import RunnerShape
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import STOP_TOKENS_MAX
from jaxserve.engine.kv_groups import KvGroups
from jaxserve.engine.stop import StopRule


def check_config(config: SchedulerConfig) -> None:
    """Without chunked prefill the size of a step bounds prompts, so it must be known."""
    if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
        raise ConfigError("without chunked prefill max-num-batched-tokens must be set: no longer prompt can run")


def check_request(request: EngineRequest, *, shape: RunnerShape, kv: KvGroups, config: SchedulerConfig) -> None:
    """Raises RequestError where the engine could never complete `request`."""
    prompt, params = request.prompt_token_ids, request.params
    length = len(prompt)
    if not length:
        raise RequestError("The prompt holds no token; at least one is needed.", param="prompt")
    if min(prompt) < 0 or max(prompt) >= shape.vocab_size:
        worst = min(prompt) if min(prompt) < 0 else max(prompt)
        raise RequestError(
            f"Token id {worst} is out of vocabulary: ids are in [0, {shape.vocab_size - 1}].", param="prompt"
        )
    if length >= shape.length_max:
        raise RequestError(
            f"The prompt holds {length} tokens, but prompt and output together may hold {shape.length_max} "
            f"(max-model-len): shorten the prompt to at most {shape.length_max - 1} tokens.",
            param="input_tokens", value=length,
        )
    for name, wanted in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        count = shape.vocab_size if wanted == -1 else wanted or 0
        if count > shape.alternatives_max:
            raise RequestError(
                f"{name} asks for {count} alternatives, this engine gives at most {shape.alternatives_max} "
                "(max-logprobs).",
                param=name, value=wanted,
            )
    if params.needs_shaping and not shape.slot_count:
        raise RequestError(
            "This engine was started without room for penalties, logit_bias, bad_words or allowed_token_ids."
        )
    rule = StopRule.of(request, length_max=shape.length_max)
    if params.min_tokens and len(rule.ids) > STOP_TOKENS_MAX:
        raise RequestError(
            f"min_tokens works with at most {STOP_TOKENS_MAX} stop token ids (eos ids included), got {len(rule.ids)}.",
            param="stop_token_ids",
        )
    _check_step(length, config)
    _check_pages(length, rule.length_max, kv, may_split=config.enable_chunked_prefill)


def _check_step(length: int, config: SchedulerConfig) -> None:
    tokens_max = config.max_num_batched_tokens
    if config.enable_chunked_prefill or tokens_max is None or length <= tokens_max:
        return
    raise RequestError(
        f"The prompt holds {length} tokens, but without chunked prefill a step of {tokens_max} must hold all of it: "
        "start the server with --enable-chunked-prefill or a larger --max-num-batched-tokens.",
        param="input_tokens", value=length,
    )


def _check_pages(prompt_length: int, length_max: int, kv: KvGroups, *, may_split: bool) -> None:
    """The last token that may be sampled is never computed, so it needs no place."""
    for group, pool in enumerate(kv.pools):
        needed = kv.need(group, length_max - 1, 0 if may_split else prompt_length)
        if needed <= pool.page_count:
            continue
        most = pool.page_count * kv.page_size
        fix = (
            f"ask for at most {most + 1 - prompt_length} output tokens (max_tokens)" if prompt_length <= most
            else f"shorten the prompt to at most {most} tokens"
        )
        raise RequestError(
            f"The request may grow to {length_max} tokens, which need {needed} KV pages of {kv.page_size} tokens; the "
            f"pool has {pool.page_count}: {fix}, or give the server a larger --kv-cache-memory-bytes.",
            param="max_tokens" if prompt_length <= most else "input_tokens",
        )
