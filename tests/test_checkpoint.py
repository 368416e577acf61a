from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from engine_build.checkpoint import read_checkpoint
from engine_build.hf_config import shape_from_config
from engine_build.spec import EngineSpec, ModelShape, RopeSpec, SpecError
from engine_build.tensors import Checkpoint, expected_tensors
from tests.tiny_models import (
    FAMILIES,
    tiny_config,
    tiny_tensors,
    tiny_token_ids,
    write_gguf,
    write_hf_folder,
)

DATA = Path(__file__).parent / "data"
Floats = npt.NDArray[np.floating[Any]]


def read_family(kind: str, family: str, folder: Path) -> Checkpoint:
    if kind == "gguf":
        return read_checkpoint(write_gguf(folder / "model.gguf", family))
    return read_checkpoint(write_hf_folder(folder / "model", family, shards=int(kind[-1])))


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf1", "hf3", "gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_read_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    checkpoint = read_family(kind, family, tmp_path)
    written = tiny_tensors(family)
    assert set(checkpoint.tensors) == set(written)
    for name, values in written.items():
        read = checkpoint.tensors[name]
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_and_folder_of_one_model_describe_the_same_decoder(
    family: str, tmp_path: Path
) -> None:
    folder = read_family("hf1", family, tmp_path).shape
    file = read_family("gguf", family, tmp_path).shape
    np.testing.assert_allclose(
        file.rope.inverse_frequencies(), folder.rope.inverse_frequencies(), rtol=2e-7
    )
    assert file.rope.cos_sin_scale() == folder.rope.cos_sin_scale()
    assert same_but_rope(file) == same_but_rope(folder)


