"""Record what stock transformers computes, so that tests can compare with it without torch.

Run in an environment of its own (values recorded with torch 2.13.0, transformers 5.23.0, gguf 0.19.0,
float32, eager attention, one thread, x86-64):

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate safetensors
    PYTHONPATH=. python tests/data/recipes/record_stock_logits.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Writes beside `tests/data`:

- `stock_logits_tiny.npz`: per family of `tiny_models.FAMILIES`, `<family>/positions` int32 [P] and
  `<family>/logits` float32 [P, 320], for `tiny_token_ids(family, 48)`;
- `stock_rope.json`: per case, the config that transformers read, its inverse frequencies and its
  factor on cos and sin;
- `stock_logits_smollm2.json` (only with the GGUF file, read and dequantised by transformers).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.tiny_models import FAMILIES, tiny_config, tiny_token_ids, write_hf_folder

DATA = Path(__file__).resolve().parent.parent
TINY_TOKENS = 48
TINY_POSITIONS = [0, 1, 2, 7, 16, 31, 47]
TEXT = (
    "<|im_start|>user\nWhy does a rolling window need its first tokens?<|im_end|>\n"
    "<|im_start|>assistant\nBecause attention must go somewhere. When a head has nothing to say, it "
    "rests on the first tokens of the text; take them away and every weight moves, and 3.14 "
    "becomes noise."
)
SMOLLM2_POSITIONS = [0, 1, 5, 17, 40, 59]
SMOLLM2_IDS = [0, 1, 2, 17, 28, 198, 260, 314, 900, 4242, 20000, 49151]

ROPE_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-3.1": {
        "rope_theta": 500000.0,
        "head_dim": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn-qwen": {
        "rope_theta": 1000000.0,
        "head_dim": 128,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "yarn-mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 1024,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16,
            "beta_slow": 2,
        }
    },
    "yarn-attention-factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
            "truncate": False,
        }
    },
    "yarn-factor-from-lengths": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 1024,
        }
    },
    "yarn-one-dimension": {
        "rope_theta": 1.5,
        "head_dim": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 4,
        },
    },
}


def record_tiny() -> None:
    arrays: dict[str, np.ndarray] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            write_hf_folder(Path(folder), family)
            model = load(folder)
        ids = torch.tensor(tiny_token_ids(family, TINY_TOKENS)[None].astype(np.int64))
        with torch.no_grad():
            logits = model(ids).logits[0].numpy()
        arrays[f"{family}/positions"] = np.array(TINY_POSITIONS, dtype=np.int32)
        arrays[f"{family}/logits"] = logits[TINY_POSITIONS].astype(np.float32)
    np.savez_compressed(DATA / "stock_logits_tiny.npz", allow_pickle=False, **arrays)


def record_rope() -> None:
    cases = {}
    for name, changes in ROPE_CASES.items():
        config = {**tiny_config("llama"), **changes}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            stock = AutoConfig.from_pretrained(folder)
        rotary = LlamaRotaryEmbedding(stock)
        inverse, factor = rotary.inv_freq, rotary.attention_scaling
        cases[name] = {
            "config": config,
            "inverse_frequencies": [float(f"{value:.9g}") for value in inverse.tolist()],
            "cos_sin_scale": float(factor),
        }
    (DATA / "stock_rope.json").write_text(json.dumps(cases, indent=1) + "\n")


def record_smollm2(gguf_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    model = load(gguf_file.parent, gguf_file=gguf_file.name)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    rows = []
    for position in SMOLLM2_POSITIONS:
        values, top = logits[position].topk(5)
        rows.append(
            {
                "position": position,
                "top_ids": top.tolist(),
                "top_logits": values.tolist(),
                "logits": logits[position][SMOLLM2_IDS].tolist(),
                "logsumexp": logits[position].double().logsumexp(0).item(),
            }
        )
    record = {"text": TEXT, "token_ids": ids, "logit_ids": SMOLLM2_IDS, "rows": rows}
    (DATA / "stock_logits_smollm2.json").write_text(json.dumps(record, indent=1) + "\n")


def load(folder: str | Path, **options: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    record_tiny()
    record_rope()
    if len(sys.argv) > 1:
        record_smollm2(Path(sys.argv[1]))
