"""Encoding and decoding, against the published tokenizer's golden vectors and on small tokenizers."""

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from server.tokenizer import JsonTokenizer, KimiTokenizer, Tokenizer, TokenizerError, load_tokenizer
from tests.reference.golden import cases, ids_of, text_of
from tests.reference.small_tokenizer import OFFSETS, byte_level, sentencepiece, write_json, write_kimi

VOCAB = 1024
FIRST = VOCAB - 256  # of the small tokenizer's special ids


@pytest.fixture(scope="session")
def kimi(kimi_dir: Path) -> Tokenizer:
    return load_tokenizer(kimi_dir)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("small"), VOCAB))


@pytest.fixture(scope="session")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    spec = byte_level("<|end|>", "<think>", "</think>")
    return load_tokenizer(write_json(tmp_path_factory.mktemp("bytes"), spec, eos_token="<|end|>"))


@pytest.fixture(scope="session")
def by_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    return load_tokenizer(write_json(tmp_path_factory.mktemp("pieces"), sentencepiece(), **config))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.detokenizer()
    return [*(decoder.feed(i) for i in ids), decoder.flush()]


def test_golden_encode(kimi: Tokenizer, kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "tokens", "encode"):
        assert kimi.encode(text_of(case["text"])) == ids_of(case["ids"]), case["id"]


def test_golden_specials(kimi: Tokenizer, kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "tokens", "encode_special"):
        text = text_of(case["text"])
        assert kimi.encode(text, parse_special=True) == ids_of(case["ids"]), case["id"]
        assert kimi.encode(text) == ids_of(case["ids_without"]), case["id"]


def test_golden_decode(kimi: Tokenizer, kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "tokens", "decode"):
        assert streamed(kimi, case["ids"]) == [*case["pieces"], case["flush"]], case["id"]
        assert kimi.decode(case["ids"]) == case["text"], case["id"]


def test_golden_names(kimi: Tokenizer, kimi_dir: Path) -> None:
    golden = json.loads((kimi_dir / "golden" / "tokens.json").read_text())
    assert kimi.n_vocab == golden["n_vocab"]
    assert {name: kimi.special_id(name) for name in golden["specials"]} == golden["specials"]
    assert [i for i in range(kimi.n_vocab) if kimi.is_special(i)] == list(range(golden["n_base"], golden["n_vocab"]))
    assert kimi.stop_ids == {163585, 163586}
    assert kimi.bos_ids == ()


@pytest.mark.parametrize("text", ["a", "中", " ", "A", "é", "'s", "aB", "\u0301", " \n", "😀"])
def test_endless_words_are_encoded_without_loss(kimi: Tokenizer, text: str) -> None:
    # A million characters without a place to split: unbounded merging would run into the suite's timeout.
    text = text * (1_000_000 // len(text))
    assert kimi.decode(kimi.encode(text)) == text


def test_a_gap_before_the_specials(small: Tokenizer) -> None:
    assert small.n_vocab == VOCAB
    assert small.encode("hé") == [0x68, 0xC3, 0xA9]
    gap = [256, 500, FIRST - 1]
    assert small.decode([0x68, *gap, 0x69]) == "hi"
    assert streamed(small, [0xC3, *gap, 0xA9]) == ["", "", "", "", "é", ""]
    assert [small.token_bytes(i) for i in (*gap, -1, VOCAB)] == [b""] * 5
    assert small.special_id("<|im_end|>") == FIRST + OFFSETS["<|im_end|>"]
    assert small.special_id(f"<|reserved_token_{FIRST + 100}|>") == FIRST + 100
    assert not any(small.is_special(i) for i in (0, 255, *gap)) and small.is_special(VOCAB - 1)
    assert small.stop_ids == {FIRST + 1, FIRST + 2}


def test_the_published_layout_has_256_specials_behind_the_ranks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_kimi(tmp_path, 512, {"[EOS]": 1, "<|im_end|>": 2}))
    assert tokenizer.n_vocab == 512
    assert tokenizer.special_id("<|reserved_token_511|>") == 511


def test_specials_come_from_text_only_on_request(small: Tokenizer) -> None:
    text = "a<|im_end|>b"
    assert small.encode(text) == list(text.encode())
    assert small.encode(text, parse_special=True) == [0x61, FIRST + 2, 0x62]
    assert small.encode_pieces(["a<|im_", "end|>", FIRST + 2, "", "b"]) == [*b"a<|im_end|>", FIRST + 2, 0x62]


def test_half_a_surrogate_pair_becomes_the_replacement_character(small: Tokenizer, by_bytes: Tokenizer) -> None:
    for tokenizer in (small, by_bytes):
        assert tokenizer.decode(tokenizer.encode("x\ud83dy 😀")) == "x\ufffdy 😀"


@given(data=st.binary(max_size=60))
def test_streamed_bytes_are_what_decoding_them_at_once_gives(
    small: Tokenizer, by_bytes: Tokenizer, data: bytes
) -> None:
    assert isinstance(by_bytes, JsonTokenizer)
    expected = data.decode("utf-8", "replace")
    of_byte = {by_bytes.token_bytes(i): i for i in range(256)}
    for tokenizer, ids in ((small, list(data)), (by_bytes, [of_byte[bytes([b])] for b in data])):
        assert "".join(streamed(tokenizer, ids)) == expected
        assert tokenizer.decode(ids) == expected


@given(text=st.text(max_size=40))
def test_text_survives_encoding(small: Tokenizer, by_bytes: Tokenizer, text: str) -> None:
    for tokenizer in (small, by_bytes):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert not any(map(tokenizer.is_special, ids))


