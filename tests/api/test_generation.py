"""Parameters of a text generation beyond the document: what is taken, what is refused, and log probabilities back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from peer.state import command
from peer.state.command import StreamEnd, StreamToken
from peer.state.task import Logprobs, TokenLogprob
from tests.api.conftest import RunningServer, submission
from tests.api.test_refusals import check_error

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3}}}
LOGPROBS = (
    Logprobs(
        TokenLogprob(7, b" is", -0.25), (TokenLogprob(7, b" is", -0.25), TokenLogprob(9, b"\xc3", -2.5))
    ),
    Logprobs(TokenLogprob(9, b"\xc3", -0.5)),
)
SHOWN = [
    {
        "id": 7,
        "token": " is",
        "logprob": -0.25,
        "top_logprobs": [
            {"id": 7, "token": " is", "logprob": -0.25},
            {"id": 9, "token": "\ufffd", "logprob": -2.5, "bytes": [195]},
        ],
    },
    {"id": 9, "token": "\ufffd", "logprob": -0.5, "bytes": [195], "top_logprobs": []},
]


def parameters_sent(client: httpx.Client, server: RunningServer, **given: Any) -> dict[str, Any]:
    """What the cluster gets of them."""
    answer = client.post("/tasks", json=submission(parameters={"prompt": "a", **given}))
    assert answer.status_code == 201, answer.text
    sent = [each for each in server.cluster.requests if isinstance(each, command.SubmitTask)]
    return sent[-1].parameters


def test_what_is_asked_for_is_passed_on_and_nothing_else(client: httpx.Client, server: RunningServer) -> None:
    assert parameters_sent(client, server) == {"prompt": "a"}
    unset = {"logit_bias": {}, "logprobs": False, "top_logprobs": 0}
    assert parameters_sent(client, server, **unset, response_format=None) == {"prompt": "a"}
    given = {
        "min_p": 0.05,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {"0": -100.0, "123456789": 100.0},
        "logprobs": True,
        "top_logprobs": 20,
        "response_format": {"type": "json_schema", "schema": SCHEMA},
    }
    assert parameters_sent(client, server, **given) == {"prompt": "a", **given}
    json_object = {"response_format": {"type": "json_object"}}
    assert parameters_sent(client, server, **json_object) == {"prompt": "a", **json_object}
    assert parameters_sent(client, server, top_logprobs=3) == {"prompt": "a", "top_logprobs": 3}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias[...]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"007": 1}}, "logit_bias"),
        ({"logit_bias": {"1234567890": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1_025)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 0.5}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "schema": True}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_schema", "schema": {"enum": ["x" * 65_536]}}},
            "response_format.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {"maximum": 2**64}}},
            "response_format.schema",
        ),
    ],
)
def test_wrong_values_are_named(client: httpx.Client, given: dict[str, Any], field: str) -> None:
    answer = client.post("/tasks", json=submission(parameters={"prompt": "a", **given}))
    named = check_error(answer, 400)["details"]["field"]
    assert named.startswith(f"parameters.{field}"), named


def test_results_and_streams_carry_logprobs(client: httpx.Client, server: RunningServer) -> None:
    task_id = client.post("/tasks", json=submission()).json()["task_id"]

    def finish() -> None:
        cluster = server.cluster
        cluster.push(task_id, StreamToken(attempt=1, index=0, text=" is", count=1, logprobs=LOGPROBS[:1]))
        cluster.push(task_id, StreamToken(attempt=1, index=1, text="\ufffd", count=1, logprobs=LOGPROBS[1:]))
        cluster.push(task_id, StreamToken(attempt=1, index=2, text=" it", count=1))
        cluster.finish(task_id)
        view = cluster.views[task_id]
        result = msgspec.structs.replace(view.result, logprobs=LOGPROBS)
        cluster.views[task_id] = msgspec.structs.replace(view, result=result)
        cluster.push(task_id, StreamEnd(view=cluster.views[task_id]))

    server.do(finish)
    assert client.get(f"/tasks/{task_id}").json()["result"]["logprobs"] == SHOWN
    lines = client.get(f"/tasks/{task_id}/stream").text.splitlines()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [each.get("logprobs") for each in data[:3]] == [SHOWN[:1], SHOWN[1:], None]
    assert data[3]["result"]["logprobs"] == SHOWN


def test_who_did_not_ask_sees_no_logprobs(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    server.do(server.cluster.finish, task_id)
    assert "logprobs" not in client.get(f"/tasks/{task_id}").json()["result"]


def test_results_say_how_much_of_a_prompt_was_reused(
    client: httpx.Client, server: RunningServer, task_id: str
) -> None:
    server.do(server.cluster.finish, task_id)
    result = client.get(f"/tasks/{task_id}").json()["result"]
    assert (result["prompt_tokens"], result["cached_tokens"]) == (7, 5)
