"""Reads config.json strictly: every attribute is handled, ignorable at its value, or an error that names it.

Knows both spellings of transformers 4 and 5 and what attributes mean everywhere; a family knows which of them its
model computes with, by taking them. Code that a folder brings along (`auto_map`) never runs.
Invariant: a ModelSpec is only made from a config of which nothing was left unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.core.model_spec import Activation, DType, Global, SlidingWindow, Span
from jaxserve.core.rope import Rope
from jaxserve.models.hf_rope import RopeFields

# Attributes that change nothing of what a decoder computes at inference, whatever their value.
IGNORABLE = frozenset({
    # provenance and bookkeeping of transformers
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_from_model_config",
    "attn_implementation", "architectures", "auto_map", "model_type", "transformers_version", "torchscript",
    "transformers.js_config", "tokenizer_class", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "return_dict_in_generate", "output_scores", "is_decoder", "is_llama_config", "problem_type",
    "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "prefix", "use_bfloat16",
    "tf_legacy_loss", "chunk_size_feed_forward", "unsloth_fixed", "unsloth_version", "model_name", "use_flash_attn",
    "pretraining_tp",        # splits a product into parts that are added again: the same sums
    # training
    "initializer_range", "initializer_factor", "gradient_checkpointing", "attention_dropout", "hidden_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "use_reentrant", "classifier_dropout", "embedding_dropout",
    "residual_dropout", "layerdrop", "init_std", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "aux_loss_alpha", "seq_aux", "embd_dropout", "activation_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn",
    # how training spread the experts; how many tokens more the training predicted (those layers stay unread)
    "ep_size", "num_nextn_predict_layers", "num_mtp_layers",
    # how weights are stored: `jaxserve.quantization.formats` reads it
    "quantization_config", "compression_config",
    # how a reference implementation computes the same
    "cache_implementation", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "use_parallel_embedding",
    # token ids and generation defaults: the text side reads them
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens",
    "suppress_tokens", "bad_words_ids", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "exponential_decay_length_penalty", "remove_invalid_values",
})

# Attributes that change nothing at these values, and would at others.
IGNORABLE_AT: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "scale_attn_weights": (True,),
    "use_bidirectional_attention": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "embedding_multiplier": (1, 1.0),
    "attention_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
}

# Refusals that deserve a sentence of their own.
REASONS = {
    "sliding_window": "this family is computed with full attention only",
}

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}

# A layer, an expert is an object here before any weight is looked at: what no model has would fill the memory.
COUNTS_MAX = {
    "num_hidden_layers": 2000, "n_layer": 2000, "num_experts": 10_000, "num_local_experts": 10_000,
    "n_routed_experts": 10_000,
}
SIZE_MAX = 2**31 - 1

_REQUIRED: Any = object()


class HfConfig:
    """A config.json on its way to a ModelSpec. Mutable: it remembers what was taken."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = dict(content)
        self._taken: set[str] = set()
        self._parts: list[HfConfig] = []

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The value of an attribute; absent and null both mean the default."""
        self._taken.add(name)
        value = self._content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"config.json lacks {name!r}, which {self.architecture} needs")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ModelError(f"config.json: {name} is {value!r}; expected {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A count, at least 1."""
        value = self.take(name, int, default)
        if value < 1:
            raise ModelError(f"config.json: {name} is {value}; it must be at least 1")
        if value > (most := COUNTS_MAX.get(name, SIZE_MAX)):
            raise ModelError(f"config.json: {name} is {_short(value)}; it must be at most {most}")
        return cast(int, value)

    def size_of(self, names: tuple[str, ...], default: Any = _REQUIRED) -> int:
        """A count that has gone by several names: the first that is there; the others must agree with it."""
        given = {name: self.size(name) for name in names if self._content.get(name) is not None}
        if len(set(given.values())) > 1:
            raise ModelError(f"config.json: {', '.join(f'{name} {value}' for name, value in given.items())} disagree")
        return next(iter(given.values())) if given else self.size(names[0], default)

    @property
    def architecture(self) -> str:
        """The class name that says which family computes this."""
        names = self._content.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ModelError(
                f"config.json: architectures is {names!r}; expected a list of one class name. "
                "Set it with --hf-overrides '{\"architectures\": [\"LlamaForCausalLM\"]}' if you know it"
            )
        return names[0]

    def activation(self, attribute: str = "hidden_act", default: str = "silu") -> Activation:
        """The activation function, in our words."""
        name = self.take(attribute, str, default)
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: {attribute} {name!r} is not implemented; implemented are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def dtype(self) -> DType:
        """What the checkpoint was saved in; float32, as in transformers, where nothing is said."""
        old, new = self.take("torch_dtype", str, None), self.take("dtype", str, None)
        name = str(new or old or "float32").removeprefix("torch.")
        if name == "auto":
            return "float32"
        if name not in get_args(DType):
            raise UnsupportedModelError(
                f"config.json: dtype {name!r} is not implemented; implemented are {', '.join(get_args(DType))}"
            )
        return cast(DType, name)

    def rope(
        self, head_dim: int, *, theta: float = 10000.0, part: float | None = None,
        pairs: Literal["halves", "neighbours"] = "halves",
    ) -> Rope:
        """The rotary embedding of all layers.

        Args:
          theta, part: what holds where the config says nothing. `part` of a head turns; None: the family always turns
            whole heads, and a config that says otherwise is not it.
        """
        ropes = self.ropes(head_dim, ("all",), theta=theta, part=part, pairs=pairs)
        return ropes["all"]

    def ropes(
        self, head_dim: int, kinds: tuple[str, ...], *, theta: float = 10000.0, part: float | None = None,
        pairs: Literal["halves", "neighbours"] = "halves",
    ) -> dict[str, Rope]:
        """A rotary embedding for each kind of layer: its own where the config has one a kind, else the one there is."""
        theta = self.take("rope_theta", float, theta)
        if part is not None:
            part = self.take("partial_rotary_factor", float, part)
        scaling = self.take("rope_scaling", dict, None)
        parameters = self.take("rope_parameters", dict, None)
        where = "rope_scaling" if parameters is None else "rope_parameters"
        fields = parameters if parameters is not None else scaling or {}
        length_max = self.size("max_position_embeddings", 2048)
        original = self.take("original_max_position_embeddings", int, None)
        is_by_kind = any(isinstance(value, dict) for value in fields.values())
        if is_by_kind and set(fields) != set(kinds):
            raise UnsupportedModelError(
                f"config.json: {where} differs by layer type ({', '.join(sorted(fields))}); expected "
                + ("one for all layers" if kinds == ("all",) else ", ".join(kinds))
            )
        return {
            kind: RopeFields(
                fields[kind] if is_by_kind else fields, where=f"{where}.{kind}" if is_by_kind else where,
                length_max=length_max, original_length=original,
            ).read(head_dim, theta=theta, part=part, pairs=pairs)
            for kind in kinds
        }

    def context_length(self, default: int = 2048) -> int:
        """Positions the model was made for. What YaRN stretches counts stretched, whichever length the config gives."""
        length, fields = self.size("max_position_embeddings", default), self.rope_fields()
        for rope in fields.values() if self.is_rope_by_kind else (fields,):
            original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
            if "yarn" in (rope.get("rope_type"), rope.get("type")) and original and factor:
                length = max(length, int(original * factor))
        return length

    @property
    def is_rope_by_kind(self) -> bool:
        """Whether each kind of layer has a rope of its own."""
        return any(isinstance(value, dict) for value in self.rope_fields().values())

    def rope_fields(self) -> Mapping[str, Any]:
        """What the config says of its rope, in either spelling."""
        fields = self._content.get("rope_parameters") or self._content.get("rope_scaling") or {}
        return fields if isinstance(fields, Mapping) else {}

    def spans(
        self, layer_count: int, otherwise: Callable[[int], str] = lambda _: "full_attention", *,
        window: int | None = None,
    ) -> list[Span]:
        """What each layer sees, from `layer_types` and `sliding_window`.

        Args:
          otherwise: layer index -> type where the config lists none; nothing slides without a window.
          window: what an absent `sliding_window` means (null always means none).
        """
        self._taken.add("sliding_window")
        size = self._content.get("sliding_window", window)
        kinds = self.layer_types(layer_count)
        if kinds is None:
            kinds = ["full_attention" if size is None else otherwise(index) for index in range(layer_count)]
        if "sliding_attention" in kinds and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ModelError(f"config.json: sliding_window is {size!r}; layers of type 'sliding_attention' need one")
        return [SlidingWindow(cast(int, size)) if kind == "sliding_attention" else Global() for kind in kinds]

    def has_window(self, default: int | None) -> bool:
        """Whether there is a sliding window; the default is what an absent `sliding_window` means."""
        return self._content.get("sliding_window", default) is not None

    def expect(self, name: str, value: object) -> None:
        """An attribute that is computed at one value only, which is also what its absence means."""
        given = self.take(name, type(value), value)
        if given != value:
            raise UnsupportedModelError(f"config.json: {name} is {given!r}; only {value!r} is implemented")

    def part(self, name: str, *, unused: tuple[str, ...]) -> HfConfig:
        """The config of one part of a model of several; `unused` attributes are about the others."""
        content = self.take(name, dict)
        self._taken.update(unused)
        shared = ("architectures", "torch_dtype", "dtype", "tie_word_embeddings")
        frame = {key: self._content[key] for key in shared if key in self._content}
        self._taken.update(frame)
        part = HfConfig({**frame, **content, "architectures": self._content.get("architectures")})
        self._parts.append(part)
        return part

    def layer_types(self, layer_count: int) -> list[str] | None:
        """The span of each layer as transformers 5 lists it, or None where the config does not."""
        kinds = self.take("layer_types", list, None)
        if kinds is not None and (
            len(kinds) != layer_count or not set(kinds) <= {"full_attention", "sliding_attention"}
        ):
            raise UnsupportedModelError(
                f"config.json: layer_types is {_short(kinds)}; expected {layer_count} times 'full_attention' or "
                "'sliding_attention'"
            )
        return kinds

    def finish(self) -> None:
        """Everything must have been taken, or be ignorable at its value. Call it last."""
        for part in self._parts:
            part.finish()
        for name, value in self._content.items():
            if name in self._taken or name in IGNORABLE or value is None:
                continue
            if name in IGNORABLE_AT and value in IGNORABLE_AT[name]:
                continue
            reason = REASONS.get(name, "it may change what the model computes, and this server does not implement it")
            raise UnsupportedModelError(
                f"config.json: {name} = {_short(value)} is not supported by {self.architecture} here: {reason}. "
                f"If you know that it changes nothing, pass --hf-overrides '{{\"{name}\": null}}'"
            )


def read_config(folder: Path, overrides: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The content of config.json with `--hf-overrides` applied on top; a null override removes the attribute."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json; it is not a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} must be a JSON object")
    return _merged(content, overrides or {})


def _no_number(name: str) -> None:
    """NaN and Infinity, which Python's reader would take for numbers."""
    raise ValueError(f"{name} is not a number that JSON has")


def _merged(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides replace values; objects are merged key by key."""
    merged = dict(content)
    for name, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
