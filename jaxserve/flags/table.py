"""Every flag of the server: one line of data each, the only source for parsing, YAML, --help and the reference page.

Names and meanings are vLLM's. Knows where a value goes in `core.config` and what it may be; reads nothing.
Invariant: each flag fills exactly one field, and every field of the configuration has its flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxserve.core.config import AttentionBackend, KvCacheDtype, Quantization, QuantizationBackend

Kind = Literal["text", "texts", "int", "float", "bool", "length", "bytes", "json"]


@dataclass(frozen=True, slots=True)
class Flag:
    """Attributes:
    part: the part of the configuration: "model", "load", "cache", "scheduler", "parallel", "compilation", "frontend".
    help: one line.  low, high: bounds of numbers, inclusive.  nothing: words that stand for None ("auto").
    """

    name: str
    part: str
    kind: Kind
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    nothing: tuple[str, ...] = ()
    short: str = ""

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")


PARTS = {
    "model": "which model, and how it is read",
    "load": "where weights come from",
    "cache": "the KV cache",
    "scheduler": "what a step holds and who goes first",
    "parallel": "devices",
    "compilation": "programs compiled ahead of time",
    "frontend": "the HTTP side",
}

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_LOGPROBS = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
_BIG = 2**31 - 1

FLAGS: tuple[Flag, ...] = (
    Flag("model", "model", "text", "a local folder or a hub name; may also stand first, without a flag"),
    Flag("tokenizer", "model", "text", "folder or hub name of the tokenizer, where it is not the model's own"),
    Flag("revision", "model", "text", "branch, tag or commit on the hub"),
    Flag("hf-token", "model", "text", "the hub's access token; default: HF_TOKEN or the stored login"),
    Flag("hf-overrides", "model", "json", "attributes of config.json to replace, as JSON or --hf-overrides.NAME VALUE"),
    Flag("dtype", "model", "text", "type to compute in; auto: the checkpoint's, but bfloat16 for float32",
         choices=_DTYPES),
    Flag("quantization", "model", "text",
         "int8, fp8: pack an unquantised checkpoint's weights; others: what the checkpoint must be in",
         choices=get_args(Quantization), nothing=("none",), short="-q"),
    Flag("max-model-len", "model", "length",
         "longest sequence, prompt and output; auto: as much as fits (8k is 8000, 8K 8192)",
         low=1, high=_BIG, nothing=("auto", "-1")),
    Flag("seed", "model", "int", "seed of dummy weights and of requests that bring none", low=0, high=2**63 - 1),
    Flag("skip-tokenizer-init", "model", "bool", "no tokenizer: token ids in and out"),
    Flag("max-logprobs", "model", "int", "most alternatives a token that a request may ask for; -1: the vocabulary",
         low=-1, high=_BIG),
    Flag("logprobs-mode", "model", "text", "what logprobs report: before or after shaping, normalised or not",
         choices=_LOGPROBS),
    Flag("generation-config", "model", "text", "default sampling: auto (the model's), vllm (none), or a folder"),
    Flag("override-generation-config", "model", "json", "default sampling parameters to replace, as JSON"),
    Flag("load-format", "load", "text",
         "safetensors, pt (pytorch_model*.bin), gguf, auto: the first that is there; dummy needs only a config",
         choices=("auto", "safetensors", "pt", "gguf", "dummy")),
    Flag("download-dir", "load", "text", "cache folder of hub downloads"),
    Flag("kv-cache-dtype", "cache", "text",
         "fp8 (e4m3), int8: keys and values in 8 bits with a scale a token and head; auto: the model's type",
         choices=get_args(KvCacheDtype)),
    Flag("block-size", "cache", "int", "token slots of a KV page; a power of two", low=8, high=256),
    Flag("gpu-memory-utilization", "cache", "float", "share of a GPU's memory to use; does not apply to CPUs",
         low=0.05, high=1),
    Flag("kv-cache-memory-bytes", "cache", "bytes",
         "bytes of KV pages; default: 2 GiB on a CPU, else what is left (2G is 2^31)",
         low=1, high=2**50),
    Flag("enable-prefix-caching", "cache", "bool", "requests with equal beginnings share pages"),
    Flag("max-num-seqs", "scheduler", "int", "sequences that run at once; default 64 on a CPU, 256 on a GPU",
         low=1, high=4096),
    Flag("max-num-batched-tokens", "scheduler", "length",
         "tokens of a step; default 256 on a CPU (512 with AMX), 8192 on a GPU",
         low=1, high=2**20),
    Flag("enable-chunked-prefill", "scheduler", "bool",
         "long prompts run in chunks beside decodes; off: prompts run whole"),
    Flag("async-scheduling", "scheduler", "bool", "the next step is planned while the device computes this one"),
    Flag("scheduling-policy", "scheduler", "text", "fcfs: by arrival; priority: by the request's priority, least first",
         choices=("fcfs", "priority")),
    Flag("batching", "scheduler", "text",
         "continuous: sequences join at every step; static: only once all that run have ended (for comparisons)",
         choices=("continuous", "static")),
    Flag("max-num-queued-reqs", "scheduler", "int", "sequences that may wait; more get 503. Default: no bound",
         low=0, high=_BIG),
    Flag("speculative-config", "scheduler", "json",
         'speculative decoding: {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5, '
         '"prompt_lookup_min": 2} or {"method": "draft_model", "model": FOLDER, "num_speculative_tokens": 4}',
         nothing=("none",), short="-sc"),
    Flag("itl-target-ms", "scheduler", "float",
         "milliseconds between two tokens of a stream: prompt chunks shrink to it. Default: prompts fill the steps",
         low=1, high=60_000),
    Flag("tensor-parallel-size", "parallel", "int", "devices that share the model, each with a part of every layer",
         low=1, high=4096, short="-tp"),
    Flag("enable-expert-parallel", "parallel", "bool",
         "devices share out whole experts, instead of a part of every expert", short="-ep"),
    Flag("data-parallel-size", "parallel", "int",
         "engines behind one port, each with a copy of the model on devices of its own", low=1, high=256, short="-dp"),
    Flag("nnodes", "parallel", "int",
         "machines that share the model, a process each; auto: as Slurm, Open MPI or Kubernetes (LeaderWorkerSet) say",
         low=1, high=4096, nothing=("auto",), short="-n"),
    Flag("node-rank", "parallel", "int", "which of the nnodes processes this is; 0 serves HTTP", low=0, high=4095,
         short="-r"),
    Flag("master-addr", "parallel", "text", "address of node-rank 0, of the private interface that all machines share"),
    Flag("master-port", "parallel", "int", "port of jax's coordinator at master-addr; the next one is the plan channel",
         low=1, high=65534),
    Flag("enforce-eager", "compilation", "bool", "fewest buckets: quick to compile, slower to serve"),
    Flag("batch-invariant", "compilation", "bool",
         "bfloat16 results equal to the bit whatever else is computed; one stream is slower. CPU only so far"),
    Flag("attention-backend", "compilation", "text",
         "xla: any device; native: this CPU's kernels; mosaic_gpu: Hopper's; triton: Ampere's and later; auto: native "
         "on a CPU that it serves, on a GPU whoever is right and fastest there when tried, else xla. What cannot serve "
         "the model is refused at start",
         choices=get_args(AttentionBackend)),
    Flag("quantization-backend", "compilation", "text",
         "who multiplies packed weights, named as in attention-backend; experts' are always xla's. auto: native where "
         "it serves, else xla. What cannot serve every packed matrix of the model is refused at start",
         choices=get_args(QuantizationBackend)),
    Flag("compilation-cache-dir", "compilation", "text",
         "where compiled programs are kept; default ~/.cache/jaxserve/xla"),
    Flag("host", "frontend", "text", "address to listen on"),
    Flag("port", "frontend", "int", "port to listen on", low=1, high=65535),
    Flag("uds", "frontend", "text", "a Unix socket to listen on instead of a port"),
    Flag("ssl-keyfile", "frontend", "text", "key of the TLS certificate"),
    Flag("ssl-certfile", "frontend", "text", "TLS certificate"),
    Flag("root-path", "frontend", "text", "path prefix that a proxy strips"),
    Flag("api-key", "frontend", "texts", "keys, one of which requests must bring; also JAXSERVE_API_KEY"),
    Flag("served-model-name", "frontend", "texts", "names that clients use; the first is reported. Default: --model"),
    Flag("chat-template", "frontend", "text", "a Jinja file, or the template itself, instead of the model's own"),
    Flag("allowed-origins", "frontend", "texts", "origins that browsers may call from (CORS)"),
    Flag("enable-log-requests", "frontend", "bool", "a line for every request"),
    Flag("enable-prompt-tokens-details", "frontend", "bool",
         "usage says how many prompt tokens came from the prefix cache"),
    Flag("log-level", "frontend", "text", "least severe records to print",
         choices=("debug", "info", "warning", "error")),
    Flag("profile", "frontend", "text",
         "folder for traces of the engine; turns on POST /start_profile and /stop_profile"),
    Flag("shutdown-timeout", "frontend", "int", "seconds that running requests get to finish after SIGTERM",
         low=0, high=86400),
)

BY_NAME = {flag.name: flag for flag in FLAGS}
BY_SHORT = {flag.short: flag for flag in FLAGS if flag.short}
