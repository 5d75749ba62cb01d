"""A trained state as a published checkpoint: `python -m hybrid.nano.export DIR OUT`.

Routed experts become INT4 with group size 32 (`pack-quantized`), everything else bf16, the names Kimi-K2.5's own. The
training saw these very roundings, so nothing is lost here.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hybrid.nano.network import int4
from hybrid.nano.train import CONFIG, PHASES
from hybrid.nano.vocabulary import read_vocabulary
from offload.checkpoint import INDEX_NAME
from offload.formats import pack_int4

SHARD = "model-00001-of-000001.safetensors"


def tensors(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by published name, from what `hybrid.nano.train` saves."""
    made: dict[str, torch.Tensor] = {}
    for key, weight in state["weights"].items():
        name = key.rpartition("weights.")[2].replace("/", ".")
        if key.startswith("tower."):
            made[name] = weight.bfloat16()
            continue
        if ".experts." not in name:
            made[f"language_model.{name}"] = weight.bfloat16()
            continue
        base, projection = name.rsplit(".", 1)
        for expert, matrix in enumerate(weight):
            made |= _packed(f"language_model.{base}.{expert}.{projection}_proj", matrix)
    for layer, bias in state["biases"].items():
        made[f"language_model.model.layers.{layer}.mlp.gate.e_score_correction_bias"] = bias.float()
    return {name: tensor.cpu().contiguous() for name, tensor in sorted(made.items())}


def _packed(name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = int4(matrix)
    words = pack_int4(codes.flatten(-2).to(torch.int8).cpu().numpy())
    return {
        f"{name}.weight_packed": torch.from_numpy(words),
        f"{name}.weight_scale": scales.bfloat16(),
        f"{name}.weight_shape": torch.tensor(matrix.shape, dtype=torch.int32),
    }


def export(trained: Path, out: Path) -> None:
    """Write the checkpoint directory.

    Raises OSError where `trained` holds no state, ValueError where it has not come to the phases with INT4 rounding.
    """
    state = torch.load(trained / "state.pt", map_location="cpu", weights_only=True)
    phase = PHASES[min(state["progress"]["phase"], len(PHASES) - 1)]
    if not phase.quantised:
        raise ValueError(
            f"{trained}: is in the phase {phase.name}, which knows nothing of INT4; go on with the training"
        )
    made = tensors(state)
    out.mkdir(parents=True, exist_ok=True)
    save_file(made, out / SHARD, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in made.values())
    _write(out / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(made, SHARD)})
    for file in (CONFIG, CONFIG.with_name("preprocessor_config.json")):
        shutil.copyfile(file, out / file.name)
    config = json.loads(CONFIG.read_text())
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(out / "generation_config.json", {**ids, "do_sample": False})  # a model of this size is best taken greedily
    read_vocabulary(trained).write(out)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.export", description=__doc__)
    parser.add_argument("trained", type=Path, help="directory of hybrid.nano.train")
    parser.add_argument("out", type=Path, help="checkpoint directory to write")
    options = parser.parse_args(arguments)
    try:
        export(options.trained, options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
