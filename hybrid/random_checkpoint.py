"""Makes a checkpoint with random weights in the published layout, of any size: `hybrid make-checkpoint`.

Shards, index, config.json, generation_config.json and tokenizer files, as a download would bring them. The tensors
are `hybrid.random_weights`' and are drawn while they are written, so memory stays at a few megabytes. The same config
and seed give the same bytes on every machine. Called by the `hybrid` command and the tests.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.config import ConfigError, ModelConfig
from hybrid.config_json import Fields
from hybrid.random_tokenizer import check_tokenizer, copy_tokenizer, write_small_tokenizer
from hybrid.random_weights import MadeTensor, RandomWeights
from offload.checkpoint import INDEX_NAME
from offload.config import GROUP

SHARD_BYTES = 16 << 30  # a layer of the largest model fits, so that each layer has its own shard, as published
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
SMALLEST_WIDTH = 32  # a group of int4 weights; also what the router's class dimensions need


def write_checkpoint(
    config: dict[str, Any],
    out: Path,
    seed: int,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a checkpoint for the raw `config` (a parsed config.json) into the new or empty directory `out`.

    `tokenizer` is a directory to copy tokenizer files from; None writes a small byte-level one. No shard exceeds
    `shard_bytes` unless a single tensor does. `progress(done, total)` counts bytes. Raises ConfigError (a ValueError)
    that names the key, or ValueError that names the flag and the remedy.
    """
    if not isinstance(config, dict):
        raise ConfigError("config.json: expected a JSON object, as in a published checkpoint")
    model = ModelConfig.from_json(config)
    _check(model)
    check_tokenizer(tokenizer, model.vocab_size)
    vision = Fields(config, "config.json").section("vision_config") if model.vision else None
    shards = list(_shards(RandomWeights(model, seed).sections(vision), shard_bytes))
    total = sum(tensor.n_bytes for shard in shards for tensor in shard)
    _prepare(out, total)
    _write_shards(out, shards, total, progress)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _generation(config))
    if tokenizer is None:
        write_small_tokenizer(out, model.vocab_size)
    else:
        copy_tokenizer(tokenizer, out)


def _check(model: ModelConfig) -> None:
    """What the made weights need beyond a valid config."""
    if model.tie_word_embeddings:
        raise ConfigError("config.json: tie_word_embeddings must be false: a head of its own is always written")
    if model.hidden_size < SMALLEST_WIDTH:
        raise ConfigError(f"config.json: hidden_size must be at least {SMALLEST_WIDTH}; found {model.hidden_size}")
    if model.expert_format == "int4":
        for key in ("hidden_size", "moe_intermediate_size"):
            if getattr(model, key) % GROUP:
                raise ConfigError(
                    f"config.json: {key} must be a multiple of {GROUP}, the group size of its int4 experts; "
                    f"found {getattr(model, key)}"
                )


def _prepare(out: Path, total: int) -> None:
    """An empty directory with room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty directory; name a new one or empty it first")
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if total > free:
        raise ValueError(
            f"--out {out}: the weights take {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "name a directory on a larger disk"
        )


def _shards(sections: list[list[MadeTensor]], limit: int) -> Iterator[list[MadeTensor]]:
    """One shard for each section, more where it exceeds the limit.

    Within a shard the tensors with the largest elements come first, so that all are aligned.
    """
    for section in sections:
        shard: list[MadeTensor] = []
        size = 0
        for tensor in section:
            if shard and size + tensor.n_bytes > limit:
                yield _aligned(shard)
                shard, size = [], 0
            shard.append(tensor)
            size += tensor.n_bytes
        yield _aligned(shard)


def _aligned(shard: list[MadeTensor]) -> list[MadeTensor]:
    return sorted(shard, key=lambda tensor: -tensor.item_bytes)


def _write_shards(out: Path, shards: list[list[MadeTensor]], total: int, progress: Callable[[int, int], None]) -> None:
    """All shards, then the index that makes the directory a checkpoint."""
    weight_map: dict[str, str] = {}
    done = 0
    progress(done, total)
    for number, shard in enumerate(shards, 1):
        path = out / f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        with path.open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                before = done
                for piece in tensor.draw():
                    file.write(piece.data)
                    done += piece.nbytes
                    progress(done, total)
                assert done - before == tensor.n_bytes, f"{tensor.name}: drew {done - before} bytes"
                weight_map[tensor.name] = path.name
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(out / INDEX_NAME, index)


def _header(shard: list[MadeTensor]) -> bytes:
    """A safetensors header with its length in front, padded so that the data start at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.n_bytes],
        }
        at += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special ids, from the text model's part where the config is nested."""
    text = config.get("text_config") or {}
    found = {key: config.get(key, text.get(key)) for key in GENERATION_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
