"""`GET /v1/server/info`: the plan in force, predicted against achieved, and who may see it."""

import json
from pathlib import Path

import pytest

from tests.reference.fake_server import Answer, FakeServer, fake_server


def info(server: FakeServer, headers: dict[str, str] | None = None) -> Answer:
    return server.ask("GET", "/v1/server/info", headers=headers)


def test_a_planned_server(tiny_model: Path) -> None:
    with fake_server(tiny_model, "build_planned") as server:
        assert info(server).body["predicted_against_achieved"] == []
        with server.client() as client:
            client.completions.create(model="tiny", prompt="script:abcdef;", max_tokens=4)
        # An account comes a little later than the last token it counts.
        server.wait(lambda: sum(line["steps"] for line in info(server).body["predicted_against_achieved"]) == 4)
        body = info(server).body
    assert (body["model"], body["status"], body["device"], body["profile"]) == ("tiny", "ready", "fake", "made-up")
    assert body["max_model_len"] == 2048
    assert body["plan"]["settings"]["pages_on_device"] == 77
    assert body["plan"]["settings"]["ring"] == "0 B"
    assert body["plan"]["model"] == "tiny"  # as clients call it, whatever the plan's file says
    assert body["routing"] == "uniform law"
    decode, prompt = body["predicted_against_achieved"]
    times = {
        "achieved_median": 0.5,
        "predicted_median": 0.4,
        "error": -0.2,
        "achieved_mean": 0.5,
        "predicted_mean": pytest.approx(0.4),
    }
    assert prompt == {"step": "prompt", "new_tokens": [9, 16], "steps": 1, **times}
    assert decode == {"step": "decode", "sequences": [1, 1], "steps": 3, **times}


def test_a_server_without_a_plan(server: FakeServer) -> None:
    body = info(server).body
    assert body["plan"] is None
    assert body["profile"] == "none"
    assert all(
        line["predicted_median"] is None and line["error"] is None for line in body["predicted_against_achieved"]
    )


def test_while_it_loads(tiny_model: Path) -> None:
    with fake_server(tiny_model, "build_never", is_ready=False) as server:
        answer = info(server)
    assert answer.status == 200
    body = answer.body
    assert (body["status"], body["device"], body["plan"], body["profile"]) == ("loading", None, None, None)
    assert body["predicted_against_achieved"] == []


def test_while_it_drains(tiny_model: Path) -> None:
    with fake_server(tiny_model) as server:
        server.service.draining = True
        assert info(server).body["status"] == server.ask("GET", "/readyz").body["status"] == "draining"


def test_it_asks_for_the_key_and_tells_no_secrets(tiny_model: Path) -> None:
    with fake_server(tiny_model, "build_planned", api_key=("hush-hush",)) as server:
        assert info(server).status == 401
        answer = info(server, {"Authorization": "Bearer hush-hush"})
    assert answer.status == 200
    text = json.dumps(answer.body)
    assert "hush-hush" not in text
    assert str(tiny_model) not in text and str(tiny_model.parent) not in text


def test_web_pages_of_other_origins_are_refused(server: FakeServer) -> None:
    assert info(server, {"Origin": "https://example.org"}).status == 403
