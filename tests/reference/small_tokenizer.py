"""Small tokenizers in the published file formats, for tests that must run without a published one."""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# Offsets in the block of 256 special ids, as published.
OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<|media_begin|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "<think>": 22,
    "</think>": 23,
    "[UNK]": 254,
    "[PAD]": 255,
}


def write_kimi(directory: Path, vocab_size: int = 1024, offsets: dict[str, int] | None = None) -> Path:
    """Kimi's format with the 256 single bytes as ranks: byte b is id b. Specials end the vocabulary."""
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    first = vocab_size - 256
    added = {str(first + k): {"content": name, "special": True} for name, k in (offsets or OFFSETS).items()}
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_json(directory: Path, spec: dict[str, Any], **config: Any) -> Path:
    """A `tokenizer.json` directory."""
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(*markers: str, spaces: bool = True) -> dict[str, Any]:
    """Byte-level BPE with the merges `he`, `ll`, `hell`; markers are added tokens, `<think>` without the flag."""
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    for merged in ("he", "ll", "hell"):
        vocab[merged] = len(vocab)
    named = [(name, name not in ("<think>", "</think>")) for name in markers] + ([("    ", False)] if spaces else [])
    added = [
        {
            "id": len(vocab) + i,
            "content": name,
            "special": special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (name, special) in enumerate(named)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"]],
        },
    }


def sentencepiece() -> dict[str, Any]:
    """Unigram with `▁` for spaces and bytes for the rest; `</s>` is also an ordinary piece, as sentencepiece has it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [("▁Hello", -2.0), ("▁world", -2.0), ("▁", -3.0), ("Hello", -4.0), ("world", -4.0)]
    pieces += [(char, -6.0) for char in "abcdefghijklmnopqrstuvwxyz!.,<>/"]
    added = [
        {
            "id": i,
            "content": pieces[i][0],
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in range(3)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [list(p) for p in pieces], "byte_fallback": True},
    }
