"""hybrid.narrow and hybrid.widths: codes against the nearest of all values, products against float64, loading."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

import hybrid.narrow
import hybrid.weights
from hybrid.batch import Batch, Row
from hybrid.config import ModelConfig, NarrowFormat
from hybrid.inputs import upload
from hybrid.kv import allocate
from hybrid.mla import MlaPath
from hybrid.model import Transformer, build_model
from hybrid.narrow import Matrix, Narrow, linear, quantised, widened
from hybrid.random_checkpoint import write_checkpoint
from hybrid.weights import load_weights
from hybrid.widths import format_of, held_bytes
from offload.checkpoint import Checkpoint, CheckpointError
from offload.formats import fp8_e4m3_to_float32
from tests import families

CPU = torch.device("cpu")
Array = npt.NDArray[np.float64]
FORMATS: tuple[NarrowFormat, ...] = ("fp8", "int8")


def values_of(codes: torch.Tensor) -> Array:
    """What codes mean, without torch."""
    plain = codes.view(torch.uint8).numpy()
    return fp8_e4m3_to_float32(plain).astype(float) if codes.dtype != torch.int8 else plain.view(np.int8).astype(float)


def decoded(weight: Narrow) -> Array:
    """Code times factor, element by element."""
    n_out, n_in = weight.shape
    each_row = len(weight.scales) == n_out and weight.scales.shape[1] == 1
    rows = np.arange(n_out)[:, None] // (1 if each_row else 128)
    columns = np.arange(n_in)[None] // (n_in if each_row else 128)
    return values_of(weight.codes) * weight.scales.double().numpy()[rows, columns]


def by_block(n_out: int, n_in: int) -> Narrow:
    generator = torch.Generator().manual_seed(n_out)
    codes = torch.randn((n_out, n_in), generator=generator).to(torch.float8_e4m3fn)
    return Narrow(codes, torch.rand((-(-n_out // 128), -(-n_in // 128)), generator=generator) + 0.2)


def by_row(fmt: NarrowFormat, n_out: int, n_in: int) -> Narrow:
    spread = torch.logspace(-3, 3, n_out)[:, None]  # rows of very different sizes
    return Narrow(*quantised(torch.randn((n_out, n_in), generator=torch.Generator().manual_seed(n_in)) * spread, fmt))


MADE: dict[str, Callable[[int, int], Narrow]] = {
    "blocks": by_block,
    "fp8": lambda n_out, n_in: by_row("fp8", n_out, n_in),
    "int8": lambda n_out, n_in: by_row("int8", n_out, n_in),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_the_nearest_there_are(fmt: NarrowFormat) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((40, 70), generator=generator) * torch.logspace(-20, 20, 40)[:, None]
    weights[:, 5] *= 30  # one column far from the others: small codes are used too
    weights[7], weights[8] = 0, 0
    weights[8, 3] = 1e-4
    codes, scales = quantised(weights, fmt)
    every = torch.arange(256, dtype=torch.uint8).view(codes.dtype)
    grid = values_of(every)
    grid = grid[np.isfinite(grid) & (np.abs(grid) <= (127 if fmt == "int8" else 448))]
    wanted = weights.double().numpy() / scales.double().numpy()
    distance = np.abs(wanted[..., None] - grid).min(-1)
    found = np.abs(wanted - values_of(codes))
    # The quotient is rounded to float32 before the nearest code is taken.
    np.testing.assert_allclose(found, distance, atol=448 * 2.0**-23)
    largest = np.abs(values_of(codes)).max(1)
    assert np.array_equal(largest == 0, np.arange(40) == 7)
    assert (largest[largest > 0] == grid.max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_any_type_are_quantised_as_float32(dtype: torch.dtype) -> None:
    rows = torch.randn((9, 40), generator=torch.Generator().manual_seed(2)).to(dtype)
    for fmt in FORMATS:
        for found, expected in zip(quantised(rows, fmt), quantised(rows.float(), fmt), strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("tile", [1, 300 * 130, 1 << 24])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 260), (640, 64), (64, 640)])
@pytest.mark.parametrize("kind", MADE)
def test_products_are_those_of_the_decoded_matrix(
    kind: str, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid.narrow, "WIDE_TILE", tile)
    weight = MADE[kind](*shape)
    exact = decoded(weight)
    np.testing.assert_array_equal(weight.wide(torch.float32).numpy(), exact.astype(np.float32))
    rounded = torch.tensor(exact).float().bfloat16()
    assert torch.equal(weight.wide(torch.bfloat16), rounded)
    x = torch.randn((3, shape[1]), generator=torch.Generator().manual_seed(3))
    found, expected = weight.linear(x), x.double().numpy() @ exact.T
    size = np.abs(x.double().numpy()) @ np.abs(exact).T  # of the sums' terms
    assert found.shape == (3, shape[0]) and found.dtype == torch.float32
    assert (np.abs(found.numpy() - expected) <= size * 2.0**-22 * math.sqrt(shape[1])).all()
    narrow_x = x.bfloat16()
    exactly = narrow_x.double().numpy() @ exact.T
    loose = weight.linear(narrow_x)
    assert loose.dtype == torch.bfloat16
    # The product and, by row, the factor round to bf16 (2^-9 each); by block the weights do.
    assert (np.abs(loose.double().numpy() - exactly) <= np.abs(exactly) * 2.0**-7 + size * 2.0**-9).all()


def test_wide_matrices_are_multiplied_as_ever() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert widened(weight, torch.bfloat16) is weight


def config_of(raw: families.Raw, **changes: Any) -> ModelConfig:
    return ModelConfig.from_json(raw | changes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_which_tensors_are_narrow(fmt: NarrowFormat) -> None:
    config = config_of(families.deepseek_v3())
    narrow = {n for n, s in config.tensor_shapes().items() if format_of(n, s, fmt)}
    wide = set(config.tensor_shapes()) - narrow
    assert all("_proj" in name or name == "lm_head.weight" for name in narrow)
    assert all("norm" in name or ".gate." in name or name == "model.embed_tokens.weight" for name in wide)
    assert format_of("lm_head.weight", (9, 9), fmt) == "int8"
    assert not any(format_of(n, s, None) for n, s in config.tensor_shapes().items())


@dataclass(frozen=True, slots=True)
class Made:
    """A random checkpoint."""

    config: ModelConfig
    directory: Path

    def load(self, narrow: NarrowFormat | None, dtype: torch.dtype = torch.float32) -> dict[str, Matrix]:
        checkpoint = Checkpoint(self.directory)
        try:
            return load_weights(checkpoint, self.config, CPU, dtype, lambda *_: None, lambda _: None, narrow)
        finally:
            checkpoint.close()


RAW = {"bf16": families.kimi_k25, "fp8": families.deepseek_v3_odd}


@pytest.fixture(scope="module", params=RAW)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whose matrices are published in bf16, and one in fp8 with partial blocks."""
    directory = tmp_path_factory.mktemp("narrow") / request.param
    write_checkpoint(RAW[request.param](), directory, seed=4, tokenizer=None)
    return Made(ModelConfig.from_directory(directory), directory)


