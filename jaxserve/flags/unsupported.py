"""Flags that vLLM has and this project does not (yet): each is refused with a sentence of its own, none is ignored.

Invariant: no name here is a flag of the table.
"""

from __future__ import annotations

_LATER = "is not built yet"
_LATER_MANY = "are not built yet"
_NEVER = "is not part of jaxserve"

# Names that share a reason, then the reason. The reference page prints the same lines.
REASONS: tuple[tuple[str, str], ...] = (
    # parallelism
    ("pipeline-parallel-size", f"pipeline parallelism {_LATER}; --tensor-parallel-size splits a model over devices"),
    ("data-parallel-size-local data-parallel-rank data-parallel-start-rank data-parallel-address "
     "data-parallel-rpc-port data-parallel-backend data-parallel-hybrid-lb data-parallel-external-lb "
     "disable-nccl-for-dp-synchronization",
     f"data parallelism over machines {_LATER}; --data-parallel-size N starts N engines on this one"),
    ("decode-context-parallel-size prefill-context-parallel-size dcp-kv-cache-interleave-size "
     "cp-kv-cache-interleave-size", f"splitting one sequence over devices {_LATER}"),
    ("enable-eplb eplb-config num-redundant-experts expert-placement-strategy all2all-backend "
     "enable-dbo ubatch-size dbo-decode-token-threshold dbo-prefill-token-threshold",
     f"moving experts between devices {_LATER}; --enable-expert-parallel shares them out evenly"),
    ("distributed-executor-backend worker-cls worker-extension-cls ray-workers-use-nsight "
     "max-parallel-loading-workers disable-custom-all-reduce",
     f"an executor to choose {_NEVER}: one process drives all devices of a machine"),
    # weights and their types
    ("allow-deprecated-quantization", f"a deprecated scheme to allow {_NEVER}: there is none"),
    ("kv-cache-dtype-skip-layers", f"layers whose KV cache has another type {_LATER}"),
    ("calculate-kv-scales", f"scales to calculate beforehand {_NEVER}: each token and head has its own"),
    ("cpu-offload-gb", f"offloading weights {_LATER}; choose a model that fits"),
    ("model-loader-extra-config ignore-patterns pt-load-map-location safetensors-load-strategy use-tqdm-on-load",
     f"a choice of how weights are read {_NEVER}: each device reads its own slices of *.safetensors"),
    ("enable-lora lora-modules max-loras max-lora-rank max-cpu-loras lora-dtype lora-extra-vocab-size "
     "lora-target-modules fully-sharded-loras default-mm-loras", f"LoRA {_LATER}; merge the adapter into the weights"),
    ("enable-sleep-mode weight-transfer-config", f"releasing or replacing weights of a running server {_LATER}"),
    # the model
    ("trust-remote-code code-revision",
     f"code that a model folder brings along {_NEVER}: it never runs, and models are built in by name"),
    ("tokenizer-mode", f"a choice of tokenizer implementation {_NEVER}: tokenizer.json is read"),
    ("tokenizer-revision", f"a revision of the tokenizer alone {_LATER}: --revision holds for both"),
    ("hf-config-path config-format", f"a config.json from elsewhere {_LATER}; replace attributes with --hf-overrides"),
    ("rope-scaling rope-theta", 'is spelt --hf-overrides here: --hf-overrides.rope_theta 500000'),
    ("model-impl", f"a second implementation of models {_NEVER}: there is one of each"),
    ("runner convert task pooler-config override-pooler-config", f"embedding and pooling models {_LATER_MANY}"),
    ("disable-sliding-window", f"changing a model's attention {_NEVER}: windows are computed as it was trained"),
    ("attention-config", 'is spelt --attention-backend here'),
    ("disable-cascade-attn override-attention-dtype kernel-config mamba-config kv-sharing-fast-prefill",
     f"this knob of vLLM's attention {_NEVER}; see --attention-backend"),
    ("mamba-cache-dtype mamba-ssm-cache-dtype mamba-block-size mamba-cache-mode", f"state-space models {_LATER_MANY}"),
    ("logits-processors logits-processor-pattern", f"logits processors of your own {_LATER_MANY}"),
    ("enable-prompt-embeds", f"prompts as embeddings {_LATER_MANY}"),
    ("io-processor-plugin additional-config", f"a plugin interface {_NEVER}; the Python is short enough to change"),
    ("limit-mm-per-prompt enable-mm-embeds media-io-kwargs mm-processor-kwargs mm-processor-cache-gb "
     "mm-processor-cache-type disable-mm-preprocessor-cache mm-shm-cache-max-object-size-mb mm-encoder-tp-mode "
     "mm-encoder-attn-backend interleave-mm-strings skip-mm-profiling video-pruning-rate language-model-only "
     "allowed-local-media-path allowed-media-domains disable-chunked-mm-input",
     f"images, audio and video {_LATER_MANY}"),
    # pages and scheduling
    ("num-gpu-blocks-override", "is spelt in bytes here: --kv-cache-memory-bytes"),
    ("prefix-caching-hash-algo", f"a choice of hash {_NEVER}: prefixes are hashed with SHA-256"),
    ("swap-space preemption-mode", f"swapping KV pages {_NEVER}: preempted sequences are recomputed"),
    ("kv-offloading-size kv-offloading-backend", f"offloading KV pages {_LATER}"),
    ("kv-transfer-config kv-events-config ec-transfer-config", f"moving KV pages between servers {_LATER}"),
    ("disable-hybrid-kv-cache-manager", f"a KV cache manager to turn off {_NEVER}: there is one"),
    ("long-prefill-token-threshold max-num-partial-prefills max-long-partial-prefills",
     f"bounds on chunks beside --max-num-batched-tokens {_LATER_MANY}"),
    ("max-num-queued-tokens", f"a bound on queued tokens {_LATER}; --max-num-queued-reqs bounds the queue"),
    ("stream-interval", f"streaming several tokens at once {_LATER}: every token is streamed"),
    ("watermark scheduler-reserve-full-isl num-lookahead-slots num-scheduler-steps scheduler-cls",
     f"this knob of vLLM's scheduler {_NEVER}; see --help=scheduler for ours"),
    ("spec-model spec-tokens",
     'is spelt --speculative-config here: {"method": "draft_model", "model": ..., "num_speculative_tokens": ...}'),
    # compilation
    ("compilation-config cudagraph-capture-sizes cuda-graph-sizes max-cudagraph-capture-size max-seq-len-to-capture "
     "optimization-level device",
     f"this knob of vLLM's compiler {_NEVER}: all shapes are compiled ahead of time, see --enforce-eager"),
    # answers
    ("enable-auto-tool-choice tool-call-parser tool-parser-plugin tool-server exclude-tools-when-tool-choice-none",
     f"tool calling {_LATER}"),
    ("reasoning-parser reasoning-parser-plugin reasoning-effort-map", f"splitting reasoning from answers {_LATER}"),
    ("structured-outputs-config guided-decoding-backend guided-decoding-disable-fallback "
     "guided-decoding-disable-any-whitespace guided-decoding-disable-additional-properties",
     f"structured outputs {_LATER_MANY}"),
    ("response-role", f"another role than assistant for answers {_LATER}"),
    ("chat-template-content-format", f"a choice of content format {_NEVER}: text parts are joined for every template"),
    ("default-chat-template-kwargs", f"template arguments for all requests {_LATER_MANY}; send chat_template_kwargs"),
    ("trust-request-chat-template", f"a chat template in a request {_NEVER}: the server's own is used"),
    ("return-tokens-as-token-ids", f"token ids in place of tokens {_LATER_MANY}; ask for return_token_ids"),
    ("enable-force-include-usage", f"usage that nobody asked for {_LATER}; send stream_options.include_usage"),
    ("tokens-only enable-scale-out", "is spelt --skip-tokenizer-init here: token ids in and out"),
    # HTTP
    ("api-server-count headless disable-frontend-multiprocessing",
     f"another number of API processes than one {_LATER}"),
    ("middleware", f"middleware of your own {_LATER}"),
    ("allowed-methods allowed-headers allow-credentials",
     f"narrowing CORS beyond --allowed-origins {_LATER}; a proxy in front can"),
    ("ssl-ca-certs ssl-cert-reqs ssl-ciphers enable-ssl-refresh",
     f"TLS beyond --ssl-keyfile and --ssl-certfile {_LATER}; a proxy in front can"),
    ("h11-max-incomplete-event-size h11-max-header-count", f"bounds on HTTP headers {_LATER_MANY}"),
    ("sse-keep-alive-interval", f"keep-alive comments in streams {_LATER_MANY}"),
    ("grpc grpc-port", f"gRPC {_LATER}"),
    ("disable-fastapi-docs enable-offline-docs", f"turning /docs off {_LATER}; with --api-key it wants a key"),
    ("enable-tokenizer-info-endpoint", f"/tokenizer_info {_LATER}"),
    ("enable-server-load-tracking", "is always on here: /load counts"),
    ("enable-request-id-headers", f"switching the X-Request-Id header {_LATER}"),
    ("fingerprint-mode", f"a choice of system_fingerprint {_LATER}"),
    # logs and metrics
    ("disable-log-stats aggregate-engine-logging enable-logging-iteration-details",
     f"a switch for the throughput line {_LATER}; --log-level warning silences it"),
    ("disable-log-requests", "is the default here: --enable-log-requests turns request lines on"),
    ("uvicorn-log-level disable-uvicorn-access-log disable-access-log-for-endpoints",
     "is spelt --log-level here; there is no access log beside --enable-log-requests"),
    ("enable-log-outputs max-log-len log-config-file log-error-stack",
     f"logging texts of requests and answers {_NEVER}; --enable-log-requests logs sizes and parameters"),
    ("enable-per-request-metrics", f"metrics in answers {_LATER_MANY}; /metrics has the totals"),
    ("otlp-traces-endpoint collect-detailed-traces enable-layerwise-nvtx-tracing",
     f"tracing {_LATER}; /metrics has the figures"),
    ("profiler-config", "is spelt --profile FOLDER here: operations are traced under their names in the source"),
    ("show-hidden-metrics-for-version kv-cache-metrics kv-cache-metrics-sample cudagraph-metrics enable-mfu-metrics "
     "custom-histogram-buckets", f"this choice of metrics {_LATER}; /metrics has the figures"),
)

UNSUPPORTED: dict[str, str] = {name: reason for names, reason in REASONS for name in names.split()}

SHORT_UNSUPPORTED: dict[str, str] = {
    "-pp": "pipeline-parallel-size", "-dpn": "data-parallel-rank",
    "-dpr": "data-parallel-start-rank", "-dpl": "data-parallel-size-local", "-dpa": "data-parallel-address",
    "-dpp": "data-parallel-rpc-port", "-dpb": "data-parallel-backend", "-dph": "data-parallel-hybrid-lb",
    "-dpe": "data-parallel-external-lb", "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size",
    "-cc": "compilation-config", "-ac": "attention-config", "-asc": "api-server-count",
}