def same_but_rope(shape: ModelShape) -> tuple[object, ...]:
    fields = (f for f in ModelShape.__dataclass_fields__ if f not in ("rope", "architecture"))
    return tuple(getattr(shape, field) for field in fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_computes_the_same_logits_from_what_was_read(
    family: str, tmp_path: Path
) -> None:
    recorded = np.load(DATA / "stock_logits_tiny.npz")
    positions, expected = recorded[f"{family}/positions"], recorded[f"{family}/logits"]
    checkpoint = read_family("gguf", family, tmp_path)
    logits = slow_forward(checkpoint, tiny_token_ids(family, 48), np.float64)
    np.testing.assert_allclose(logits[positions], expected, rtol=0, atol=5e-5)


def test_demo_model_as_read_gives_the_logits_of_stock_transformers(demo_gguf: Path) -> None:
    recorded = json.loads((DATA / "stock_logits_smollm2.json").read_text())
    checkpoint = read_checkpoint(demo_gguf)
    ids = np.array(recorded["token_ids"], dtype=np.int32)
    logits = slow_forward(checkpoint, ids, np.float32)
    for row in recorded["rows"]:
        mine = logits[row["position"]]
        assert np.argsort(-mine)[:5].tolist() == row["top_ids"]
        np.testing.assert_allclose(mine[recorded["logit_ids"]], row["logits"], rtol=0, atol=2e-3)


def slow_forward(
    checkpoint: Checkpoint, ids: npt.NDArray[np.int32], dtype: type[np.floating[Any]]
) -> Floats:
    """Dense causal forward of a whole text, one head at a time: [tokens, vocab]."""
    shape = checkpoint.shape
    length, half = len(ids), shape.head_dim // 2
    angles = np.arange(length)[:, None] * shape.rope.inverse_frequencies()
    cos = (np.cos(angles) * shape.rope.cos_sin_scale()).astype(dtype)
    sin = (np.sin(angles) * shape.rope.cos_sin_scale()).astype(dtype)

    def weight(name: str) -> Floats:
        return checkpoint.tensors[name].astype(dtype)

    def linear(values: Floats, name: str) -> Floats:
        product = values @ weight(name + ".weight").T
        has_bias = name + ".bias" in checkpoint.tensors
        return product + weight(name + ".bias") if has_bias else product

    def norm(values: Floats, name: str) -> Floats:
        mean = np.mean(values**2, axis=-1, keepdims=True)
        scaled: Floats = values / np.sqrt(mean + dtype(shape.rms_norm_eps)) * weight(name)
        return scaled

    def rotate(values: Floats) -> Floats:
        left, right = values[:, :half], values[:, half:]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)

    def heads(values: Floats, normed: str) -> list[Floats]:
        split = np.split(values, values.shape[1] // shape.head_dim, axis=1)
        return [rotate(norm(head, normed) if shape.qk_norm else head) for head in split]

    hidden: Floats = weight("model.embed_tokens.weight")[ids]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        x = norm(hidden, prefix + "input_layernorm.weight")
        queries = heads(linear(x, attention + "q_proj"), attention + "q_norm.weight")
        keys = heads(linear(x, attention + "k_proj"), attention + "k_norm.weight")
        values = np.split(linear(x, attention + "v_proj"), shape.num_kv_heads, axis=1)
        mixed = []
        for index, query in enumerate(queries):
            shared = index // shape.heads_per_kv_head
            scores = query @ keys[shared].T / np.sqrt(dtype(shape.head_dim))
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ values[shared])
        hidden = hidden + linear(np.concatenate(mixed, axis=1), attention + "o_proj")
        x = norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = linear(x, prefix + "mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * linear(x, prefix + "mlp.up_proj")
        hidden = hidden + linear(inner, prefix + "mlp.down_proj")
    hidden = norm(hidden, "model.norm.weight")
    head = "model.embed_tokens" if shape.tied_head else "lm_head"
    return linear(hidden, head)


@pytest.mark.parametrize(("dtype", "item"), [("F16", np.float16), ("BF16", np.uint16)])
def test_half_precision_folders_are_widened_exactly(
    dtype: str, item: type[Any], tmp_path: Path
) -> None:
    tensors = tiny_tensors("llama")
    folder = write_hf_folder(tmp_path, "llama")
    bits = {name: values.view(np.uint32) for name, values in tensors.items()}
    halves = {
        name: tensors[name].astype(item) if dtype == "F16" else (bits[name] >> 16).astype(item)
        for name in tensors
    }
    write_raw_safetensors(folder / "model.safetensors", halves, dtype)
    read = read_checkpoint(folder).tensors
    for name, values in halves.items():
        wide = values.astype(np.float32) if dtype == "F16" else (bits[name] >> 16 << 16)
        np.testing.assert_array_equal(read[name], wide.view(np.float32))


def write_raw_safetensors(file: Path, tensors: dict[str, npt.NDArray[Any]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, values in tensors.items():
        end = start + values.nbytes
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    body = b"".join(values.tobytes() for values in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_gguf_is_near_its_original(kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "model.gguf", "llama", quantise=quantisation)
    read = read_checkpoint(file).tensors
    for name, values in tiny_tensors("llama").items():
        blocks = values.reshape(-1, 32) if values.ndim == 2 else values[None]
        spread = np.ptp(blocks, axis=1).max() if values.ndim == 2 else 0.0
        step = {"Q8_0": 1 / 100, "Q4_1": 1 / 25, "F16": 1 / 900, "BF16": 1 / 200}[kind]
        assert np.abs(read[name] - values).max() <= spread * step, name


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((DATA / "stock_rope.json").read_text()).items())
def test_rope_equals_transformers(case: tuple[str, dict[str, Any]]) -> None:
    _, recorded = case
    rope = shape_from_config(recorded["config"]).rope
    # transformers computes frequencies in float32: 4e-7 is its rounding, not ours.
    np.testing.assert_allclose(
        rope.inverse_frequencies(), recorded["inverse_frequencies"], rtol=4e-7
    )
    assert rope.cos_sin_scale() == pytest.approx(recorded["cos_sin_scale"], rel=1e-12)


def test_yarn_settings_of_a_gguf_are_read(tmp_path: Path) -> None:
    extra = {
        "{arch}.rope.scaling.yarn_beta_fast": 16.0,
        "{arch}.rope.scaling.yarn_beta_slow": 2.0,
    }
    file = write_gguf(tmp_path / "model.gguf", "llama-yarn", extra=extra)
    assert read_checkpoint(file).shape.rope == RopeSpec(
        theta=500.0,
        rotary_dim=16,
        scaling="yarn",
        factor=4.0,
        original_max_positions=256,
        beta_fast=16.0,
        beta_slow=2.0,
    )


def test_rope_divisors_survive_the_spec_file() -> None:
    rope = RopeSpec(1e4, 8, scaling="divisors", frequency_divisors=(1.0, 1.5, 4.0, 8.0))
    shape = shape_from_config(tiny_config("llama"))
    fields = {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
    spec = EngineSpec(model=ModelShape(**{**fields, "rope": rope}), capacity=32, max_chunk=8)
    again = EngineSpec.from_json(spec.to_json())
    assert again == spec
    np.testing.assert_allclose(
        again.model.rope.inverse_frequencies(), [1.0, 0.1 / 1.5, 0.01 / 4, 0.001 / 8]
    )


def test_what_comes_with_the_weights_is_read(tmp_path: Path) -> None:
    folder = read_checkpoint(write_hf_folder(tmp_path / "tiny-llama", "llama"))
    assert folder.name == "tiny-llama"
    assert folder.trained_tokens == 4096
    assert folder.generation == {"temperature": 0.6, "top_p": 0.9}
    assert folder.text.eos_ids == (0, 2)
    file = read_checkpoint(write_gguf(tmp_path / "model.gguf", "llama"))
    assert file.name == "tiny llama"
    assert file.trained_tokens == 4096
    assert file.text.chat_template == folder.text.chat_template
    text = "the window slides <|im_end|> ü"
    assert file.text.tokenizer.encode(text).ids == folder.text.tokenizer.encode(text).ids


# Configurations as published, and the parameter counts that their makers state.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
        134_515_008,
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.3": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_models_of_the_published_size(name: str) -> None:
    config, parameters = PUBLISHED[name]
    sizes = expected_tensors(shape_from_config(config)).values()
    assert sum(math.prod(size) for size in sizes) == parameters


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

REFUSED_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gemma2"}, "model_type"),
    ("llama", {"model_type": None}, "model_type"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"num_attention_heads": 5}, "hidden_size"),
    ("llama", {"head_dim": 15}, "head_dim"),
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": 64.0}, "hidden_size"),
    ("llama", {"hidden_size": None}, "hidden_size"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("llama", {"vocab_size": "320"}, "vocab_size"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"rope_theta": 1.0}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor",
    ),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
    ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [4]}}, "rope_type"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ("mistral", {"sliding_window": 4096}, "sliding_window"),
    ("mistral", {"num_key_value_heads": None}, "num_key_value_heads"),
    ("qwen2", {"use_sliding_window": True}, "sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"use_sliding_window": True}, "sliding_window"),
]


@pytest.mark.parametrize(("family", "changes", "field"), REFUSED_CONFIGS)
def test_an_unsupported_config_is_refused_by_field(
    family: str, changes: dict[str, Any], field: str
) -> None:
    assert shape_from_config(tiny_config(family)).vocab_size == 320
    with pytest.raises(SpecError) as refused:
        shape_from_config({**tiny_config(family), **changes})
    assert field in refused.value.field
    assert refused.value.fix


def test_mistral_without_the_key_means_a_window_of_4096() -> None:
    config = tiny_config("mistral")
    del config["sliding_window"]
    with pytest.raises(SpecError, match="sliding_window"):
        shape_from_config(config)


# --- damaged and unsafe checkpoints --------------------------------------------------------------


def drop_tensor(folder: Path) -> None:
    tensors = tiny_tensors("llama")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def misshape_tensor(folder: Path) -> None:
    tensors = tiny_tensors("llama")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = tiny_tensors("llama") | {"model.layers.0.mlp.up_proj.bias": np.zeros(96, np.float32)}
    save_file(tensors, folder / "model.safetensors")


def store_bytes(folder: Path) -> None:
    tensors = {name: v.astype(np.int8) for name, v in tiny_tensors("llama").items()}
    save_file(tensors, folder / "model.safetensors")


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garble_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"\xff{}]")


