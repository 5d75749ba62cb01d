"""How tokens are drawn where a request does not say: as the checkpoint's generation_config.json wants it.

What it leaves open is Kimi's advice for a model that speaks Kimi's template, and else the plain distribution. The keys
have the meaning they have in a request. They are those that vLLM takes from the file except max_new_tokens (how long an
answer may get is the request's business), and `do_sample`: where it is false the default is greedy, as in transformers.
Knows no request. `app.py` reads them once, the handlers use them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hybrid.batch import Sampling
from hybrid.config_json import ConfigError, read_object
from server.errors import ApiError
from server.openai_request import read_sampling
from server.validation import Fields

KEYS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
KIMI_THINKING, KIMI_INSTANT = Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=0.6, top_p=0.95)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """For a chat in either mode, and for a plain completion."""

    thinking: Sampling
    instant: Sampling
    completion: Sampling


def load_sampling_defaults(model: Path, is_kimi: bool) -> SamplingDefaults:
    """The defaults of a checkpoint directory. Raises ConfigError naming the file and the key."""
    file = model / "generation_config.json"
    published = read_object(file) if file.is_file() else {}
    fields = Fields({key: published.get(key) for key in KEYS})
    plain = Sampling()
    try:
        return SamplingDefaults(
            thinking=_published(fields, KIMI_THINKING if is_kimi else plain),
            instant=_published(fields, KIMI_INSTANT if is_kimi else plain),
            completion=_published(fields, plain),
        )
    except ApiError as error:
        raise ConfigError(f"{file}: {error.message}; correct it, or fetch the file again") from None


def _published(fields: Fields, otherwise: Sampling) -> Sampling:
    sampling = read_sampling(fields, otherwise)
    return sampling if fields.boolean("do_sample", True) else replace(sampling, temperature=0.0)
