"""A checkpoint's text side: its tokenizer, its special tokens and its chat template.

Read from a Hugging Face folder (tokenizer.json) or rebuilt from a GGUF file's own metadata, so that
no torch is needed. Source of the GGUF fields: ggml-org/ggml docs/gguf.md; of the pre-tokenizer
patterns: llama.cpp src/llama-vocab.cpp and the models' published tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine_build.spec import SpecError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# Value of tokenizer.ggml.pre -> patterns that split the text, one after the other.
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": LLAMA_CPP_DEFAULT,
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
}
IGNORE_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3"})
NFC = frozenset({"qwen2"})

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class TextSource:
    """Everything about text that a checkpoint holds. `eos_ids`: tokens that end a reply."""

    tokenizer: Tokenizer
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_ids: tuple[int, ...]

    def config_json(self) -> str:
        """The engine directory's tokenizer_config.json: the fields that chat templates read."""
        config = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "eos_ids": list(self.eos_ids),
            "chat_template": self.chat_template,
        }
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def text_from_gguf(fields: Mapping[str, Any]) -> TextSource:
    """The text side of a GGUF file. `fields`: metadata key -> plain Python value (lists for arrays).

    Raises SpecError naming the field for a tokenizer that is not byte-level BPE or SentencePiece BPE.
    """
    tokenizer = tokenizer_from_gguf(fields)
    tokens = _tokens(fields)

    def named(field: str) -> str | None:
        token_id = fields.get(f"tokenizer.ggml.{field}_token_id")
        return None if token_id is None else tokens[int(token_id)]

    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return TextSource(
        tokenizer=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        bos_token=named("bos"),
        eos_token=named("eos"),
        eos_ids=tuple(sorted({int(end) for end in ends if end is not None})),
    )


def text_from_folder(folder: Path) -> TextSource:
    """The text side of a Hugging Face folder. Raises SpecError when tokenizer.json is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SpecError(
            "tokenizer.json",
            f"not found in {folder}",
            "Save the model's fast tokenizer beside the weights",
        )
    tokenizer = _load(path.read_text(encoding="utf-8"))
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    model = _read_json(folder / "config.json")
    eos_token = _token_text(config.get("eos_token"))
    ends = {eos for source in (generation, model) for eos in _id_list(source.get("eos_token_id"))}
    if eos_token is not None and (eos_id := tokenizer.token_to_id(eos_token)) is not None:
        ends.add(eos_id)
    return TextSource(
        tokenizer=tokenizer,
        chat_template=_folder_template(folder, config),
        bos_token=_token_text(config.get("bos_token")),
        eos_token=eos_token,
        eos_ids=tuple(sorted(ends)),
    )


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Only the tokenizer of `text_from_gguf`."""
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(fields)
    elif model == "llama":
        tokenizer = _sentencepiece(fields)
    else:
        raise SpecError(
            "tokenizer.ggml.model",
            f"{model!r} is not supported",
            "Use a model with a byte-level BPE (gpt2) or SentencePiece BPE (llama) tokenizer",
        )
    _add_tokens(tokenizer, fields)
    return tokenizer


def _byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in PATTERNS:
        raise SpecError(
            "tokenizer.ggml.pre",
            f"{name!r} is not a known pre-tokenizer",
            f"Known ones: {', '.join(sorted(PATTERNS))}; or build from the Hugging Face folder",
        )
    merges = [_merge(text) for text in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab=_vocab(fields), merges=merges, ignore_merges=name in IGNORE_MERGES)
    tokenizer = Tokenizer(bpe)
    if name in NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[name]
    ]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE: a pair merges when the whole is a token; higher score first."""
    vocab, scores = _vocab(fields), fields["tokenizer.ggml.scores"]
    ranked: list[tuple[float, int, str, str]] = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-float(scores[token_id]), cut, left, right))
    # The sort is stable and keyed like transformers' own conversion: score, then vocabulary order.
    ranked.sort(key=lambda merge: (merge[0], vocab[merge[2]], vocab[merge[3]]))
    unknown = _tokens(fields)[int(fields.get("tokenizer.ggml.unknown_token_id", 0))]
    bpe = models.BPE(
        vocab=vocab,
        merges=[(left, right) for _, _, left, right in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
        ends.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    kinds = fields.get("tokenizer.ggml.token_type") or []
    specials = {CONTROL, UNKNOWN} if fields.get("tokenizer.ggml.model") == "llama" else {CONTROL}
    tokens = list(zip(_tokens(fields), kinds, strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in tokens if kind in specials]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text, kind in tokens if kind == USER_DEFINED]
    )


def _tokens(fields: Mapping[str, Any]) -> Sequence[str]:
    return cast("Sequence[str]", fields["tokenizer.ggml.tokens"])


def _vocab(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens = _tokens(fields)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise SpecError(
            "tokenizer.ggml.tokens",
            f"{len(tokens) - len(vocab)} tokens occur twice",
            "Build from the Hugging Face folder instead",
        )
    return vocab


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


def _load(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise SpecError(
            "tokenizer.json", str(error), "Save it again with a current tokenizers release"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise SpecError(path.name, f"not valid JSON: {error}", "Repair the file") from error


def _token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an AddedToken as a mapping."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in (value if isinstance(value, list) else [value])]


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
