"""Tiny random models of every supported family, as Hugging Face folders and as GGUF files.

Weights are a function of the family's name alone (NumPy's PCG64, seeded), so a recorded value and a
test always speak of the same model. Imported by the recipes too: NumPy, safetensors, tokenizers and
gguf only, never torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

Tensors = dict[str, npt.NDArray[np.float32]]
Config = dict[str, Any]

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are tiny.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_COMMON: Config = {
    "hidden_act": "silu",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(**changes: Any) -> Config:
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {**base, **_COMMON, **changes}


FAMILIES: Mapping[str, Config] = {
    "llama": _llama(),
    "llama-mha-tied": _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-bias": _llama(attention_bias=True),
    "llama-linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": _llama(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    ),
    "llama-yarn": _llama(
        rope_theta=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "mistral": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 24,
    },
    "qwen2": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 32,
        "max_window_layers": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": False,
    },
}


def tiny_config(family: str) -> Config:
    """The `config.json` of a family in `FAMILIES`."""
    return {key: value for key, value in FAMILIES[family].items() if value is not None} | (
        {"sliding_window": None} if family == "mistral" else {}
    )


def tiny_tensors(family: str) -> Tensors:
    """Random float32 weights under Hugging Face names.

    Scales are far above a trained model's start, so that attention is peaked: a wrong mask or a wrong
    angle moves the logits by much more than rounding does.
    """
    config = tiny_config(family)
    rng = np.random.default_rng(zlib.crc32(family.encode()))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    output_bias = config.get("attention_bias", False)
    tensors: Tensors = {}

    def matrix(name: str, rows: int, columns: int, gain: float) -> None:
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        tensors[name] = values.astype(np.float32)

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = (mean + 0.2 * rng.standard_normal(size)).astype(np.float32)

    matrix("model.embed_tokens.weight", config["vocab_size"], hidden, 4.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        vector(prefix + "input_layernorm.weight", hidden, 1.0)
        matrix(attention + "q_proj.weight", q_size, hidden, 1.5)
        matrix(attention + "k_proj.weight", kv_size, hidden, 1.5)
        matrix(attention + "v_proj.weight", kv_size, hidden, 1.0)
        if qkv_bias:
            vector(attention + "q_proj.bias", q_size, 0.0)
            vector(attention + "k_proj.bias", kv_size, 0.0)
            vector(attention + "v_proj.bias", kv_size, 0.0)
        if config["model_type"] == "qwen3":
            vector(attention + "q_norm.weight", head_dim, 1.3)
            vector(attention + "k_norm.weight", head_dim, 1.3)
        matrix(attention + "o_proj.weight", hidden, q_size, 1.0)
        if output_bias:
            vector(attention + "o_proj.bias", hidden, 0.0)
        vector(prefix + "post_attention_layernorm.weight", hidden, 1.0)
        matrix(prefix + "mlp.gate_proj.weight", inner, hidden, 1.0)
        matrix(prefix + "mlp.up_proj.weight", inner, hidden, 1.0)
        matrix(prefix + "mlp.down_proj.weight", hidden, inner, 1.0)
    vector("model.norm.weight", hidden, 1.0)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], hidden, 2.0)
    return tensors


def tiny_token_ids(family: str, count: int) -> npt.NDArray[np.int32]:
    """The token ids that recorded logits of `family` were computed for: int32 [count]."""
    rng = np.random.default_rng(zlib.crc32(b"tokens of " + family.encode()))
    return rng.integers(3, VOCAB_SIZE, size=count).astype(np.int32)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with exactly `VOCAB_SIZE` entries, ChatML special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        "system user assistant You are a tiny model and the window slides over the long "
        "conversation while the sinks stay where they are. In the beginning was the word. "
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer


def write_hf_folder(
    folder: Path,
    family: str = "llama",
    *,
    config: Config | None = None,
    tensors: Tensors | None = None,
    shards: int = 1,
) -> Path:
    """Write a Hugging Face folder: config, float32 safetensors, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family) if config is None else config
    tensors = tiny_tensors(family) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            mine = names[shard::shards]
            save_file({name: tensors[name] for name in mine}, folder / file)
            weight_map.update(dict.fromkeys(mine, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensor_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def interleave_rows(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """The q/k row order of llama.cpp's `llama` architecture (its convert script's `permute`)."""
    per_head = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(per_head.swapaxes(1, 2).reshape(values.shape))


def llama3_divisors(config: Config) -> npt.NDArray[np.float32]:
    """`rope_freqs.weight` as llama.cpp's convert script writes it: float32 [head_dim / 2]."""
    scaling = config["rope_scaling"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    old_context = scaling["original_max_position_embeddings"]
    divisors = []
    for frequency in 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < old_context / scaling["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > old_context / scaling["low_freq_factor"]:
            divisors.append(scaling["factor"])
        else:
            smooth = (old_context / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            divisors.append(1.0 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def write_gguf(
    file: Path,
    family: str = "llama",
    *,
    extra: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    quantise: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write the same model as a GGUF file, as llama.cpp's convert script would.

    Checked once: from these files llama.cpp (llama-cpp-python 0.3.36, float32) computes the logits that
    transformers computes from the folders, to 4e-5 in every family. `extra` adds, replaces or (None)
    drops metadata (`{arch}` in a key is filled in); matrices are stored as `quantise`, except those
    whose width no block fits.
    """
    config = tiny_config(family)
    tensors = tiny_tensors(family) if tensors is None else tensors
    arch = "llama" if config["model_type"] == "mistral" else str(config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, arch)
    for key, value in _gguf_metadata(config, arch, head_dim, extra or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    if config.get("rope_scaling", {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, values in tensors.items():
        if arch == "llama" and ".q_proj." in name:
            values = interleave_rows(values, heads)
        if arch == "llama" and ".k_proj." in name:
            values = interleave_rows(values, kv_heads)
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            packed = gguf.quantize(values, quantise)
            writer.add_tensor(gguf_tensor_name(name), packed, raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_tensor_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_metadata(
    config: Config, arch: str, head_dim: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    fields: dict[str, Any] = {
        "general.name": f"tiny {arch}",
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": float(theta),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("linear", "yarn"):
        fields[f"{arch}.rope.scaling.type"] = kind
        fields[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        fields[f"{arch}.rope.scaling.original_context_length"] = original
    fields.update({key.replace("{arch}", arch): value for key, value in extra.items()})
    return {key: value for key, value in fields.items() if value is not None}
