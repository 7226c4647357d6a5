"""Requests drawn from `/openapi.json` by schemathesis, right and wrong, and what it says of the answers."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from small_servers import listening, tiny_app

from danlu.serve.api import ENDPOINTS
from danlu.serve.page_api import endpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPERATIONS = [(row.method, row.path) for row in (*ENDPOINTS, *endpoints(Path("unused")))]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
HURRIED = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)

MESSAGE = {"role": "user", "content": "Is it gold?"}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [MESSAGE], "max_tokens": 3},
    "/v1/completions": {"model": "tiny", "prompt": "Fire", "max_tokens": 3},
    "/v1/embeddings": {"model": "tiny", "input": "Fire"},
    "/tokenize": {"model": "tiny", "prompt": "Fire"},
    "/detokenize": {"model": "tiny", "tokens": [40, 41]},
    "/page/markdown": {"text": "*gold*"},
    "/page/preference": {
        "row": {"prompt": [MESSAGE], "completion": [{"role": "assistant", "content": "Yes."}], "label": True}
    },
}
"""What a request is filled up with, so that not nearly all are refused for a name or a length."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tiny_app(tmp_path_factory.mktemp("fuzz"), timeout=20, max_body_mb=64)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def described(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_right_requests(described: Any, url: str, method: str, path: str) -> None:
    """As they are drawn, and with all but a few keys as they should be: some of those must succeed."""
    statuses: list[int] = []

    @HURRIED
    @given(described[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE), st.data())
    def run(case: Any, data: st.DataObject) -> None:
        if isinstance(case.body, dict) and data.draw(st.booleans()):
            drawn = st.lists(st.sampled_from(sorted(case.body) or ["text"]), max_size=2, unique=True)
            case.body = {
                **{name: case.body[name] for name in data.draw(drawn) if name in case.body},
                **RIGHT[path],
            }
        statuses.append(case.call_and_validate(base_url=url, checks=CHECKS).status_code)

    run()
    # A GET has nothing to be drawn.
    assert len(statuses) >= (250 if path in RIGHT else 1)
    assert sum(status == 200 for status in statuses) >= (30 if path in RIGHT else 1), statuses


@pytest.mark.parametrize(("method", "path"), [pair for pair in OPERATIONS if pair[1] in RIGHT])
def test_wrong_requests(described: Any, url: str, method: str, path: str) -> None:
    """None of them is taken."""
    statuses: list[int] = []
    told = described.raw_schema
    body = told["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    right = jsonschema_rs.validator_for({**body, "components": told["components"]})

    cases = described[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @HURRIED
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try:
            case = data.draw(cases)
        except InvalidSchema:  # the drawing itself has its limits
            reject()
        if isinstance(case.body, dict) and right.is_valid(case.body):
            reject()  # wrong for one kind of message, and right for another
        statuses.append(case.call_and_validate(base_url=url, checks=CHECKS).status_code)

    run()
    assert len(statuses) >= 100


def test_the_checks_would_see_an_answer_that_is_not_as_described(url: str) -> None:
    """Else all of the above would prove nothing."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        told = json.load(answer)
    told["components"]["schemas"]["ModelList"]["properties"]["data"] = {"type": "string"}
    told["paths"]["/health"]["get"]["responses"] = {"201": {"description": "never"}}
    changed = schemathesis.openapi.from_dict(told)
    for path in ("/v1/models", "/health"):
        case = changed[path]["GET"].Case(body=NOT_SET)
        with pytest.raises(FailureGroup):
            case.call_and_validate(base_url=url, checks=CHECKS)
