"""Reads config.json strictly: every attribute is handled, ignorable at its value, or an error that names it.

Knows both spellings of transformers 4 and 5 and what attributes mean everywhere; a family knows which of them its
model computes with, by taking them. Code that a folder brings along (`auto_map`) never runs.
Invariant: a ModelSpec is only made from a config of which nothing was left unread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.core.model_spec import DefaultRope, DType, LinearRope, Llama3Rope, Rope

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
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "use_reentrant",
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
    "embedding_multiplier": (1, 1.0),
    "attention_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
}

# Refusals that deserve a sentence of their own.
REASONS = {
    "quantization_config": "quantised checkpoints are not read yet; use the unquantised model",
    "sliding_window": "this family is implemented with full attention only",
}

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}

_REQUIRED: Any = object()


class HfConfig:
    """A config.json on its way to a ModelSpec. Mutable: it remembers what was taken."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = dict(content)
        self._taken: set[str] = set()

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
        return cast(int, value)

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

    def activation(self) -> Literal["silu", "gelu", "gelu_tanh"]:
        """hidden_act, in our words."""
        name = self.take("hidden_act", str, "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: hidden_act {name!r} is not implemented; implemented are {', '.join(ACTIVATIONS)}"
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

    def rope(self, dim: int, default_theta: float = 10000.0) -> Rope:
        """Rotary embedding from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
        theta = self.take("rope_theta", float, default_theta)
        scaling = self.take("rope_scaling", dict, None)
        parameters = self.take("rope_parameters", dict, None)
        where = "rope_scaling" if parameters is None else "rope_parameters"
        fields = dict(parameters if parameters is not None else scaling or {})
        if any(isinstance(value, dict) for value in fields.values()):
            raise UnsupportedModelError(f"config.json: {where} differs by layer type, which is not implemented")
        theta = float(fields.pop("rope_theta", theta))
        names = {fields.pop(key) for key in ("rope_type", "type") if key in fields} or {"default"}
        kind = names.pop() if len(names) == 1 else None
        if fields.get("partial_rotary_factor") in (1, None):
            fields.pop("partial_rotary_factor", None)
        rope = _rope(kind, theta, dim, fields, where)
        for name, value in fields.items():
            raise UnsupportedModelError(f"config.json: {where}.{name} = {value!r} is not implemented for {kind!r}")
        return rope

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


def _rope(kind: str | None, theta: float, dim: int, fields: dict[str, Any], where: str) -> Rope:
    """The rope that `kind` names; takes what it uses out of `fields`."""

    def number(name: str) -> float:
        value = fields.pop(name, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"config.json: {where}.{name} is {value!r}; rope type {kind!r} needs a number above 0")
        return float(value)

    match kind:
        case "default":
            return DefaultRope(theta=theta, dim=dim)
        case "linear":
            return LinearRope(theta=theta, dim=dim, factor=number("factor"))
        case "llama3":
            return Llama3Rope(
                theta=theta, dim=dim, factor=number("factor"),
                low_freq_factor=number("low_freq_factor"), high_freq_factor=number("high_freq_factor"),
                original_context_length=int(number("original_max_position_embeddings")),
            )
        case _:
            raise UnsupportedModelError(
                f"config.json: {where} has rope type {kind!r}, which is not implemented; implemented are default, "
                "linear and llama3"
            )


def read_config(folder: Path, overrides: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The content of config.json with `--hf-overrides` applied on top; a null override removes the attribute."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json; it is not a Hugging Face model folder") from None
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} must be a JSON object")
    return _merged(content, overrides or {})


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
