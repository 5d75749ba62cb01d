"""Engines for tests of the REST side: real scheduler and process, no torch.

A test picks one by its path ("tests.reference.fake_engine:build"), as `EngineBridge` takes it. The answer of a
`script:` prompt is the text after the last "script:" in the prompt, so that a test says what the model "writes".
"""

import os
import re
import time
from dataclasses import replace

from hybrid.batch import Batch, Row, RowOutput, StepOutput
from hybrid.config import ModelConfig
from placement.probe import find_hardware
from server.engine_process import Built, OnNotice, OnProgress
from server.scheduler import SchedulerConfig
from server.settings import ServerSettings
from tests.reference import plans
from tests.reference.fake_step import FakeStep

N_PAGES = 512
PAGE_SIZE = 16
MAX_MODEL_LEN = 2048
END_ID = 258  # <|im_end|> of the small tokenizer
LETTERS = tuple(range(97, 123))  # ids are bytes in the small tokenizer


class ScriptedStep:
    """Answers with the ids that follow the last SCRIPT mark in the prompt, one for each step, then with `end`.

    In the mark's text "%XXXX" stands for the id of that number, so that special tokens can be scripted.
    """

    MARK = b"script:"
    STOP = b";"

    def __init__(self, end: int, fallback: FakeStep) -> None:
        self._end = end
        self._fallback = fallback
        self._store: dict[tuple[int, int], int] = {}  # id by (page, offset)

    def __call__(self, batch: Batch) -> StepOutput:
        out = self._fallback(batch)
        rows = []
        for row, answer in zip(batch.rows, out.rows, strict=True):
            ids = self._held(row)
            rows.append(self._scripted(row.n_sampled, ids, answer))
        return replace(out, rows=tuple(rows))

    def _held(self, row: Row) -> list[int]:
        """Write the row's ids to its pages, and read all ids of the request back from there."""
        end = row.position + len(row.ids)
        places = [(row.pages[i // PAGE_SIZE], i % PAGE_SIZE) for i in range(end)]
        self._store.update(zip(places[row.position :], row.ids, strict=True))
        return [self._store[place] for place in places]

    def _scripted(self, n_sampled: int, ids: list[int], answer: RowOutput) -> RowOutput:
        prompt = bytes(i if i < 256 else 0 for i in ids[: len(ids) - n_sampled])
        start = prompt.rfind(self.MARK)
        if start < 0 or answer.token is None:
            return answer
        text = prompt[start + len(self.MARK) :].split(self.STOP)[0].decode("latin-1")
        script = [int(part[1:]) if part[0] == "%" else ord(part) for part in re.findall(r"%\d{4}|.", text, re.S)]
        token = script[n_sampled] if n_sampled < len(script) else self._end
        logprob = answer.logprob and replace(answer.logprob, token=token)
        return replace(answer, token=token, logprob=logprob)


def build(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """An engine that loads in no time and answers scripts, or letters that depend on all it has read."""
    progress("pretending", 1, 2)
    notice("no bytes anywhere")
    fake = FakeStep(N_PAGES, PAGE_SIZE, tokens=LETTERS)
    return _built(settings, ScriptedStep(END_ID, fake))


def build_slow(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Like `build`, 50 ms for each step."""
    built = build(settings, progress, notice)

    def step(batch: Batch) -> StepOutput:
        time.sleep(0.05)
        return built.step(batch)

    return replace(built, step=step)


def build_fragile(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Like `build`; a step that holds the id 33 ("!") raises, and one that holds 64 ("@") exits without a word."""
    built = build(settings, progress, notice)

    def step(batch: Batch) -> StepOutput:
        if any(33 in row.ids for row in batch.rows):
            raise RuntimeError("the device\nran out of memory")
        if any(64 in row.ids for row in batch.rows):
            os._exit(7)
        return built.step(batch)

    return replace(built, step=step)


def build_once(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Loads the first time; dies while loading the second time."""
    mark = settings.model / "loaded-once"
    if mark.exists():
        os._exit(9)
    mark.touch()
    return build(settings, progress, notice)


def build_never(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Stays at half of its loading."""
    progress("loading weights", 50, 100)
    time.sleep(3600)
    raise AssertionError("unreachable")


def build_planned(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Like `build`, under a plan, with steps that say they took 0.5 s and were predicted to take 0.4 s."""
    built = build(settings, progress, notice)
    plan = plans.plan(ModelConfig.from_directory(settings.model), find_hardware())

    def step(batch: Batch) -> StepOutput:
        return replace(built.step(batch), seconds=0.5)

    return replace(built, step=step, plan=plan, profile="made-up", predict=lambda batch: 0.4)


def build_recording(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """Like `build_fragile`; its record is a file in the model's directory that grows by a line with each writing."""
    built = build_fragile(settings, progress, notice)

    def record(last: bool) -> None:
        with (settings.model / "record").open("a") as file:
            file.write("written\n")

    return replace(built, record=record)


def build_misconfigured(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """A checkpoint that cannot be served."""
    raise ValueError("model.safetensors: shard 2 of 3 is missing;\ndownload it again")


def build_broken(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """A defect of ours."""
    raise KeyError("oops")


def _built(settings: ServerSettings, step: ScriptedStep) -> Built:
    sizes = SchedulerConfig(
        n_pages=N_PAGES,
        page_size=PAGE_SIZE,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
    )
    return Built(step, lambda: None, sizes, settings.max_model_len or MAX_MODEL_LEN, "fake")
