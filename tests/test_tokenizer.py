"""Tokenizers rebuilt from GGUF metadata and read from Hugging Face folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deployments.text_stream import byte_alphabet
from engine_build.spec import SpecError
from engine_build.tokenizer import TextSource, text_from_folder, text_from_gguf, tokenizer_from_gguf
from tests.text_models import SPECIALS, byte_level_tokenizer, sentencepiece_fields

SPACE = "\u2581"
DATA = Path(__file__).parent / "data"


def byte_level_fields(pre: str) -> dict[str, Any]:
    """GGUF metadata of the small byte-level tokenizer, as llama.cpp's convert script writes it."""
    model = json.loads(byte_level_tokenizer(SPECIALS["chatml"]).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<tool>"],
        "tokenizer.ggml.token_type": [3, 3, 3, *([1] * (len(tokens) - 3)), 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """How the pre-tokenizer splits `text`, byte characters turned back into text."""
    assert tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in found]


def test_demo_encodings_equal_the_recorded_ones(demo_text: TextSource) -> None:
    recorded = json.loads((DATA / "encodings_smollm2.json").read_text(encoding="utf-8"))
    assert len(recorded) > 100
    tokenizer = demo_text.tokenizer
    different = [text for text, ids in recorded if tokenizer.encode(text).ids != ids]
    assert different == []


def test_demo_special_tokens(demo_text: TextSource) -> None:
    assert (demo_text.bos_token, demo_text.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert demo_text.eos_ids == (2,)
    assert demo_text.chat_template is not None
    assert demo_text.tokenizer.get_vocab_size() == 49152


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_the_demo_tokenizer(demo_text: TextSource, text: str) -> None:
    """But for the few bytes that SmolLM2's vocabulary has no token for (U+001D, above U+3FFFF...)."""
    tokenizer = demo_text.tokenizer
    known = {byte for byte, char in byte_alphabet().items() if tokenizer.token_to_id(char)}
    assert len(known) > 200
    expected = bytes(byte for byte in text.encode() if byte in known).decode("utf-8", "replace")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == expected


@pytest.fixture(scope="session")
def demo_text(demo_gguf: Path) -> TextSource:
    from engine_build.checkpoint import read_checkpoint

    return read_checkpoint(demo_gguf).text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 12345", " $", " now", "  ", "\n\n", " é", "."]),
        ("smollm", ["I", "'ll", " pay", " ", *"12345", " $", " now", "  ", "\n\n", " é", "."]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", " $", " now", "  \n\n", " é", "."]),
        ("qwen2", ["I", "'ll", " pay", " ", *"12345", " $", " now", "  \n\n", " é", "."]),
    ],
)
def test_pre_tokenizers_split_as_their_models_were_trained(pre: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_fields(pre))
    found = pieces(tokenizer, "I'll pay 12345 $ now  \n\n é.")
    # GPT-2's pattern takes white space up to the last one before a word as one piece.
    joined = [piece for piece in found if piece]
    if pre in ("gpt-2", "smollm"):
        expected = [*expected[:-4], "  \n\n", " é", "."]
    assert joined == expected


def test_pre_tokenizers_differ_in_the_case_of_contractions() -> None:
    gpt2 = pieces(tokenizer_from_gguf(byte_level_fields("gpt-2")), "I'LL")
    llama = pieces(tokenizer_from_gguf(byte_level_fields("llama-bpe")), "I'LL")
    assert (gpt2, llama) == (["I", "'", "LL"], ["I", "'LL"])


def test_qwen_composes_characters_and_others_do_not() -> None:
    decomposed = "e\u0301"
    for pre, composes in (("qwen2", True), ("llama-bpe", False)):
        tokenizer = tokenizer_from_gguf(byte_level_fields(pre))
        shown = tokenizer.decode(tokenizer.encode(decomposed).ids)
        assert (shown == "é") is composes


def test_llama3_takes_whole_words_that_no_merge_reaches() -> None:
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        fields = byte_level_fields(pre)
        fields["tokenizer.ggml.tokens"].append("zqzq")
        fields["tokenizer.ggml.token_type"].append(1)
        assert (tokenizer_from_gguf(fields).encode("zqzq").tokens == ["zqzq"]) is whole


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    source = text_from_gguf(byte_level_fields("smollm"))
    tokenizer = source.tokenizer
    ids = tokenizer.encode("a<tool><|im_end|>").ids
    assert ids[1:] == [tokenizer.token_to_id("<tool>"), 2]
    assert tokenizer.decode(ids) == "a<tool>"
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|im_end|>").ids[0] != 2
    assert source.eos_ids == (0, 2)
    assert source.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.model", None),
        ("tokenizer.ggml.pre", "invented"),
        ("tokenizer.ggml.tokens", ["a", "a"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        tokenizer_from_gguf({**byte_level_fields("smollm"), field: value})
    assert caught.value.field == field


def slow_sentencepiece(fields: dict[str, Any], text: str) -> list[str]:
    """SentencePiece BPE by the book: join the neighbours whose union has the highest score."""
    scores = dict(
        zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True)
    )
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        unions = [left + right for left, right in itertools.pairwise(parts)]
        known = [(scores[union], -at, at) for at, union in enumerate(unions) if union in scores]
        if not known:
            break
        at = max(known)[2]
        parts[at : at + 2] = [unions[at]]
    spelled = ([p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()] for p in parts)
    return [token for tokens in spelled for token in tokens]


@given(
    st.one_of(
        st.text("Thequickbrownfx jmpsvltazydg ", min_size=1),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    )
)
def test_sentencepiece_equals_the_slow_algorithm(text: str) -> None:
    assert SENTENCEPIECE.encode(text).tokens == slow_sentencepiece(SENTENCEPIECE_FIELDS, text)


SENTENCEPIECE_FIELDS = sentencepiece_fields()
SENTENCEPIECE = tokenizer_from_gguf(SENTENCEPIECE_FIELDS)


def test_sentencepiece_decodes_what_it_encodes() -> None:
    text = "The fox 日本語 😀 jumps"
    ids = SENTENCEPIECE.encode(text).ids
    assert SENTENCEPIECE.decode(ids) == text
    assert SENTENCEPIECE.encode("<s>x</s>").ids[0] == 1


def folder(path: Path, **files: object) -> Path:
    """A Hugging Face folder's text files."""
    byte_level_tokenizer(SPECIALS["chatml"]).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_folder_collects_every_end_token(tmp_path: Path) -> None:
    source = text_from_folder(
        folder(
            tmp_path,
            tokenizer_config={
                "bos_token": {"content": "<|im_start|>"},
                "eos_token": "<|im_end|>",
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "yes"},
                ],
            },
            generation_config={"eos_token_id": [2, 0]},
            config={"eos_token_id": 2},
        )
    )
    assert source.eos_ids == (0, 2)
    assert (source.bos_token, source.chat_template) == ("<|im_start|>", "yes")
    assert json.loads(source.config_json())["eos_token"] == "<|im_end|>"


def test_folder_prefers_the_template_file(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (path / "chat_template.jinja").write_text("new")
    assert text_from_folder(path).chat_template == "new"


def test_folder_without_or_with_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"tokenizer\.json"):
        text_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(SpecError, match=r"tokenizer\.json"):
        text_from_folder(tmp_path)
    folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"config\.json"):
        text_from_folder(tmp_path)
