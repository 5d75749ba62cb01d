"""Made checkpoints: the published layout to the byte, the same on every machine, and readable by others' readers."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from safetensors import safe_open

from hybrid import random_checkpoint
from hybrid.config import ConfigError, ModelConfig
from hybrid.config_json import Fields
from hybrid.random_checkpoint import write_checkpoint
from hybrid.random_weights import RandomWeights
from offload.checkpoint import Checkpoint
from offload.formats import bf16_to_float32, fp8_e4m3_to_float32, unpack_int4
from tests import families

Signature = tuple[str, tuple[int, ...]]

# Written down once; any machine and any version of NumPy must give the same bytes.
DIGEST = "7999c61812bcd927"


def small(family: Callable[[], Any], **changes: Any) -> dict[str, Any]:
    """A family with one dense and one routed layer, few experts."""
    raw: dict[str, Any] = family()
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    raw.get("text_config", raw).update(sizes | {"n_group": 1, "topk_group": 1} | changes)
    return raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One small checkpoint for each family, written when first asked for."""
    root = tmp_path_factory.mktemp("made")

    def get(family: str) -> Path:
        if not (root / family).exists():
            write_checkpoint(small(getattr(families, family)), root / family, seed=5)
        return root / family

    return get


def signatures(directory: Path) -> dict[str, Signature]:
    """dtype and shape by name, as the safetensors library reads them."""
    found: dict[str, Signature] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def digest(directory: Path) -> str:
    """Of the weights; the other files are copies of what the test gives."""
    whole = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def linear(name: str, n_out: int, n_in: int, fmt: str) -> dict[str, Signature]:
    if fmt == "int4":
        return {
            f"{name}.weight_packed": ("I32", (n_out, n_in // 8)),
            f"{name}.weight_scale": ("BF16", (n_out, n_in // 32)),
            f"{name}.weight_shape": ("I32", (2,)),
        }
    if fmt == "fp8":
        blocks = (-(-n_out // 128), -(-n_in // 128))
        return {f"{name}.weight": ("F8_E4M3", (n_out, n_in)), f"{name}.weight_scale_inv": ("F32", blocks)}
    return {f"{name}.weight": ("BF16", (n_out, n_in))}


def expected_language_model(raw: dict[str, Any]) -> dict[str, Signature]:
    """The published names by hand, from the format's description."""
    c = SimpleNamespace(**raw.get("text_config", raw))
    start = "language_model." if "text_config" in raw else ""
    method = getattr(c, "quantization_config", {}).get("quant_method")
    experts, rest = {"compressed-tensors": ("int4", "bf16"), "fp8": ("fp8", "fp8"), None: ("bf16", "bf16")}[method]
    d, heads = c.hidden_size, c.num_attention_heads
    q_out = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    found: dict[str, Signature] = {
        f"{start}lm_head.weight": ("BF16", (c.vocab_size, d)),
        f"{start}model.embed_tokens.weight": ("BF16", (c.vocab_size, d)),
        f"{start}model.norm.weight": ("BF16", (d,)),
    }
    for n in range(c.num_hidden_layers):
        layer = f"{start}model.layers.{n}."
        found |= {f"{layer}{norm}_layernorm.weight": ("BF16", (d,)) for norm in ("input", "post_attention")}
        attention = f"{layer}self_attn."
        if c.q_lora_rank is None:
            found |= linear(f"{attention}q_proj", q_out, d, rest)
        else:
            found |= linear(f"{attention}q_a_proj", c.q_lora_rank, d, rest)
            found |= {f"{attention}q_a_layernorm.weight": ("BF16", (c.q_lora_rank,))}
            found |= linear(f"{attention}q_b_proj", q_out, c.q_lora_rank, rest)
        found |= linear(f"{attention}kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, d, rest)
        found |= {f"{attention}kv_a_layernorm.weight": ("BF16", (c.kv_lora_rank,))}
        found |= linear(f"{attention}kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, rest)
        found |= linear(f"{attention}o_proj", d, heads * c.v_head_dim, rest)
        mlps = [(f"{layer}mlp.", c.intermediate_size, rest)]
        if n >= c.first_k_dense_replace:
            found[f"{layer}mlp.gate.weight"] = ("BF16", (c.n_routed_experts, d))
            if c.topk_method == "noaux_tc":
                found[f"{layer}mlp.gate.e_score_correction_bias"] = ("F32", (c.n_routed_experts,))
            mlps = [(f"{layer}mlp.shared_experts.", c.n_shared_experts * c.moe_intermediate_size, rest)]
            mlps += [(f"{layer}mlp.experts.{e}.", c.moe_intermediate_size, experts) for e in range(c.n_routed_experts)]
        for name, inner, fmt in mlps:
            found |= linear(f"{name}gate_proj", inner, d, fmt) | linear(f"{name}up_proj", inner, d, fmt)
            found |= linear(f"{name}down_proj", d, inner, fmt)
    return found


FAMILIES = ["kimi_k25", "kimi_k2", "kimi_k2_thinking", "deepseek_v3_odd", "moonlight", "deepseek_v2_lite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_published_names_types_and_shapes(made: Callable[[str], Path], family: str) -> None:
    found = {n: s for n, s in signatures(made(family)).items() if not n.startswith(("vision_tower", "mm_projector"))}
    assert found == expected_language_model(small(getattr(families, family)))


def test_vision_names(made: Callable[[str], Path]) -> None:
    found = {n: s for n, s in signatures(made("kimi_k25")).items() if n.startswith(("vision_tower", "mm_projector"))}
    assert len(found) == 6 + 3 + 2 + 2 * 12
    for name, shape in {
        "mm_projector.pre_norm.bias": (32,),
        "mm_projector.proj.0.weight": (128, 128),
        "mm_projector.proj.2.weight": (128, 128),
        "mm_projector.proj.2.bias": (128,),
        "vision_tower.patch_embed.proj.weight": (32, 3, 14, 14),
        "vision_tower.patch_embed.pos_emb.weight": (8, 8, 32),
        "vision_tower.encoder.blocks.1.norm1.weight": (32,),
        "vision_tower.encoder.blocks.1.wqkv.weight": (96, 32),
        "vision_tower.encoder.blocks.0.wo.bias": (32,),
        "vision_tower.encoder.blocks.0.mlp.fc0.weight": (64, 32),
        "vision_tower.encoder.blocks.0.mlp.fc1.weight": (32, 64),
        "vision_tower.encoder.final_layernorm.weight": (32,),
    }.items():
        assert found[name] == ("BF16", shape)


def test_published_size_of_k25(kimi_dir: Path) -> None:
    # 64 shards, 208,550 tensors, 595.15 GB = 554.27 GiB: the scan of the published files.
    raw = json.loads((kimi_dir / "config.json").read_text())
    vision = Fields(raw, "config.json").section("vision_config")
    sections = RandomWeights(ModelConfig.from_json(raw), 0).sections(vision)
    sizes = [tensor.n_bytes for section in sections for tensor in section]
    assert (len(sections), len(sizes)) == (64, 208_550)
    assert round(sum(sizes) / 1e9, 2) == 595.15 and round(sum(sizes) / 2**30, 2) == 554.27


def test_index_and_shards(made: Callable[[str], Path]) -> None:
    directory = made("kimi_k25")
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-000005.safetensors" for i in range(1, 6)]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with closing(Checkpoint(directory)) as checkpoint:
        assert set(index["weight_map"]) == set(checkpoint.tensors)
        assert index["metadata"]["total_size"] == sum(info.n_bytes for info in checkpoint.tensors.values())
        for name, info in checkpoint.tensors.items():
            assert index["weight_map"][name] == info.path.name
            assert info.offset % {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1}[info.dtype] == 0
    assert json.loads((directory / "config.json").read_text()) == small(families.kimi_k25)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 511}


def test_same_bytes_everywhere(made: Callable[[str], Path], tmp_path: Path) -> None:
    assert digest(made("kimi_k25")) == DIGEST
    write_checkpoint(small(families.kimi_k25), tmp_path / "again", seed=5)
    assert digest(tmp_path / "again") == DIGEST
    write_checkpoint(small(families.kimi_k25), tmp_path / "other", seed=6)
    assert digest(tmp_path / "other") != DIGEST


def test_shard_size_changes_files_not_tensors(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(small(families.kimi_k25), tmp_path / "split", seed=5, shard_bytes=1 << 16)
    paths = list((tmp_path / "split").glob("*.safetensors"))
    assert len(paths) > 8
    with closing(Checkpoint(tmp_path / "split")) as split, closing(Checkpoint(made("kimi_k25"))) as whole:
        assert set(split.tensors) == set(whole.tensors)
        for name in whole.tensors:
            assert np.array_equal(split.array(name), whole.array(name)), name
        for path in paths:
            held = [info.n_bytes for info in split.tensors.values() if info.path == path]
            assert sum(held) <= 1 << 16 or len(held) == 1


def test_int4_experts_use_the_whole_range(made: Callable[[str], Path]) -> None:
    with closing(Checkpoint(made("kimi_k25"))) as checkpoint:
        base = "language_model.model.layers.1.mlp.experts.2.up_proj"
        values = unpack_int4(checkpoint.array(f"{base}.weight_packed"))
        counts = np.bincount((values + 8).ravel().astype(int), minlength=16)
        assert counts.min() > values.size / 16 * 0.8
        scales = bf16_to_float32(checkpoint.array(f"{base}.weight_scale").astype(np.uint16))
        assert (np.frexp(scales)[0] != 0.5).mean() > 0.9 and len(np.unique(scales)) > 50
        assert checkpoint.array(f"{base}.weight_shape").tolist() == list(values.shape)


def test_fp8_experts_use_the_whole_range(made: Callable[[str], Path]) -> None:
    with closing(Checkpoint(made("kimi_k2"))) as checkpoint:
        base = "model.layers.1.mlp.experts.0.gate_proj"
        codes = fp8_e4m3_to_float32(checkpoint.array(f"{base}.weight").astype(np.uint8))
        assert np.isfinite(codes).all() and codes.max() == 448 and codes.min() == -448
        factors = checkpoint.array(f"{base}.weight_scale_inv")
        assert len(np.unique(factors)) == factors.size and (np.frexp(factors)[0] != 0.5).all()


def test_every_tensor_is_its_own(made: Callable[[str], Path]) -> None:
    with closing(Checkpoint(made("moonlight"))) as checkpoint:
        starts = {name: checkpoint.array(name).tobytes()[:64] for name in checkpoint.tensors}
    assert len(set(starts.values())) == len(starts)


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_checkpoint(small(families.moonlight), tmp_path / "m", seed=1, progress=lambda *call: calls.append(call))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    total = index["metadata"]["total_size"]
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert calls == sorted(calls)


@pytest.mark.parametrize("vocab", [512, 700])
def test_small_tokenizer(tmp_path: Path, vocab: int) -> None:
    write_checkpoint(small(families.moonlight, vocab_size=vocab), tmp_path / "m", seed=1)
    lines = (tmp_path / "m" / "tiktoken.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    assert ranks == {bytes([byte]): byte for byte in range(256)}
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    added = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
    assert added[vocab - 256] == "[BOS]" and added[vocab - 254] == "<|im_end|>" and added[vocab - 1] == "[PAD]"
    special = {text: i for i, text in added.items()}
    encoding = tiktoken.Encoding("small", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    ids = encoding.encode("é<|im_end|>", allowed_special="all")
    assert ids == [0xC3, 0xA9, vocab - 254] and encoding.decode(ids) == "é<|im_end|>"


def test_small_tokenizer_follows_the_published_one(kimi_dir: Path, tmp_path: Path) -> None:
    write_checkpoint(small(families.moonlight), tmp_path / "m", seed=1)
    ours = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    published = json.loads((kimi_dir / "tokenizer_config.json").read_text())
    shifted = {str(int(i) - 163584 + 256): token for i, token in published["added_tokens_decoder"].items()}
    assert ours["added_tokens_decoder"] == shifted
    assert ours["additional_special_tokens"] == published["additional_special_tokens"]
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "tokenizer_class"):
        assert ours[key] == published[key]


def test_published_tokenizer_is_copied(kimi_dir: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "vocab_size": 163840}
    write_checkpoint(small(families.moonlight, **sizes), tmp_path / "m", seed=1, tokenizer=kimi_dir)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (kimi_dir / name).read_bytes()


def test_tokenizer_json_is_copied_and_measured(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 510}}, "added_tokens": [{"id": 511, "content": "x"}]}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenization_x.py").write_text("raise SystemExit")
    write_checkpoint(small(families.deepseek_v2_lite), tmp_path / "m", seed=1, tokenizer=source)
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert not (tmp_path / "m" / "tokenization_x.py").exists() and not (tmp_path / "m" / "tiktoken.model").exists()
    with pytest.raises(ConfigError, match=r"vocab_size 511 is less than the 512 ids"):
        write_checkpoint(small(families.deepseek_v2_lite, vocab_size=511), tmp_path / "n", seed=1, tokenizer=source)


def without(key: str) -> dict[str, Any]:
    raw = small(families.moonlight)
    del raw[key]
    return raw


REFUSALS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "JSON object"),
    "other family": ({"model_type": "llama"}, "model_type.*llama"),
    "no family": ({}, "model_type is missing"),
    "missing key": (without("kv_lora_rank"), "kv_lora_rank is missing"),
    "vocabulary": (small(families.moonlight, vocab_size=511), "vocab_size 511.*512 or more"),
    "tied": (small(families.moonlight, tie_word_embeddings=True), "tie_word_embeddings must be false"),
    "narrow": (small(families.moonlight, hidden_size=16), "hidden_size must be at least 32"),
    "int4 hidden": (small(families.kimi_k25, hidden_size=80), "hidden_size must be a multiple of 32"),
    "int4 inner": (small(families.kimi_k25, moe_intermediate_size=80), "moe_intermediate_size must be a multiple"),
    "vision key": (families.kimi_k25() | {"vision_config": {}}, "mm_hidden_size is missing"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_key_and_write_nothing(tmp_path: Path, case: str) -> None:
    raw, message = REFUSALS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        write_checkpoint(raw, tmp_path / "m", seed=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_directories_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = small(families.moonlight)
    with pytest.raises(ValueError, match=re.escape(f"--tokenizer {tmp_path}: holds neither")):
        write_checkpoint(raw, tmp_path / "m", seed=1, tokenizer=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    with pytest.raises(ValueError, match="full: exists and is not an empty directory"):
        write_checkpoint(raw, tmp_path / "full", seed=1)
    with pytest.raises(ValueError, match="not an empty directory"):
        write_checkpoint(raw, tmp_path / "full" / "keep", seed=1)
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="are free; name a directory on a larger disk"):
        write_checkpoint(raw, tmp_path / "m", seed=1)
    assert (tmp_path / "full" / "keep").read_text() == "mine"


def test_torch_reads_the_shards(made: Callable[[str], Path]) -> None:
    # The format's own reader and ours agree on every byte.
    with closing(Checkpoint(made("deepseek_v3_odd"))) as checkpoint:
        for path in sorted(made("deepseek_v3_odd").glob("*.safetensors")):
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    assert (
                        shard.get_tensor(name).view(torch.uint8).numpy().tobytes() == checkpoint.array(name).tobytes()
                    )
