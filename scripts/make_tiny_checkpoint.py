"""Makes the tiny random checkpoints of tests/fixtures, each with its tokenizer and transformers' own float32 logits.

Needs `pip install torch transformers`; run it only to make fixtures anew:
    python scripts/make_tiny_checkpoint.py tests/fixtures
Seeds are searched until every greedy margin is clear. Each folder holds a model as transformers 5 writes it, the same
config as transformers 4 wrote it (config.v4.json), reference.json (prompts, greedy tokens, margins) and
reference.safetensors (logits of every prompt position).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from record_reference import load, record
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCAB = 320
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARGIN_MIN = 0.02
GREEDY_TOKENS = 16
PROMPT_LENGTHS = (1, 5, 17, 40)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "system user assistant: you are a helpful assistant that answers the question in one sentence.",
    "What is the capital of France? The capital of France is Paris.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

# name -> (classes, config, torch dtype on disk, files)
CHECKPOINTS: dict[str, tuple[Any, Any, dict[str, Any], torch.dtype, int]] = {
    "tiny-llama3": (
        LlamaForCausalLM, LlamaConfig,
        dict(head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=False), torch.bfloat16, 1,
    ),
    "tiny-llama-tied": (
        LlamaForCausalLM, LlamaConfig,
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=True), torch.float16, 1,
    ),
    "tiny-llama-bias-sharded": (
        LlamaForCausalLM, LlamaConfig,
        dict(
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0), tie_word_embeddings=False,
            attention_bias=True, mlp_bias=True,
        ), torch.bfloat16, 3,
    ),
    "tiny-qwen2": (
        Qwen2ForCausalLM, Qwen2Config,
        dict(rope_parameters=dict(rope_type="default", rope_theta=1000000.0), tie_word_embeddings=True),
        torch.bfloat16, 1,
    ),
    "tiny-qwen2-window": (
        Qwen2ForCausalLM, Qwen2Config,
        dict(
            rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False,
            use_sliding_window=True, sliding_window=8, max_window_layers=1,
        ), torch.bfloat16, 1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny checkpoints of the tests.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=sorted(CHECKPOINTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)     # for models this small, threads only wait for each other
    for name in [arguments.only] if arguments.only else CHECKPOINTS:
        make(name, arguments.output / name)


def make(name: str, folder: Path) -> None:
    """One folder; tries seeds until all greedy margins are clear."""
    model_class, config_class, fields, dtype, shard_count = CHECKPOINTS[name]
    for seed in range(1000):
        torch.manual_seed(seed)
        config = config_class(**SIZES, **fields)
        model = model_class(config)
        randomise(model)
        shutil.rmtree(folder, ignore_errors=True)
        size = sum(p.numel() for p in model.parameters()) * 2
        model.to(dtype).save_pretrained(folder, max_shard_size=size if shard_count == 1 else size // shard_count)
        model = load(folder)     # with the values as rounded on disk
        prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in PROMPT_LENGTHS]
        cases = []
        for prompt in prompts:
            case = record(model, prompt, GREEDY_TOKENS)
            if min(case["margins"]) < MARGIN_MIN or len(set(case["token_ids"])) <= 4:
                break
            cases.append(case)
        if len(cases) == len(prompts):
            break
    else:
        raise SystemExit(f"{name}: no seed gives margins of {MARGIN_MIN}")
    margin = min(min(case["margins"]) for case in cases)
    print(f"{name}: seed {seed}, smallest margin {margin:.3f}, {sum(p.stat().st_size for p in folder.iterdir())} bytes")
    (folder / "reference.json").write_text(json.dumps({"seed": seed, "dtype": "float32", "cases": cases}) + "\n")
    with torch.inference_mode():
        logits = {f"logits_{i}": model(torch.tensor([prompt])).logits[0].clone() for i, prompt in enumerate(prompts)}
    save_file(logits, folder / "reference.safetensors")
    write_version_4_config(folder)
    write_tokenizer(folder)


def randomise(model: Any) -> None:
    """Values that make every parameter matter: default initialisation has zero biases, unit norms, flat logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 1.5 * parameter.shape[1] ** -0.5)


def write_version_4_config(folder: Path) -> None:
    """The same config in the spelling before transformers 5."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.46.0"
    (folder / "config.v4.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE over a few sentences, with ChatML: every text has ids, every id below the last has a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[1], "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0], "unk_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
