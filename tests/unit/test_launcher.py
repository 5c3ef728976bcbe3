"""TGI's launcher: whoever starts TGI can start Headrace with the same options and variables."""

import os
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import ValidationError

from common.settings import GatewaySettings, WorkerSettings
from ops import cli as command
from ops.launcher import FLAGS, PLATFORM_FLAGS
from ops.processes import UpSettings

TGI_OPTIONS = """
model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens
max-client-batch-size payload-limit max-image-fetch-size max-input-tokens max-input-length
max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
max-waiting-tokens max-batch-size cuda-graphs cuda-memory-fraction rope-scaling rope-factor
disable-custom-kernels enable-prefill-logprobs lora-adapters disable-grammar-support
tokenizer-config-path watermark-gamma watermark-delta hostname port prometheus-port master-addr
master-port huggingface-hub-cache weights-cache-override json-output otlp-endpoint
otlp-service-name cors-allow-origin api-key ngrok ngrok-authtoken ngrok-edge usage-stats
graceful-termination-timeout env
""".split()  # noqa: SIM905 - a table of words
STARTERS: dict[str, tuple[str, type[Any]]] = {
    "up": ("ops.up.up", UpSettings),
    "gateway": ("gateway.__main__.serve", GatewaySettings),
    "worker": ("workers.worker.run", WorkerSettings),
}


class Started:
    """The command with what it would start replaced: only its settings are looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: Any = None
        self.environment: dict[str, str] = {}
        self.result: Result
        for place, _ in STARTERS.values():
            monkeypatch.setattr(place, self._note)
        monkeypatch.setattr("uvloop.run", lambda _: None)

    def _note(self, settings: Any, **_: Any) -> int:
        self.settings = settings
        self.environment = {k: v for k, v in os.environ.items() if k.startswith("HEADRACE_")}
        return 0

    def __call__(self, *arguments: str) -> Any:
        self.result = CliRunner().invoke(command.cli, arguments, standalone_mode=False)
        if self.result.exception is not None:
            raise self.result.exception
        return self.settings


@pytest.fixture
def headrace(monkeypatch: pytest.MonkeyPatch) -> Started:
    for flag in FLAGS + PLATFORM_FLAGS:
        for name in flag.all_variables:
            monkeypatch.delenv(name, raising=False)
    # What a command puts into the environment is taken out again.
    for settings in (UpSettings, GatewaySettings, WorkerSettings):
        for field in settings.model_fields:
            monkeypatch.setenv(f"HEADRACE_{field.upper()}", "")
            monkeypatch.delenv(f"HEADRACE_{field.upper()}")
    return Started(monkeypatch)


def test_the_table_holds_every_option_of_the_launcher() -> None:
    assert sorted(flag.name for flag in FLAGS) == sorted(TGI_OPTIONS)
    for flag in FLAGS:
        assert bool(flag.setting) != bool(flag.why), flag.name


@pytest.mark.parametrize("name", STARTERS)
def test_every_option_of_tgi_is_accepted_or_explained(name: str) -> None:
    """By each process: as an option of its own, or as one of the launcher's."""
    context = click.Context(command.cli)
    found = command.cli.get_command(context, name)
    assert found is not None
    options = {option for parameter in found.params for option in parameter.opts}
    assert {f"--{flag.name}" for flag in FLAGS} <= options


UNDERSTOOD: list[tuple[list[str], str, Any]] = [
    (["--max-concurrent-requests", "64"], "gateway.max_concurrent_requests", 64),
    (["--max-best-of", "4"], "gateway.max_best_of", 4),
    (["--max-stop-sequences", "6"], "gateway.max_stop_sequences", 6),
    (["--max-top-n-tokens", "9"], "gateway.max_top_n_tokens", 9),
    (["--max-client-batch-size", "8"], "gateway.max_client_batch_size", 8),
    (["--max-input-tokens", "100"], "gateway.max_input_tokens", 100),
    (["--max-input-length", "100"], "gateway.max_input_tokens", 100),
    (["--max-total-tokens", "200"], "gateway.max_total_tokens", 200),
    (["--max-total-tokens", "200"], "worker.max_total_tokens", 200),
    (["--payload-limit", "5000"], "gateway.payload_limit", 5000),
    (["--disable-grammar-support"], "gateway.disable_grammar_support", True),
    (["--watermark-gamma", "0.25"], "gateway.watermark_gamma", 0.25),
    (["--watermark-delta", "4"], "gateway.watermark_delta", 4.0),
    (["--hostname", "127.0.0.2"], "gateway.host", "127.0.0.2"),
    (["--port", "3000"], "gateway.port", 3000),
    (["--graceful-termination-timeout", "90"], "gateway.drain_s", 90.0),
    (["--graceful-termination-timeout", "90"], "worker.drain_s", 90.0),
    (["--max-batch-prefill-tokens", "1024"], "worker.max_step_tokens", 1024),
    (["--max-batch-total-tokens", "9000"], "worker.max_batch_total_tokens", 9000),
    (["--max-batch-size", "7"], "worker.max_batch_size", 7),
    (["--cuda-memory-fraction", "0.5"], "worker.cuda_memory_share", 0.5),
    (["--disable-custom-kernels"], "worker.engine_way", "plain"),
    (["--speculate", "3"], "worker.speculation", "auto"),
    (["--speculate", "0"], "worker.speculation", "off"),
    (["--quantize", "eetq"], "worker.quantize", "int8"),
    (["--num-shard", "2"], "worker.tensor_parallel", 2),
    (["--dtype", "float16"], "worker.dtype", "float16"),
    (["--model-id", "org/name@rev"], "worker.model", "name"),
    (["--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b"],
     "gateway.cors_allow_origin", ("https://a", "https://b")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "place", "value"), UNDERSTOOD)
