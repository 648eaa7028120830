"""The engine's whole configuration: frozen parts, one a concern. Parsing of flags and YAML is in `jaxserve.flags`.

Field names are the long flag names with underscores, as in vLLM. Values are already checked and typed; anything
derived is a property. Invariant: no default here is changed after start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# The first two pack an unquantised checkpoint; the others are what a checkpoint may be in.
Quantization = Literal["int8", "fp8", "gptq", "awq", "compressed-tensors", "bitsandbytes", "squeezellm", "gguf"]


# "fp8" is vLLM's short name of "fp8_e4m3"; "bfloat16" insists that this is the model's type.
KvCacheDtype = Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "int8"]


# Who computes attention; "auto" is the first of native and xla that serves, see docs/kernels.md.
AttentionBackend = Literal["auto", "xla", "native", "mosaic_gpu", "triton"]
QuantizationBackend = Literal["auto", "xla", "native", "mosaic_gpu", "triton"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how it is read."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    hf_token: str | None = None
    hf_overrides: dict[str, object] = field(default_factory=dict)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Quantization | None = None    # None: as the checkpoint is
    max_model_len: int | None = None            # None: as much as fits, at most the model's own
    seed: int = 0
    skip_tokenizer_init: bool = False
    max_logprobs: int = 20
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = "raw_logprobs"
    generation_config: str = "auto"
    override_generation_config: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """Where weights come from."""

    load_format: Literal["auto", "safetensors", "pt", "gguf", "dummy"] = "auto"
    download_dir: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """KV pages."""

    block_size: int = 16                         # S, slots a page
    kv_cache_dtype: KvCacheDtype = "auto"        # auto: the model's
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None     # None: on CPU 2 GiB, else from gpu_memory_utilization
    enable_prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """Drafts from the sequence's own text (`ngram`), or from a second, smaller model (`draft_model`)."""

    method: Literal["ngram", "draft_model"] = "ngram"
    model: str | None = None                     # the draft model's folder or hub name
    num_speculative_tokens: int                  # most tokens of a draft
    prompt_lookup_max: int = 5                   # longest and shortest n-gram that is looked for
    prompt_lookup_min: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """What a step may hold and who goes first."""

    max_num_seqs: int | None = None              # None: by device
    max_num_batched_tokens: int | None = None    # None: by device
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    batching: Literal["continuous", "static"] = "continuous"
    max_num_queued_reqs: int | None = None
    itl_target_ms: float | None = None           # None: prompts fill the steps
    speculative_config: SpeculativeConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The mesh."""

    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False         # each device has some experts whole, not a part of every one
    data_parallel_size: int = 1                  # engine processes behind one port, each with devices of its own
    nnodes: int = 1                              # processes, one a machine, that share the model
    node_rank: int = 0                           # which of them this is; 0 has HTTP and the scheduler
    master_addr: str = "127.0.0.1"               # of node 0; the processes meet there
    master_port: int = 29501                     # jax's coordinator; the next port is our own channel


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilationConfig:
    """Programs compiled ahead of time."""

    enforce_eager: bool = False                  # fewest buckets
    batch_invariant: bool = False                # bfloat16 results equal to the bit, whatever else is in the step
    attention_backend: AttentionBackend = "auto"
    quantization_backend: QuantizationBackend = "auto"
    compilation_cache_dir: str | None = None     # None: under the user's cache folder


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything the engine process needs to start."""

    model: ModelConfig
    load: LoadConfig = field(default_factory=LoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compilation: CompilationConfig = field(default_factory=CompilationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontendConfig:
    """The HTTP side; nothing here reaches the engine."""

    host: str = "0.0.0.0"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    root_path: str = ""
    api_key: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None
    allowed_origins: tuple[str, ...] = ()
    enable_log_requests: bool = False
    enable_prompt_tokens_details: bool = False   # usage says how many prompt tokens came from the prefix cache
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    profile: str | None = None                   # folder of traces; None: the profile routes are off
    shutdown_timeout: int = 0                    # seconds to let running requests finish after SIGTERM


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A whole server."""

    engine: EngineConfig
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