def garble_entry(folder: Path) -> None:
    text = b'{"lm_head.weight": {"dtype": "F32", "shape": [1]}}'
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def two_files_without_index(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def index_that_leaves_the_folder(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_pickles(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00001.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_a_missing_file(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (drop_tensor, "model.layers.2.mlp.up_proj.weight"),
        (misshape_tensor, "lm_head.weight"),
        (add_tensor, "model.layers.0.mlp.up_proj.bias"),
        (store_bytes, "weight"),
        (cut_weights, "model.safetensors"),
        (cut_header, "model.safetensors"),
        (empty_weights, "model.safetensors"),
        (garble_header, "model.safetensors"),
        (garble_entry, "model.safetensors"),
        (only_pickle, "pytorch_model.bin"),
        (no_weights, "*.safetensors"),
        (two_files_without_index, "model.safetensors.index.json"),
        (index_that_leaves_the_folder, "weight_map"),
        (index_of_pickles, "weight_map"),
        (index_of_a_missing_file, "model-00001-of-00002.safetensors"),
        (garble_config, "config.json"),
        (list_config, "config.json"),
        (no_config, "config.json"),
        (no_tokenizer, "tokenizer.json"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    damage: Callable[[Path], None], field: str, tmp_path: Path
) -> None:
    folder = write_hf_folder(tmp_path, "llama")
    damage(folder)
    with pytest.raises(SpecError) as refused:
        read_checkpoint(folder)
    assert field in refused.value.field


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"general.architecture": "gemma"}, "general.architecture"),
        ({"split.count": 2}, "split.count"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"{arch}.context_length": None}, "llama.context_length"),
        ({"{arch}.expert_count": 8}, "llama.expert_count"),
        ({"{arch}.attention.sliding_window": 1024}, "llama.attention.sliding_window"),
        ({"{arch}.attention.head_count_kv": [2, 2, 2]}, "llama.attention.head_count_kv"),
        ({"{arch}.attention.value_length": 8}, "llama.attention.value_length"),
        ({"{arch}.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"{arch}.rope.scaling.type": "longrope"}, "llama.rope.scaling.type"),
        ({"{arch}.rope.scaling.yarn_log_multiplier": 0.1}, "llama.rope.scaling"),
        ({"{arch}.block_count": 4}, "model.layers.3.input_layernorm.weight"),
        ({"{arch}.logit_scale": 0.25}, "llama.logit_scale"),
        ({"{arch}.feed_forward_length": 64}, "model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_an_unsupported_gguf_is_refused_by_field(
    extra: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as refused:
        read_checkpoint(write_gguf(tmp_path / "model.gguf", "llama", extra=extra))
    assert field in refused.value.field


@pytest.mark.parametrize("keep", [0, 3, 200, 9000, -1000])
def test_a_cut_off_gguf_is_refused(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "llama")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SpecError, match=r"model\.gguf"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("name", "field"),
    [("model.bin", "model.bin"), ("model.safetensors", "model.safetensors"), ("gone", "model")],
)
def test_a_path_that_is_no_model_is_refused(name: str, field: str, tmp_path: Path) -> None:
    if name != "gone":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SpecError) as refused:
        read_checkpoint(tmp_path / name)
    assert refused.value.field == field


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_when_loaded(bad: float, tmp_path: Path) -> None:
    tensors = tiny_tensors("llama")
    tensors["model.norm.weight"][5] = bad
    checkpoint = read_checkpoint(write_hf_folder(tmp_path, "llama", tensors=tensors))
    with pytest.raises(SpecError, match=r"model\.norm\.weight"):
        checkpoint.tensors["model.norm.weight"]
