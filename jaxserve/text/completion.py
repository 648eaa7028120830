"""One choice's tokens to its text: detokeniser, stop strings and the texts of log-probabilities in one state machine.

Shared by the server's text engine and the offline `LLM`. Knows no engine. Mutable: one instance reads one sequence.
Invariant: deltas joined are the same however the engine's outputs were grouped; after the delta with a
`finish_reason` there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.core.request import EngineRequest, FinishReason, SequenceOutput, TokenLogprob
from jaxserve.core.text_request import PositionLogprobs, TextDelta, TextLogprob
from jaxserve.text.stop_strings import StopStrings
from jaxserve.text.tokenizer import Tokenizer


class CompletionText:
    """Reads the outputs of one engine request."""

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.request_id = request.request_id
        self.finish_reason: FinishReason | None = None
        self._request, self._params, self._tokenizer = request, params, tokenizer
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            self._detokenizer.prime(request.prompt_token_ids)
        self._stops = StopStrings(params.stop, included=params.include_stop_str_in_output)
        self._stop_reason: int | str | None = None
        self._token_count = 0
        self._has_begun = False

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, outputs: Sequence[SequenceOutput]) -> TextDelta:
        """What these outputs add, as one delta. Where a stop string ended it, the engine may still be running."""
        assert outputs and not self.is_finished, "an output follows the last one"
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        for output in outputs:
            for at, token_id in enumerate(output.token_ids):
                token_ids.append(token_id)
                if output.logprobs:
                    logprobs.append(output.logprobs[at])
                ends_here = output.finish_reason == "stop" and at == len(output.token_ids) - 1
                texts.append(self._read(token_id, ends_here))
                if self.is_finished:
                    break
            if not self.is_finished and output.finish_reason is not None:
                texts.append(self._end(output))
            if self.is_finished:
                break
        return self._delta(outputs, output, "".join(texts), token_ids, logprobs)

    def _read(self, token_id: int, is_stop_token: bool) -> str:
        """Text that is certain with this token; a token that ended the sequence is not part of the text."""
        self._token_count += 1
        if self._detokenizer is None or (is_stop_token and not self._params.include_stop_str_in_output):
            return ""
        return self._search(self._detokenizer.feed(token_id))

    def _search(self, text: str) -> str:
        if not text:
            return ""
        text, found = self._stops.push(text, may_stop=self._token_count > self._params.min_tokens)
        if found is not None:
            self.finish_reason, self._stop_reason = "stop", found
        return text

    def _end(self, output: SequenceOutput) -> str:
        text = self._search(self._detokenizer.flush()) if self._detokenizer is not None else ""
        if not self.is_finished:
            self.finish_reason, self._stop_reason = output.finish_reason, output.stop_reason
            text += self._stops.flush()
        return text

    def _delta(
        self,
        outputs: Sequence[SequenceOutput],
        last: SequenceOutput,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob],
    ) -> TextDelta:
        is_first, self._has_begun = not self._has_begun, True
        scored = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None) if is_first else None
        return TextDelta(
            choice=self._request.choice,
            text=text,
            token_ids=tuple(token_ids),
            logprobs=tuple(self._position(entry) for entry in logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            prompt_token_ids=self._request.prompt_token_ids if is_first else None,
            prompt_logprobs=None if scored is None else tuple(None if e is None else self._position(e) for e in scored),
            cached_token_count=max(o.cached_token_count for o in outputs),
            preemption_count=last.preemption_count,
            times=last.times,
            error=last.error,
        )

    def _position(self, entry: TokenLogprob) -> PositionLogprobs:
        best = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return PositionLogprobs(
            token=self._named(entry.token_id, entry.logprob, entry.rank),
            top=tuple(self._named(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(best, start=1)),
        )

    def _named(self, token_id: int, logprob: float, rank: int) -> TextLogprob:
        raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return TextLogprob(
            token_id=token_id, text=raw.decode(errors="replace"), utf8=raw, logprob=logprob, rank=rank
        )
