"""The table of quantised formats, and which one a checkpoint is in.

Knows config.json and the files that older checkpoints have beside it. A format adds one line here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.core.errors import ModelError, UnsupportedModelError
from jaxserve.quantization.formats.awq import AwqScheme
from jaxserve.quantization.formats.bitsandbytes import BitsAndBytesScheme
from jaxserve.quantization.formats.compressed_tensors import CompressedTensorsScheme
from jaxserve.quantization.formats.fp8 import Fp8Scheme
from jaxserve.quantization.formats.gguf import GgufScheme
from jaxserve.quantization.formats.gptq import GptqScheme
from jaxserve.quantization.formats.mxfp4 import Mxfp4Scheme
from jaxserve.quantization.formats.scheme import Scheme
from jaxserve.quantization.formats.squeezellm import SqueezeLlmScheme

FORMATS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "gptq": GptqScheme.parse,
    "awq": AwqScheme.parse,
    "fp8": Fp8Scheme.parse,
    "compressed-tensors": CompressedTensorsScheme.parse,
    "bitsandbytes": BitsAndBytesScheme.parse,
    "squeezellm": SqueezeLlmScheme.parse,
    "mxfp4": Mxfp4Scheme.parse,
}
# Files beside a config.json that says nothing, and what a key of theirs means: AutoGPTQ's, AutoAWQ's, SqueezeLLM's.
BESIDE = ("quantize_config.json", "quant_config.json", "quantization_config.json")
TELLING = {"wbits": "squeezellm", "w_bit": "awq", "q_group_size": "awq", "desc_act": "gptq", "bits": "gptq"}
# auto-round names the layout, not the method.
PACKINGS = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}


def find_scheme(folder: Path, config: Mapping[str, Any], *, is_gguf: bool = False) -> Scheme | None:
    """The format of a checkpoint, None where it is not quantised; `config` is config.json's content.

    GGUF files say themselves what is in them. Raises UnsupportedModelError for other formats and settings.
    """
    if is_gguf:
        return GgufScheme()
    content = config.get("quantization_config") or config.get("compression_config") or _beside(folder)
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise ModelError(f"config.json: quantization_config is {content!r}; expected an object")
    method = content.get("quant_method")
    if method in ("auto-round", "intel/auto-round"):
        packing = content.get("packing_format")
        if packing not in PACKINGS:
            raise UnsupportedModelError(
                f"quantization_config: packing_format {packing!r} of auto-round is not supported; supported are "
                f"{', '.join(PACKINGS)}"
            )
        method = PACKINGS[packing]
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"quantization_config: quant_method {method!r} is not supported; supported are {', '.join(FORMATS)}"
        )
    return FORMATS[method](content)


def _beside(folder: Path) -> dict[str, Any] | None:
    """What older tools wrote into a file of its own, with the method where only a key tells it."""
    for name in BESIDE:
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise ModelError(f"{name} is not JSON: {error}") from error
            if not isinstance(content, dict):
                raise ModelError(f"{name} is {content!r}; expected an object")
            told = next((TELLING[key] for key in TELLING if key in content), None)
            return {"quant_method": told, **content}
    return None
