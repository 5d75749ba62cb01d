"""What a look-ahead gets wrong, learned from a routing record: one ridge regression for each layer and horizon.

The router of a coming layer sees the state before the layers in between have changed it. The correction adds to its
logits what they usually add, from the logits themselves, the token table's prior and the sequence's history. `full`
maps every expert's features to every expert's logit, (3E, E) numbers a layer; else an expert has three numbers of its
own, which is what a server can afford for hundreds of experts. Knows no models. Used by `offload.predict`, fitted by
`placement.recall`.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

FORMAT = "hybrid look-ahead correction"
PENALTY = 30.0  # of the ridge, in tokens
LEAST_SCORE, LEAST_SHARE = 1e-3, 0.02  # below these a logarithm says nothing
_DAMAGED = (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class CorrectionError(ValueError):
    """A file that is no correction, or one for another model. One line that names the file."""


@dataclass(frozen=True, slots=True)
class Map:
    """Adds to a layer's logits: (features - `mean`) times `weight`, plus `offset`."""

    mean: Floats  # (3, E)
    weight: Floats  # (3, E, E) from feature and expert to expert; (3, E) where each expert has its own
    offset: Floats  # (E,)

    def __call__(self, features: Floats) -> Floats:
        """(T, E) for features (T, 3, E)."""
        x = features - self.mean
        if self.weight.ndim == 2:
            return np.asarray((x * self.weight).sum(1) + self.offset)
        return np.asarray(x.reshape(len(x), -1) @ self.weight.reshape(-1, self.weight.shape[-1]) + self.offset)


@dataclass(frozen=True, slots=True)
class Correction:
    """Maps by (horizon, layer's place among the MoE layers), for the model that it was learned from."""

    model: str  # SHA-256, as the routing record names it
    maps: Mapping[tuple[int, int], Map]

    def scores(self, horizon: int, layer: int, features: Floats) -> Floats | None:
        """(T, E) corrected scores of `features_of`; None where nothing was learned."""
        found = self.maps.get((horizon, layer))
        return None if found is None else sigmoid(features[:, 0] + found(features))


def features_of(ahead: Floats, prior: Floats, history: Floats) -> Floats:
    """(T, 3, E): logits of look-ahead scores, logarithms of the token table's and the history's shares, (T, E) each."""
    shares = np.log(np.stack((prior, history), 1) + LEAST_SHARE)
    return np.concatenate((logit(ahead)[:, None], shares), 1).astype(np.float32)


def logit(scores: Floats) -> Floats:
    """Of the router's scores between 0 and 1."""
    kept = np.clip(scores.astype(np.float32), LEAST_SCORE, 1 - LEAST_SCORE)
    return np.asarray(np.log(kept / (1 - kept)))


def sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)))


def fit(features: Floats, scores: Floats, weights: Floats, full: bool) -> Map:
    """The ridge regression from features (N, 3, E) to what the router's own scores (N, E) are beyond the look-ahead.

    Tokens count by `weights` (N,); with few tokens little is added to the look-ahead.
    """
    share = (weights / weights.sum()).astype(np.float64)
    x, y = features.astype(np.float64), logit(scores) - features[:, 0].astype(np.float64)
    mean, offset = np.tensordot(share, x, 1), share @ y  # (3, E), (E,)
    x, y = x - mean, y - offset
    penalty = PENALTY / weights.sum()
    if full:
        flat = x.reshape(len(x), -1)  # (N, 3E)
        product = flat.T @ (flat * share[:, None])
        weight = np.linalg.solve(product + penalty * np.eye(len(product)), (flat * share[:, None]).T @ y)
        weight = weight.reshape(*mean.shape, -1)  # (3, E, E)
    else:
        by_expert = np.moveaxis(x, 2, 0)  # (E, N, 3)
        weighted = np.swapaxes(by_expert, 1, 2) * share  # (E, 3, N)
        product = weighted @ by_expert + penalty * np.eye(x.shape[1])  # (E, 3, 3)
        weight = np.linalg.solve(product, weighted @ y.T[..., None])[..., 0].T  # (3, E)
    return Map(mean.astype(np.float32), weight.astype(np.float16), offset.astype(np.float32))


def write_correction(path: Path, correction: Correction) -> None:
    """Write it as one .npz, or leave nothing. Raises OSError."""
    arrays = {
        f"{name}.{horizon}.{layer}": getattr(found, name)
        for (horizon, layer), found in correction.maps.items()
        for name in ("mean", "weight", "offset")
    }
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as file:
            np.savez(file, format=np.array(FORMAT), model=np.array(correction.model), **arrays)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that the caller knows


def read_correction(path: Path) -> Correction:
    """Raises CorrectionError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            if str(members["format"]) != FORMAT:
                raise CorrectionError(f"{path}: not a look-ahead correction; make one with hybrid replay --correction")
            names = [name.split(".") for name in members.files if name.startswith("mean.")]
            maps = {
                (int(horizon), int(layer)): Map(
                    *(members[f"{part}.{horizon}.{layer}"] for part in ("mean", "weight", "offset"))
                )
                for _, horizon, layer in names
            }
            model = str(members["model"])
    except OSError as error:
        raise CorrectionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CorrectionError:
        raise
    except _DAMAGED:
        raise CorrectionError(f"{path}: not a look-ahead correction, or a damaged one") from None
    for (horizon, layer), found in maps.items():
        _check(path, f"{horizon}.{layer}", found)
    return Correction(model, maps)


def _check(path: Path, name: str, found: Map) -> None:
    n_experts = found.offset.shape[-1] if found.offset.ndim == 1 else 0
    fits = found.mean.shape == (3, n_experts) and found.weight.shape in ((3, n_experts), (3, n_experts, n_experts))
    if not n_experts or not fits or any(array.dtype.kind != "f" for array in (found.mean, found.weight, found.offset)):
        raise CorrectionError(f"{path}: {name}: expected a mean (3, E), weights (3, E) or (3, E, E), offsets (E,)")
