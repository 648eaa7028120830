"""Every flag of vLLM is either this project's or refused with a sentence of its own."""

from __future__ import annotations

import re

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.flags import parse_serve_args
from jaxserve.flags.table import BY_NAME, BY_SHORT
from jaxserve.flags.unsupported import REASONS, SHORT_UNSUPPORTED, UNSUPPORTED

# What operators pass to vLLM's server, by its own groups.
VLLM = """
host port uds api-key served-model-name chat-template chat-template-content-format default-chat-template-kwargs
trust-request-chat-template response-role enable-auto-tool-choice tool-call-parser tool-parser-plugin reasoning-parser
reasoning-effort-map return-tokens-as-token-ids enable-prompt-tokens-details enable-force-include-usage
enable-per-request-metrics enable-server-load-tracking enable-log-requests enable-log-outputs max-log-len
disable-log-stats uvicorn-log-level disable-uvicorn-access-log disable-access-log-for-endpoints root-path middleware
enable-request-id-headers allowed-origins allowed-methods allowed-headers allow-credentials ssl-keyfile ssl-certfile
ssl-ca-certs ssl-cert-reqs lora-modules api-server-count headless sse-keep-alive-interval log-error-stack
disable-fastapi-docs enable-tokenizer-info-endpoint fingerprint-mode shutdown-timeout grpc grpc-port enable-scale-out
model tokenizer tokenizer-mode trust-remote-code dtype max-model-len seed revision code-revision tokenizer-revision
hf-token hf-overrides hf-config-path quantization enforce-eager max-logprobs logprobs-mode generation-config
override-generation-config skip-tokenizer-init runner convert model-impl logits-processors enable-sleep-mode
disable-sliding-window load-format download-dir ignore-patterns use-tqdm-on-load safetensors-load-strategy
gpu-memory-utilization kv-cache-memory-bytes kv-cache-dtype block-size enable-prefix-caching prefix-caching-hash-algo
num-gpu-blocks-override kv-offloading-size kv-offloading-backend cpu-offload-gb calculate-kv-scales max-num-seqs
max-num-batched-tokens enable-chunked-prefill long-prefill-token-threshold scheduling-policy max-num-queued-reqs
max-num-queued-tokens stream-interval async-scheduling watermark disable-hybrid-kv-cache-manager tensor-parallel-size
pipeline-parallel-size data-parallel-size data-parallel-rank data-parallel-start-rank data-parallel-size-local
data-parallel-address data-parallel-rpc-port data-parallel-backend enable-expert-parallel distributed-executor-backend
nnodes node-rank master-addr master-port prefill-context-parallel-size decode-context-parallel-size enable-eplb
all2all-backend enable-dbo enable-lora max-loras max-lora-rank max-cpu-loras lora-dtype
fully-sharded-loras structured-outputs-config otlp-traces-endpoint collect-detailed-traces
show-hidden-metrics-for-version kv-cache-metrics custom-histogram-buckets profiler-config compilation-config
cudagraph-capture-sizes attention-config kernel-config mamba-config limit-mm-per-prompt
mm-processor-kwargs kv-transfer-config ec-transfer-config rope-scaling rope-theta swap-space
""".split()


@pytest.mark.parametrize("name", sorted(set(VLLM) - set(BY_NAME)))
def test_flags_of_vllm_are_refused_by_name(name: str) -> None:
    for words in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name.replace('-', '_')}"]):
        with pytest.raises(ConfigError) as raised:
            parse_serve_args(["m", *words])
        assert str(raised.value) == f"--{name}: {UNSUPPORTED[name]}."


@pytest.mark.parametrize("short", [*SHORT_UNSUPPORTED, "-O", "-O3"])
def test_short_flags_of_vllm_are_refused_by_their_long_name(short: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_serve_args(["m", short, "1"])
    name = SHORT_UNSUPPORTED.get(short, "optimization-level")
    assert str(raised.value) == f"--{name}: {UNSUPPORTED[name]}."


def test_dotted_and_negated_forms_are_refused_as_well() -> None:
    with pytest.raises(ConfigError, match=r"^--compilation-config: "):
        parse_serve_args(["m", "--compilation-config.mode", "3"])
    with pytest.raises(ConfigError, match=r"^--no-enable-dbo: moving experts"):
        parse_serve_args(["m", "--no-enable-dbo"])


def test_the_list_is_sound() -> None:
    names = [name for group, _ in REASONS for name in group.split()]
    assert len(names) == len(set(names)), "a name has two reasons"
    assert not set(names) & set(BY_NAME) and not set(SHORT_UNSUPPORTED) & set(BY_SHORT)
    assert set(SHORT_UNSUPPORTED.values()) <= set(names)
    spelt = {flag for _, reason in REASONS for flag in re.findall(r"--([a-z][a-z-]+)", reason)}
    assert spelt - {"help"} <= set(BY_NAME), "a reason sends the reader to a flag that does not exist"
