"""Metrics: vLLM's names, exact counts, gauges back to zero."""

import http.client
import json

from tests.reference.fake_server import FakeServer

VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "request_success_total{stop}",
    "request_success_total{length}",
    "request_success_total{abort}",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_prompt_tokens_sum",
]
OURS = [
    "expert_bytes_total",
    "distinct_experts_total",
    "engine_step_seconds_total",
    "engine_steps_total",
    "engine_ready",
]


def test_the_names_and_the_format(server: FakeServer) -> None:
    found = server.metrics()
    assert not [name for name in (*VLLM_NAMES, *OURS) if name not in found]
    answer = server.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b'hybrid:num_requests_running{model_name="tiny"} 0.0' in answer.body


def test_counts_are_exact(server: FakeServer) -> None:
    before = server.metrics()
    body = {"prompt": [[*range(40)], [*range(100, 140)]], "n": 2, "max_tokens": 5, "temperature": 0}
    assert server.ask("POST", "/v1/completions", body).status == 200
    assert server.ask("POST", "/v1/completions", {"prompt": [*range(40)], "max_tokens": 1}).status == 200
    server.wait_empty()
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["request_success_total{length}"] == 5 and grown["request_success_total{stop}"] == 0
    assert grown["generation_tokens_total"] == 21 and grown["prompt_tokens_total"] == 200
    assert grown["time_to_first_token_seconds_count"] == 5 and grown["inter_token_latency_seconds_count"] == 16
    assert grown["e2e_request_latency_seconds_count"] == 2 and grown["request_prompt_tokens_sum"] == 200
    assert grown["prefix_cache_queries_total"] == 200 and grown["prefix_cache_hits_total"] >= 32
    assert grown["engine_steps_total"] > 0 and grown["engine_step_seconds_total"] > 0
    assert grown["expert_bytes_total"] > 0 and grown["distinct_experts_total"] > 0


def test_gauges_follow_a_running_request(slow_server: FakeServer) -> None:
    server = slow_server
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = {"prompt": "a" * 100, "max_tokens": 1000, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    server.wait(lambda: server.metrics()["num_requests_running"] == 1)
    assert 0 < server.metrics()["kv_cache_usage_perc"] < 1
    connection.close()
    server.wait_empty()
    assert server.metrics()["request_success_total{abort}"] == 1
