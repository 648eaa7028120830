"""How long a step must take at least: its products, the bytes it reads and what devices tell each other.

Counts what one device does, from its parameters' shapes and its part of the model; then divides by published peaks.
Assumed, and printed with the figures: peaks are reached; reading and multiplying overlap wholly, messages not at all;
each token goes to experts of its own choice, all equally likely; nothing is padded; the host keeps up.
Invariant: an upper bound of tokens a second, never a promise. Nothing here has been measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from jaxserve.core.model_spec import LatentAttention, LayerSpec, ModelSpec, MoeMlp, SlidingWindow
from jaxserve.plan.devices import Devices
from jaxserve.plan.sizes import Sized

# Seconds until a message of no length has been to every device and back: assumed, not published.
LINK_LATENCY_S, NETWORK_LATENCY_S = 10e-6, 30e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Attributes:
    tokens: of all sequences together.  samples: sequences that get a token.
    context: positions that each token sees, its own included.
    """

    tokens: int
    samples: int
    context: float

    @classmethod
    def decode(cls, batch: int, context: int) -> Step:
        return cls(tokens=batch, samples=batch, context=context)

    @classmethod
    def prefill(cls, tokens: int, prompt: int) -> Step:
        """Whole prompts: a token sees half of its own on average."""
        return cls(tokens=tokens, samples=max(1, tokens // prompt), context=(prompt + 1) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """Of one step: all-reduces of the stream, and one all-to-all of the logits. Bytes before they are shared out."""

    reduce_count: int = 0
    reduce_bytes: int = 0         # of all of them
    logits_bytes: int = 0         # that a device has and shares out
    gather_bytes: int = 0         # sampled tokens

    @property
    def count(self) -> int:
        return self.reduce_count + (2 if self.logits_bytes else 0)

    @property
    def total_bytes(self) -> int:
        return self.reduce_bytes + self.logits_bytes + self.gather_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Seconds of one step, by what they are spent on. `tokens_s` is of one replica."""

    step: Step
    multiply_s: float
    read_s: float
    messages_s: float
    messages: Messages

    @property
    def seconds(self) -> float:
        return max(self.multiply_s, self.read_s) + self.messages_s

    @property
    def tokens_s(self) -> float:
        return self.step.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        spent = {"products": self.multiply_s, "memory": self.read_s, "messages": self.messages_s}
        return max(spent, key=lambda name: spent[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """Bounds of one replica's steps."""

    sized: Sized
    devices: Devices

    def bound(self, step: Step) -> Bound | None:
        """None where the device's figures are not published."""
        kind = self.devices.kind
        if kind.bandwidth is None:
            return None
        setup, spec = self.sized.setup, self.sized.setup.spec
        products, read = _linear(self.sized, step)
        products[setup.dtype.itemsize] += int(_attention_products(spec, step))
        read += _cache_bytes(self.sized, step)
        multiply_s = 0.0
        for itemsize, count in products.items():
            rate = kind.rate(itemsize)
            assert rate is not None, (kind.name, itemsize)
            multiply_s += count / rate
        sent = messages(self.sized, step)
        return Bound(
            step=step, multiply_s=multiply_s, read_s=read / kind.bandwidth,
            messages_s=_messages_s(sent, setup.mesh.size, self.devices), messages=sent,
        )


def messages(sized: Sized, step: Step) -> Messages:
    """What one device of a replica sends in a step."""
    setup, spec = sized.setup, sized.setup.spec
    devices = setup.mesh.size
    if devices == 1:
        return Messages()
    stream = step.tokens * spec.width * setup.dtype.itemsize
    # Norms over all heads add up one float32 a token each for queries and keys.
    whole_norms = 2 * sum(_norms_all_heads(layer) for layer in spec.layers)
    streams = 1 + sum(_reduces(layer) for layer in spec.layers)
    rows = -(-step.samples // devices) * devices
    return Messages(
        reduce_count=streams + whole_norms, reduce_bytes=streams * stream + whole_norms * step.tokens * 4,
        logits_bytes=rows * spec.vocab_size * 4, gather_bytes=rows * 4,
    )


def _reduces(layer: LayerSpec) -> int:
    """All-reduces of the stream: attention, the MLP, and a mixture's shared MLP by itself."""
    return 3 if isinstance(layer.mlp, MoeMlp) and layer.mlp.shared is not None else 2


def _norms_all_heads(layer: LayerSpec) -> bool:
    a = layer.attention
    return not isinstance(a, LatentAttention) and a.head_norm is not None and a.head_norm.over == "all heads"


def _linear(sized: Sized, step: Step) -> tuple[Counter[int], float]:
    """Operations of the products with parameters, by bytes of an operand, and the bytes of parameters that are read."""
    spec = sized.setup.spec
    products: Counter[int] = Counter()
    read = 0.0
    for parameter in sized.parameters():
        path = parameter.path
        is_table = path[0] in ("embedding", "positions")
        is_head = path[0] == "head" or (path[0] == "embedding" and spec.is_tied)
        if is_table:
            read += step.tokens * spec.width * parameter.itemsize       # the rows of the step's tokens
        if is_table and not is_head:
            continue
        used, touched = float(step.samples if is_head else step.tokens), 1.0
        if path[-1].startswith("experts_"):
            mlp = spec.layers[int(path[0].removeprefix("layers_"))].mlp
            assert isinstance(mlp, MoeMlp)
            part = mlp.chosen / mlp.experts.count
            used, touched = step.tokens * part, 1 - (1 - part) ** step.tokens
        read += parameter.byte_count * touched
        products[parameter.itemsize] += int(2 * parameter.product_size * used)
    return products, read


def _attention_products(spec: ModelSpec, step: Step) -> float:
    """Scores and weighted values of every layer."""
    total = 0.0
    for layer in spec.layers:
        a = layer.attention
        seen = min(step.context, a.span.size) if isinstance(a.span, SlidingWindow) else step.context
        if isinstance(a, LatentAttention):
            total += 2 * a.head_count * (2 * a.latent_dim + a.rope_dim) * seen
        else:
            total += 4 * a.head_count * a.head_dim * seen
    return total * step.tokens


def _cache_bytes(sized: Sized, step: Step) -> float:
    """Keys and values: a sequence's read once for all its tokens of the step, the step's own written."""
    memory = sized.setup.memory
    total = 0.0
    for group in memory.groups:
        token = group.page_bytes / memory.page_size
        seen = step.context if group.window is None else min(step.context, group.window)
        total += token * (step.samples * seen + step.tokens)
    return total


def _messages_s(sent: Messages, devices: int, of: Devices) -> float:
    """A ring within machines, then between machines by every device's own adapter with its part of the message."""
    if devices == 1:
        return 0.0
    kind = of.kind
    near = min(devices, of.per_host)
    far = -(-devices // near)
    assert kind.link is not None and kind.network is not None
    seconds = sent.count * (LINK_LATENCY_S + (NETWORK_LATENCY_S if far > 1 else 0))
    reduced, exchanged = 2 * sent.reduce_bytes, sent.logits_bytes + sent.gather_bytes
    seconds += (reduced + exchanged) * (near - 1) / near / kind.link
    return seconds + (reduced / near + exchanged) * (far - 1) / far / kind.network