def test_an_option_of_tgi_is_a_setting_of_the_process(
    headrace: Started, arguments: list[str], place: str, value: Any
) -> None:
    role, _, field = place.partition(".")
    assert getattr(headrace(role, *arguments), field) == value
    assert headrace.result.output == ""


@pytest.mark.parametrize(("arguments", "place", "value"), UNDERSTOOD)
def test_what_up_is_told_reaches_its_processes(
    headrace: Started, monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: str, value: Any
) -> None:
    """As a setting of its own, which it hands on, or in their environment."""
    role, _, field = place.partition(".")
    settings = headrace("up", *arguments)
    if field in UpSettings.model_fields:
        assert getattr(settings, field) == value
        return
    for name, text in headrace.environment.items():
        monkeypatch.setenv(name, text)
    assert getattr(STARTERS[role][1](), field) == value


def test_a_variable_of_tgi_is_outranked_by_ours_and_both_by_an_option(
    headrace: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_BEST_OF", "3")
    assert headrace("gateway").max_best_of == 3
    monkeypatch.setenv("HEADRACE_MAX_BEST_OF", "4")
    assert headrace("gateway").max_best_of == 4
    assert headrace("gateway", "--max-best-of", "5").max_best_of == 5


@pytest.mark.parametrize(
    ("name", "text", "place", "value"),
    [
        ("PORT", "3000", "gateway.port", 3000),
        ("AIP_HTTP_PORT", "7080", "gateway.port", 7080),
        ("AIP_HTTP_PORT", "7080", "up.port", 7080),
        ("AIP_PREDICT_ROUTE", "/v1/e/1:predict", "gateway.predict_route", "/v1/e/1:predict"),
        ("AIP_HEALTH_ROUTE", "/v1/e/1", "gateway.health_route", "/v1/e/1"),
        ("CORS_ALLOW_ORIGIN", "https://a, https://b", "gateway.cors_allow_origin",
         ("https://a", "https://b")),
        ("DISABLE_GRAMMAR_SUPPORT", "true", "gateway.disable_grammar_support", True),
        ("DISABLE_GRAMMAR_SUPPORT", "false", "gateway.disable_grammar_support", False),
        ("HF_MODEL_ID", "org/name", "gateway.model", "name"),
        ("MODEL_ID", "org/name", "up.model_id", "org/name"),
        ("HF_MODEL_QUANTIZE", "bitsandbytes", "worker.quantize", "int8"),
        ("HOSTNAME", "3f2a99", "gateway.host", "127.0.0.1"),
    ],
)  # fmt: skip
def test_variables_of_tgi_and_of_hosting_platforms(
    headrace: Started,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    place: str,
    value: Any,
) -> None:
    """But not HOSTNAME: every container has one, and it is no address to listen on."""
    monkeypatch.setenv(name, text)
    role, _, field = place.partition(".")
    assert getattr(headrace(role), field) == value


def test_up_hands_on_what_vertex_says(headrace: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/predict")
    headrace("up", "--health-route", "/well")
    assert headrace.environment["HEADRACE_PREDICT_ROUTE"] == "/predict"
    assert headrace.environment["HEADRACE_HEALTH_ROUTE"] == "/well"


def test_the_source_of_a_model_names_it(headrace: Started) -> None:
    settings = headrace("up", "--model-id", "org/name", "--revision", "main")
    assert (settings.model_id, settings.model) == ("org/name@main", "name")
    settings = headrace("up", "--model-id", "org/name", "--model", "mine")
    assert (settings.model_id, settings.model) == ("org/name", "mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--waiting-served-ratio", "1.2"], "--waiting-served-ratio changes nothing here"),
        (["gateway", "--cuda-graphs", "0"], "--cuda-graphs changes nothing here"),
        (["up", "--trust-remote-code"], "no code of a model is ever run"),
        (["gateway", "--max-batch-size", "4"], "it is no setting of this process"),
        (["worker", "--validation-workers", "4"], "--gateways"),
    ],
)
def test_what_has_no_meaning_is_said_in_one_line(
    headrace: Started, arguments: list[str], said: str
) -> None:
    headrace(*arguments)
    output = headrace.result.output
    assert said in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worker", "--quantize", "awq"], "quantize"),
        (["gateway", "--max-input-tokens", "200", "--max-total-tokens", "200"],
         "max_input_tokens must be < max_total_tokens"),
        (["gateway", "--max-best-of", "0"], "max_best_of"),
        (["gateway", "--predict-route", "predict"], "predict_route"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(headrace: Started, arguments: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        headrace(*arguments)
