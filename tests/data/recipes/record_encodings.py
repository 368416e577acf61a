"""Record how transformers encodes a set of awkward texts with the demo model's tokenizer.

Run in an environment of its own (recorded with torch 2.13.0, transformers 5.23.0, gguf 0.19.0):

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
    python tests/data/recipes/record_encodings.py SmolLM2-135M-Instruct.Q4_1.gguf

transformers converts the GGUF tokenizer itself, but ignores `tokenizer.ggml.pre`: SmolLM2's published
tokenizer.json splits digits before the GPT-2 pattern, so that one step is put back here. Writes
`tests/data/encodings_smollm2.json`: a list of [text, token ids], special-token strings as tokens.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

OUT = Path(__file__).resolve().parent.parent / "encodings_smollm2.json"

TEXTS = [
    *("a", " ", "  ", "\n", "\n\n", "\t\t", " \n \n", "   leading", "trailing   ", "a  b   c    d"),
    *("Hello, world!", "don't I'll we've they'd he's I'm you're", "DON'T I'LL 'tis dogs' 'quoted'"),
    *(
        "1234567890",
        "3.14159 1e-5 0x7f",
        "½ ² Ⅷ ٣٤٥ 一二三 ๑๒๓",
        "v1.2.3-rc4+build.5 第3章 10% 1 2 3",
    ),
    "def f(x):\n    return x**2  # comment\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\r\n\r\n",
    *('<html><body class="x">&nbsp;</body></html>', "SELECT * FROM t WHERE a='b';"),
    *(
        "naïve café Ångström",
        "日本語のテキスト",
        "中文字符测试,标点。",
        "한국어 텍스트",
        "العربية نص",
    ),
    *(
        "हिन्दी ไทย עברית",
        "Ελληνικά Русский текст",
        "😀",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈🇩🇪",
        "e\u0301 combining",
    ),
    *(
        "\u200b\u200d",
        "\u00a0nbsp\u3000wide",
        "a\r\nb\rc",
        "\x00\x01\x7f",
        "\ufeffBOM \ufffd",
        "𝔘𝔫𝔦 𐍈",
    ),
    *(
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|endoftext|>a<|endoftext|>",
        "<|im_start|",
        "<<|im_end|>>",
    ),
    *("<repo_name>x<file_sep>y", " <|im_end|>  x", "http://example.com/a?b=c&d=e#f C:\\path\\file"),
    *(
        "...!!!??? --- *** ___ (((n)))",
        "“smart” ‘quotes’ — dash …",
        "∑∫√∞≈≠ αβγ →←↑↓ ✓✗",
        "$5 €2 £3",
    ),
    *("snake_case camelCase PascalCase", "antidisestablishmentarianism", "a" * 40, "0" * 20),
]
FRAGMENTS = [
    *("the", " of", "\n", " ", "  ", "\t", "7", "42", "é", "語", "😀", "'s", "'", "<|im_end|>"),
    *("<|im_start|>", "(", ")", ".", ",", "x", "Foo", "_", "\u0301", "🇫", "ß", "\r\n", "…", "://"),
]


def main() -> None:
    """Encode and write."""
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
    )
    numbers = random.Random(7)
    mixed = ["".join(numbers.choices(FRAGMENTS, k=numbers.randrange(2, 24))) for _ in range(50)]
    rows = [
        json.dumps([text, tokenizer.encode(text, add_special_tokens=False).ids])
        for text in [*TEXTS, *mixed]
    ]
    OUT.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    print(f"{len(rows)} encodings in {OUT.name}")


if __name__ == "__main__":
    main()
