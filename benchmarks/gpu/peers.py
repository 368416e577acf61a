"""The peers, each in a process of its own: `python -m benchmarks.gpu.peers --device cuda`, driven by run.py.

    streaming_llm     StreamingLLM as published, see streaming_llm.py
    recompute         sliding window with recomputation: the whole window through the model for each token
    static_compile    stock transformers: generate() with a static cache, which compiles the decoder

All are transformers' Llama with random weights in float16, one conversation, a full window, greedy,
each token id fetched to the host as a server must.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.gpu.process import breaks_cuda, serve
from benchmarks.gpu.shapes import MODELS, SINK_TOKENS
from benchmarks.gpu.streaming_llm import StreamingLlama
from benchmarks.gpu.timing import synchronize
from engine_build.spec import ModelShape


class Peer(Protocol):
    """`decode` generates `steps` tokens at a full window and returns the seconds of each."""

    def decode(self, steps: int) -> list[float]: ...


def transformers_llama(
    shape: ModelShape, device: str, dtype: torch.dtype, attention: str, max_positions: int = 4096
) -> Any:
    """LlamaForCausalLM of this shape, random weights, in evaluation mode."""
    import transformers

    if shape.qkv_bias or shape.qk_norm:
        raise ValueError(f"{shape.architecture} is no Llama: peers run Llama shapes only")
    # Spelled for releases 4 and 5 alike, which differ in what they declare.
    options: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope.theta,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": shape.tied_head,
        "attn_implementation": attention,
        "pad_token_id": 0,
    }
    config = transformers.LlamaConfig(**options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class StreamingPeer:
    """One token a step, at a full cache."""

    def __init__(self, shape: ModelShape, device: str, capacity: int, dtype: torch.dtype) -> None:
        model = transformers_llama(shape, device, dtype, "eager")
        self._streaming = StreamingLlama(model, SINK_TOKENS, capacity - SINK_TOKENS)
        self._streaming.fill()
        self._token = torch.ones(1, 1, dtype=torch.int64, device=device)

    def decode(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self._token = self._streaming.step(self._token).argmax(-1, keepdim=True)
            self._token.item()
            seconds.append(time.perf_counter() - begin)
        return seconds


class RecomputePeer:
    """`capacity` tokens through the model for one token, with the library's fastest stock attention."""

    def __init__(self, shape: ModelShape, device: str, capacity: int, dtype: torch.dtype) -> None:
        self._model = transformers_llama(shape, device, dtype, "sdpa")
        self._window = torch.randint(0, shape.vocab_size, (1, capacity), device=device)

    def decode(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            with torch.no_grad():
                token = self._next()
            token.item()
            self._window = torch.cat([self._window[:, 1:], token], dim=1)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _next(self) -> torch.Tensor:
        hidden = self._model.model(input_ids=self._window, use_cache=False).last_hidden_state
        token: torch.Tensor = self._model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        return token


class StaticCompilePeer:
    """generate() with cache_implementation="static": what transformers' own documentation advises.

    Each round is one generate() whose last token fills the window; its prefill is timed alone and taken
    off.
    """

    def __init__(self, shape: ModelShape, device: str, capacity: int, dtype: torch.dtype) -> None:
        self._model = transformers_llama(shape, device, dtype, "sdpa", max_positions=2 * capacity)
        self._capacity, self._device, self._vocab = capacity, device, shape.vocab_size

    def decode(self, steps: int) -> list[float]:
        steps = min(steps, self._capacity // 2)
        prompt = torch.randint(1, self._vocab, (1, self._capacity - steps - 1), device=self._device)
        whole, first = self._generate(prompt, steps + 1), self._generate(prompt, 1)
        return [(whole - first) / steps] * steps

    def _generate(self, prompt: torch.Tensor, new_tokens: int) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            cache_implementation="static",
        )
        synchronize(self._device)
        return time.perf_counter() - begin


PEERS: dict[str, Callable[[ModelShape, str, int, torch.dtype], Peer]] = {
    "streaming_llm": StreamingPeer,
    "recompute": RecomputePeer,
    "static_compile": StaticCompilePeer,
}


class PeerProcess:
    """What the child answers: `open` a peer, then `decode` rounds."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._peer: Peer | None = None

    def open(self, peer: str, model: str, capacity: int) -> dict[str, Any]:
        dtype = torch.float16 if self._device.startswith("cuda") else torch.float32
        self._peer = PEERS[peer](MODELS[model], self._device, capacity, dtype)
        return {"dtype": str(dtype)}

    def decode(self, steps: int) -> dict[str, Any]:
        if self._peer is None:
            raise RuntimeError("open a peer first")
        return {"seconds": self._peer.decode(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    process = PeerProcess(parser.parse_args().device)
    serve({"open": process.open, "decode": process.decode}, breaks_cuda)


if __name__ == "__main__":
    main()