@pytest.mark.parametrize("fmt", FORMATS)
def test_loading_takes_the_bytes_it_is_said_to(made: Made, fmt: NarrowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(values: torch.Tensor, fmt: NarrowFormat) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(values.numel())
        return quantised(values, fmt)

    whole = made.load(fmt, torch.bfloat16)
    monkeypatch.setattr(hybrid.weights, "quantised", watched)
    monkeypatch.setattr(hybrid.weights, "STRIP", 1 << 14)
    strips = made.load(fmt, torch.bfloat16)
    published, wide = made.config.expert_format == "fp8", made.load(None)
    for name, shape in made.config.tensor_shapes().items():
        tensor, reference = strips[name], wide[name]
        assert tensor.nbytes == held_bytes(name, shape, 2, fmt, published), name
        assert isinstance(reference, torch.Tensor)
        if format_of(name, shape, fmt) is None:
            assert isinstance(tensor, torch.Tensor)
            continue
        again = whole[name]
        assert isinstance(tensor, Narrow) and isinstance(again, Narrow)
        assert torch.equal(tensor.codes.view(torch.uint8), again.codes.view(torch.uint8)), name
        assert torch.equal(tensor.scales, again.scales), name
        kept = published and fmt == "fp8" and name != "lm_head.weight"
        error = float((tensor.wide(torch.float32) - reference).norm() / reference.norm())
        assert error == 0 if kept else 0 < error < (0.01 if tensor.codes.dtype == torch.int8 else 0.03), name
    assert seen and max(seen) <= max(1 << 14, 128 * max(s[1] for s in made.config.tensor_shapes().values() if s[1:]))


def test_the_embedding_stays_in_ram_alone(made: Made) -> None:
    with closing(Checkpoint(made.directory)) as checkpoint:
        device = torch.device("meta")  # stands in for another memory
        found = load_weights(
            checkpoint, made.config, device, torch.float32, lambda *_: None, lambda _: None, embedding_in_ram=True
        )
    kept = {name for name, one in found.items() if isinstance(one, torch.Tensor) and one.device.type == "cpu"}
    assert kept == {"model.embed_tokens.weight"}
    model = build_model(made.config, found, NoExperts(), "auto")
    assert model.rope.table(torch.arange(3, device=device))[0].device == device


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    config = config_of(families.moonlight(), num_hidden_layers=2)
    tensors = {name: torch.ones(shape).bfloat16() for name, shape in config.tensor_shapes().items()}
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN or infinity"):
        Made(config, tmp_path).load("int8")


class NoExperts:
    """Experts that answer 0."""

    wants_hints = False

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        class Nothing:
            def wait(self) -> torch.Tensor:
                return torch.zeros_like(x)

        return Nothing()

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        raise AssertionError("nobody wants hints")


@pytest.mark.parametrize("path", ["naive", "absorbed"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_narrow_model_computes_with_the_decoded_weights_everywhere(
    made: Made, fmt: NarrowFormat, path: MlaPath
) -> None:
    narrow = made.load(fmt)
    wide = {
        name: torch.tensor(decoded(one)).float() if isinstance(one, Narrow) else one for name, one in narrow.items()
    }

    def logits(model: Transformer) -> torch.Tensor:
        cache = allocate(made.config, 4, 16, torch.float32, CPU)
        with torch.inference_mode():
            ids = tuple(range(7, 47))
            return model.logits(
                model.hidden([model.lane([upload(Batch((Row(0, ids, 0, (2, 0, 3)),)), 16, CPU)], cache)])
            )

    found, expected = (logits(build_model(made.config, one, NoExperts(), path)) for one in (narrow, wide))
    other = logits(build_model(made.config, made.load(None), NoExperts(), path))
    spread = float(expected.std())
    assert float((found - expected).abs().max()) < 1e-4 * spread  # float32, two orders of the same sums
    if not (made.config.expert_format == "fp8" and fmt == "fp8"):
        assert float((other - expected).abs().max()) > 1e-2 * spread  # the comparison can fail
