"""The tokenizer files of a made-up checkpoint: copied from a published one, or a small byte-level one.

Knows file names and Kimi's special tokens, not how to tokenise. Called by `hybrid.random_checkpoint`.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from hybrid.config import ConfigError

# Data files only: a checkpoint's Python code is never run and therefore not copied.
FILES = (
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)
RESERVED = 256  # ids at the end of Kimi's vocabulary that are kept for special tokens

# Offset from the first reserved id, text, and whether decoding hides it; as in the published tokenizer_config.json.
SPECIAL_TOKENS: tuple[tuple[int, str, bool], ...] = (
    (0, "[BOS]", True),
    (1, "[EOS]", True),
    (2, "<|im_end|>", True),
    (3, "<|im_user|>", True),
    (4, "<|im_assistant|>", True),
    (6, "<|start_header_id|>", True),
    (7, "<|end_header_id|>", True),
    (9, "[EOT]", True),
    (10, "<|im_system|>", True),
    (11, "<|tool_calls_section_begin|>", False),
    (12, "<|tool_calls_section_end|>", False),
    (13, "<|tool_call_begin|>", False),
    (14, "<|tool_call_argument_begin|>", False),
    (15, "<|tool_call_end|>", False),
    (17, "<|im_middle|>", True),
    (18, "<|media_begin|>", True),
    (19, "<|media_content|>", True),
    (20, "<|media_end|>", True),
    (21, "<|media_pad|>", True),
    (22, "<think>", False),
    (23, "</think>", False),
    (254, "[UNK]", True),
    (255, "[PAD]", True),
)


def check_tokenizer(source: Path | None, vocab_size: int) -> None:
    """Refuse a tokenizer that is not there or whose ids exceed the model's vocabulary, before anything is written."""
    if source is None:
        if vocab_size < 2 * RESERVED:
            raise ConfigError(
                f"config.json: vocab_size {vocab_size} has no room for the small tokenizer's 256 bytes and "
                f"{RESERVED} reserved ids; set it to {2 * RESERVED} or more, or give --tokenizer"
            )
        return
    kinds = [name for name in ("tiktoken.model", "tokenizer.json") if (source / name).is_file()]
    if not kinds:
        raise ValueError(f"--tokenizer {source}: holds neither tiktoken.model nor tokenizer.json; name a directory")
    needed = _ids_needed(source / kinds[0])
    if needed > vocab_size:
        raise ConfigError(
            f"config.json: vocab_size {vocab_size} is less than the {needed} ids of --tokenizer {source}; "
            f"set it to {needed} or more, or leave --tokenizer out for a small one"
        )


def _ids_needed(path: Path) -> int:
    """One more than the largest id of a tokenizer file."""
    if path.name == "tiktoken.model":
        return sum(1 for line in path.read_bytes().splitlines() if line) + RESERVED
    try:
        tokenizer = json.loads(path.read_bytes())
        vocab = tokenizer["model"]["vocab"]
        ids = [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1]
        return max(int(i) for i in (*ids, *(token["id"] for token in tokenizer.get("added_tokens", ())))) + 1
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--tokenizer: {path} is not a tokenizer.json with a vocabulary ({error!r})") from error


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's and template's files, byte for byte."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_small_tokenizer(out: Path, vocab_size: int) -> None:
    """256 single bytes in tiktoken's format, and Kimi's special tokens in the last 256 ids."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (out / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    write_tokenizer_config(out, vocab_size)


def write_tokenizer_config(out: Path, vocab_size: int) -> None:
    """`tokenizer_config.json` with Kimi's special tokens in the last 256 of `vocab_size` ids."""
    added: dict[str, Any] = {
        str(vocab_size - RESERVED + offset): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for offset, text, special in SPECIAL_TOKENS
    }
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [t for k, t, special in SPECIAL_TOKENS if special and 2 <= k < 254],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