def test_byte_level_json_equals_the_library(by_bytes: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(byte_level("<|end|>", "<think>", "</think>")))
    for text in ("hello world", "héllo    hell", "<|end|>hello<think> x</think>", "😀    "):
        ids = by_bytes.encode(text, parse_special=True)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert by_bytes.decode(ids) == library.decode(ids, skip_special_tokens=False) == text


def test_json_markers_are_text_unless_asked_for(by_bytes: Tokenizer) -> None:
    end, think = by_bytes.special_id("<|end|>"), by_bytes.special_id("<think>")
    assert end is not None and think is not None, "added without the flag, a marker all the same"
    text = "x<|end|><think>"
    plain = by_bytes.encode(text)
    assert end not in plain and think not in plain and by_bytes.decode(plain) == text
    assert by_bytes.encode_pieces(["x<|end|>", think, "hell"]) == [
        *by_bytes.encode("x<|end|>"),
        think,
        *by_bytes.encode("hell"),
    ]
    assert by_bytes.encode("    ") == [by_bytes.n_vocab - 1], "runs of spaces are ordinary text"
    assert by_bytes.special_id("    ") is None
    assert by_bytes.token_bytes(end) == b"<|end|>" and by_bytes.token_bytes(by_bytes.n_vocab - 1) == b"    "
    assert by_bytes.stop_ids == {end}


def test_sentencepiece_equals_the_library(by_pieces: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(sentencepiece()))
    for text in ("Hello world", "Hello Hello, world!", "x 中é world", "Hello</s>Hello world"):
        ids = by_pieces.encode(text, parse_special=True)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert "".join(streamed(by_pieces, ids)) == library.decode(ids, skip_special_tokens=False)
        assert by_pieces.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_sentencepiece_streams_spaces_and_bytes_right(by_pieces: Tokenizer) -> None:
    ids = by_pieces.encode("Hello world 中!")
    assert streamed(by_pieces, ids)[:2] == ["Hello", " world"]
    assert "".join(streamed(by_pieces, ids)) == "Hello world 中!"
    assert "\ufffd" not in "".join(streamed(by_pieces, ids))
    cut = ids[: ids.index(by_pieces.encode("中")[1]) + 1]  # one byte of three
    assert streamed(by_pieces, cut)[-2:] == ["", "\ufffd"]
    assert by_pieces.token_bytes(cut[-1]) == "中".encode()[:1]
    assert by_pieces.token_bytes(ids[1]) == b" world"


def test_a_piece_of_the_vocabulary_that_is_a_special_stays_text(by_pieces: Tokenizer) -> None:
    assert by_pieces.specials["</s>"] == 2
    assert 2 not in by_pieces.encode("Hello</s>")
    assert by_pieces.decode(by_pieces.encode("Hello</s>")) == "Hello</s>"


def test_opening_ids(by_pieces: Tokenizer, by_bytes: Tokenizer, tmp_path: Path) -> None:
    assert by_pieces.bos_ids == (1,), "the post-processor adds it"
    assert by_bytes.bos_ids == ()
    no_bos = load_tokenizer(write_json(tmp_path, sentencepiece(), bos_token="<s>", add_bos_token=False))
    assert no_bos.bos_ids == ()
    with_bos = load_tokenizer(write_json(tmp_path, byte_level("<s>"), bos_token="<s>", add_bos_token=True))
    assert with_bos.bos_ids == (with_bos.special_id("<s>"),)


def test_stop_ids_of_the_generation_config(tmp_path: Path) -> None:
    write_kimi(tmp_path, VOCAB)
    for eos, more in ((7, {7}), ([7, 8], {7, 8}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_tokenizer(tmp_path).stop_ids == {FIRST + 1, FIRST + 2} | more


def test_ids_the_json_tokenizer_does_not_have(by_bytes: Tokenizer, by_pieces: Tokenizer) -> None:
    for tokenizer in (by_bytes, by_pieces):
        assert tokenizer.decode([-1, tokenizer.n_vocab, 10**9]) == ""
        assert "".join(streamed(tokenizer, [-1, tokenizer.n_vocab])) == ""
        assert tokenizer.token_bytes(tokenizer.n_vocab) == b""


def damaged(directory: Path, file: str) -> Path:
    write_kimi(directory, VOCAB)
    lines = (directory / "tiktoken.model").read_bytes().splitlines()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if file == "short":
        (directory / "tiktoken.model").write_bytes(b"\n".join(lines[:-1]))
    elif file == "garbage":
        (directory / "tiktoken.model").write_bytes(b"\n".join([*lines, b"not a rank line"]))
    elif file == "overlap":
        extra = base64.b64encode(b"xyz") + b" 256"
        config["added_tokens_decoder"]["256"] = {"content": "[MASK]"}
        (directory / "tiktoken.model").write_bytes(b"\n".join([*lines, extra]))
    elif file == "no specials":
        config = {}
    (directory / "tokenizer_config.json").write_text("{" if file == "json" else json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("short", ["tiktoken.model", "255 ranks", "copy"]),
        ("garbage", ["tiktoken.model", "line 257", "copy"]),
        ("overlap", ["tokenizer_config.json", "256", "same checkpoint"]),
        ("no specials", ["tokenizer_config.json", "added_tokens_decoder", "copy"]),
        ("json", ["tokenizer_config.json", "not valid JSON"]),
    ],
)
def test_damaged_files_are_named_with_the_remedy(tmp_path: Path, file: str, words: list[str]) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(damaged(tmp_path, file))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tiktoken\.model.*tokenizer\.json.*copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*copy"):
        load_tokenizer(tmp_path)


def test_the_file_decides_the_family(small: Tokenizer, by_bytes: Tokenizer) -> None:
    assert isinstance(small, KimiTokenizer) and isinstance(by_bytes, JsonTokenizer)
