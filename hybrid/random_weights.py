"""Every tensor of a made-up checkpoint: published name, dtype and shape, and how its bytes are drawn.

The weights are scaled so that mistakes show and rounding does not. Per token, after the embedding (standard deviation
1) the layers add, over all depths together, attention ATTENTION, dense or shared experts DENSE and routed experts
ROUTED times that; each of n layers adds its share / sqrt(n). Attention scores spread by SCORES, logits by LOGITS. A
wrong rope, nibble order, projection or expert then moves logits by tenths, while int8 activations (1.3 % of ROUTED)
move them by thousandths, at any width and depth. The router has its own file.

Names follow the published Kimi-K2.5, Kimi-K2, DeepSeek-V3 and DeepSeek-V2 checkpoints; `hybrid.config` knows the
shapes. Called by `hybrid.random_checkpoint`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.config import ModelConfig, is_router
from hybrid.config_json import Fields
from hybrid.random_bits import BELL_STD, RandomBits, bell, coarse_bell
from hybrid.random_router import CODE, CONTEXT_STD, Router, class_dimensions, make_router, mixing_rms
from hybrid.random_vision import Shapes, projector, tower
from offload.config import FP8_BLOCK, GROUP, PROJECTIONS, ExpertFormat
from offload.formats import FP8_MAX, Array, Float, float32_to_bf16, float32_to_fp8_e4m3

ATTENTION = 1.0  # at the first position; later ones average over values and get less
DENSE = 0.5
ROUTED = 0.1
SCORES = 1.8
LOGITS = 1.6
GATED = 0.6  # rms of silu(a) * b for unit normal a and b
DAMPED = 2.0**-7  # what layers write to the class dimensions, beside the others
NIBBLE_RMS = 21.5**0.5  # of uniform -8..7
FP8_RMS = 448 * 0.4348  # of `coarse_bell` times the largest fp8 value
CHUNK = 1 << 22  # weights drawn at a time

ITEM_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class MadeTensor:
    """One tensor; `draw` gives its bytes in order, in pieces of bounded size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    draw: Callable[[], Iterator[Array]]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class RandomWeights:
    """The tensors of one model. Equal model and seed give equal bytes."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model = model
        self.seed = seed
        self._dimensions = class_dimensions(model)
        self._mixing = mixing_rms(model, self._router(model.moe_layers[0]))  # all layers use the same levels

    def sections(self, vision: Fields | None) -> list[list[MadeTensor]]:
        """The tensors in the order of the published shards: each layer, the ends, the projector, the vision tower."""
        shapes = self.model.tensor_shapes()
        sections = []
        for layer in range(self.model.num_hidden_layers):
            base = f"model.layers.{layer}."
            section = [t for name, shape in shapes.items() if name.startswith(base) for t in self._tensors(name, shape)]
            sections.append(section + (self._experts(layer) if layer in self.model.moe_layers else []))
        ends = [name for name in shapes if not name.startswith("model.layers.")]
        sections.append([tensor for name in ends for tensor in self._tensors(name, shapes[name])])
        if vision is not None:
            sections += [self._plain(projector(vision)), self._plain(tower(vision))]
        return sections

    def _tensors(self, name: str, shape: tuple[int, ...]) -> list[MadeTensor]:
        """A tensor of the language model outside the routed experts, with its fp8 scales where it has them."""
        full = self.model.tensor_prefix + name
        if name.endswith("e_score_correction_bias"):
            return [MadeTensor(full, "F32", shape, lambda: iter([self._router_bias(name)]))]
        if is_router(name):
            return [MadeTensor(full, "BF16", shape, lambda: iter([self._router_weight(name, shape)]))]
        if len(shape) == 1:
            return [MadeTensor(full, "BF16", shape, lambda: iter([self._gains(full, shape[0])]))]
        if name == "model.embed_tokens.weight":
            return [MadeTensor(full, "BF16", shape, lambda: self._embedding(full, shape))]
        fmt: ExpertFormat = "bf16"
        if self.model.expert_format == "fp8" and name != "lm_head.weight":
            fmt = "fp8"
        return self._matrix(full.removesuffix(".weight"), (shape[0], shape[1]), self._std(name, shape[1]), fmt)

    def _experts(self, layer: int) -> list[MadeTensor]:
        """The routed experts of one layer in the model's format."""
        model = self.model
        geometry = model.expert_geometry
        written = ROUTED / math.sqrt(len(model.moe_layers)) / self._mixing / GATED
        made = []
        for expert in range(geometry.n_experts):
            for projection in PROJECTIONS:
                shape = geometry.shape(projection)
                std = (written if projection == "down" else 1.0) / math.sqrt(shape[1])
                made += self._matrix(model.expert_name(layer, expert, projection), shape, std, model.expert_format)
        return made

    def _std(self, name: str, fan_in: int) -> float:
        """Standard deviation of a weight matrix's entries."""
        model, unit = self.model, 1 / math.sqrt(fan_in)
        if name.endswith("o_proj.weight"):
            return ATTENTION / math.sqrt(model.num_hidden_layers) * unit
        if name.endswith("down_proj.weight"):
            return DENSE / math.sqrt(model.num_hidden_layers) / GATED * unit
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            head = model.qk_nope_head_dim + model.qk_rope_head_dim
            # Rounded, because the scale holds a logarithm, which differs in the last bit between machines.
            return float(f"{SCORES / (model.softmax_scale * math.sqrt(head)):.4g}") * unit
        return LOGITS * unit if name == "lm_head.weight" else unit

    def _matrix(self, name: str, shape: tuple[int, int], std: float, fmt: ExpertFormat) -> list[MadeTensor]:
        """A linear layer's tensors. Where it writes to the residual stream, the class dimensions get little."""
        n_out, n_in = shape
        rows = self._dimensions if name.endswith(("o_proj", "down_proj")) else self._dimensions[:0]
        if fmt == "int4":
            packed, groups = (n_out, n_in // 8), (n_out, n_in // GROUP)
            return [
                MadeTensor(f"{name}.weight_packed", "I32", packed, lambda: self._nibbles(name, packed)),
                MadeTensor(f"{name}.weight_scale", "BF16", groups, lambda: self._steps(name, groups, std, rows)),
                MadeTensor(f"{name}.weight_shape", "I32", (2,), lambda: iter([np.array(shape, "<i4")])),
            ]
        if fmt == "fp8":
            blocks = (-(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK))
            return [
                MadeTensor(f"{name}.weight", "F8_E4M3", shape, lambda: self._codes(name, shape, rows)),
                MadeTensor(f"{name}.weight_scale_inv", "F32", blocks, lambda: self._factors(name, blocks, std)),
            ]
        return [MadeTensor(f"{name}.weight", "BF16", shape, lambda: self._bells(f"{name}.weight", shape, std, rows))]

    def _bells(self, name: str, shape: tuple[int, ...], std: float, damped: npt.NDArray[np.intp]) -> Iterator[Array]:
        """bf16 weights from a bell."""
        return self._looked_up(name, shape, bell() * np.float32(std / BELL_STD), damped)

    def _codes(self, name: str, shape: tuple[int, int], damped: npt.NDArray[np.intp]) -> Iterator[Array]:
        """fp8 codes from a bell that uses the whole range."""
        bits, values = RandomBits(self.seed, f"{name}.weight"), coarse_bell() * np.float32(FP8_MAX)
        table, small = (float32_to_fp8_e4m3(values * np.float32(gain)).tobytes() for gain in (1, DAMPED))
        for begin, end in _row_chunks(*shape):
            drawn = bits.bytes((end - begin) * shape[1]).tobytes()
            made = np.frombuffer(bytearray(drawn.translate(table)), np.uint8).reshape(-1, shape[1])
            inside = damped[(damped >= begin) & (damped < end)] - begin
            for row in inside.tolist():
                made[row] = np.frombuffer(drawn[row * shape[1] : (row + 1) * shape[1]].translate(small), np.uint8)
            yield made

    def _looked_up(
        self, name: str, shape: tuple[int, ...], values: Float, damped: npt.NDArray[np.intp]
    ) -> Iterator[Array]:
        """bf16 picks from 65536 values; the `damped` rows get DAMPED times theirs."""
        table, small = float32_to_bf16(values), float32_to_bf16(values * np.float32(DAMPED))
        bits = RandomBits(self.seed, name)
        width = math.prod(shape[1:])
        for begin, end in _row_chunks(shape[0], width):
            words = bits.words((end - begin) * width).reshape(end - begin, width)
            made = table[words]
            inside = damped[(damped >= begin) & (damped < end)] - begin
            made[inside] = small[words[inside]]
            yield made

    def _nibbles(self, name: str, shape: tuple[int, int]) -> Iterator[Array]:
        """int4 weights, uniform in -8..7."""
        bits = RandomBits(self.seed, f"{name}.weight_packed")
        for begin, end in _row_chunks(shape[0], shape[1] * 8):
            yield bits.bytes((end - begin) * shape[1] * 4)

    def _steps(self, name: str, shape: tuple[int, int], std: float, damped: npt.NDArray[np.intp]) -> Iterator[Array]:
        """bf16 scales of int4 groups, uniform in 0.6 .. 1.4 times their mean."""
        steps = (0.6 + 0.8 * np.arange(1 << 16) / (1 << 16)) * (std / NIBBLE_RMS)
        return self._looked_up(f"{name}.weight_scale", shape, steps.astype(np.float32), damped)

    def _factors(self, name: str, shape: tuple[int, int], std: float) -> Iterator[Array]:
        """float32 factors of fp8 blocks, no two alike."""
        jitter = RandomBits(self.seed, f"{name}.weight_scale_inv").uniform(math.prod(shape), 0.7, 1.3)
        yield (jitter * (std / FP8_RMS)).astype("<f4").reshape(shape)

    def _gains(self, name: str, n: int) -> Array:
        """Norm weights around 1; exactly 1 where the class dimensions pass on their way to a router."""
        gains = RandomBits(self.seed, name).uniform(n, 0.6, 1.4)
        if name.endswith("post_attention_layernorm.weight"):
            gains[self._dimensions] = 1
        return float32_to_bf16(gains.astype(np.float32))

    def _embedding(self, name: str, shape: tuple[int, ...]) -> Iterator[Array]:
        """Unit bells, and each token's class: token t has class t modulo their number."""
        begin, none, classes = 0, self._dimensions[:0], len(self._dimensions)
        for rows in self._bells(name, shape, 1.0, none):
            codes = np.zeros((len(rows), classes), np.float32)
            codes[np.arange(len(rows)), (begin + np.arange(len(rows))) % classes] = CODE
            rows[:, self._dimensions] = float32_to_bf16(codes)
            begin += len(rows)
            yield rows

    def _router(self, layer: int) -> Router:
        return make_router(self.model, RandomBits(self.seed, f"router of layer {layer}"))

    def _router_bias(self, name: str) -> Array:
        bias = self._router(_layer(name)).bias
        assert bias is not None, "only noaux_tc has a bias"
        return bias.astype("<f4")

    def _router_weight(self, name: str, shape: tuple[int, ...]) -> Array:
        """(E, D): the class logits on the class dimensions, a little of everything else on the others."""
        layer = _layer(name)
        words = RandomBits(self.seed, name).words(math.prod(shape))
        weight = bell()[words].reshape(shape).astype(np.float64) * (CONTEXT_STD / BELL_STD / math.sqrt(shape[1]))
        depth = (layer + 1) / self.model.num_hidden_layers
        # The norm divides by the stream's rms, which has grown by what the layers so far have added.
        added = (ATTENTION / 2) ** 2 + DENSE**2 + ROUTED**2
        grown = math.sqrt(1 + depth * added)
        weight[:, self._dimensions] = self._router(layer).logits * (grown / CODE)
        return float32_to_bf16(weight.astype(np.float32))

    def _plain(self, shapes: Shapes) -> list[MadeTensor]:
        """bf16 tensors by name with shape and standard deviation; norm weights (std 0) are gains."""

        def one(name: str, shape: tuple[int, ...], std: float) -> MadeTensor:
            if std == 0:
                return MadeTensor(name, "BF16", shape, lambda: iter([self._gains(name, shape[0])]))
            return MadeTensor(name, "BF16", shape, lambda: self._bells(name, shape, std, self._dimensions[:0]))

        return [one(name, shape, std) for name, (shape, std) in shapes.items()]


def _row_chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK weights."""
    step = max(1, CHUNK // max(width, 1))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _layer(name: str) -> int:
    """The number in `model.layers.N.…`."""
    return int(name.split(".")[2])
