"""The launcher of TGI: its options and variables, and the settings of ours that they mean.

Who starts TGI with them can start Headrace with them. What has no meaning here is accepted, and one
line says why. ``HEADRACE_…`` outranks a variable of TGI, and an option outranks both.
"""

import json
import os
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import click
from pydantic_settings import BaseSettings

from common.models.sources import find_source
from ops.options import Command

Convert = Callable[[str], str]


def _same(value: str) -> str:
    return value


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of TGI's launcher; ``setting`` is ours, and ``why`` says what there is instead.
    Where a process has a setting of TGI's own name, that is meant.

    ``variables`` are read beside the option's own name in capitals; ``is_shared``: that name means
    other things to other programs, so the variable is not read.
    """

    name: str
    setting: str = ""
    why: str = ""
    is_switch: bool = False
    convert: Convert = _same
    variables: tuple[str, ...] = ()
    is_shared: bool = False

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def all_variables(self) -> tuple[str, ...]:
        return self.variables if self.is_shared else (self.field.upper(), *self.variables)


_QUANTIZE = {"bitsandbytes": "int8", "eetq": "int8"}
"""TGI's words for weights in 8 bits that are made at the start."""
_TRUE = ("true", "1", "yes", "on")


def _quantize(value: str) -> str:
    return _QUANTIZE.get(value, value)


def _speculation(value: str) -> str:
    """TGI asks how many tokens to guess; here that is measured."""
    return "off" if value == "0" else "auto"


def _model_name(source: str) -> str:
    """Where nothing is fetched, a model is known by its name in the store."""
    return find_source(source).default_name


def _plain(_: str) -> str:
    return "plain"


_BUILT_IN = "it is always on"
_OWN_PORT = "figures stand at /metrics on the gateway's own port"
_ONE_MACHINE = "the shards of a worker find each other"

FLAGS = (
    # The model
    Flag("model-id", "model", convert=_model_name, variables=("HF_MODEL_ID",)),
    Flag(
        "revision",
        why="a store has one revision of a model",
        variables=("HF_MODEL_REVISION",),
        is_shared=True,
    ),
    Flag("sharded", why="--num-shard says it all", is_shared=True),
    Flag("num-shard", "tensor_parallel", variables=("SM_NUM_GPUS",)),
    Flag("quantize", "quantize", convert=_quantize, variables=("HF_MODEL_QUANTIZE",)),
    Flag("speculate", "speculation", convert=_speculation),
    Flag("dtype", "dtype"),
    Flag("kv-cache-dtype", why="the cache has the precision of the model"),
    Flag("trust-remote-code", why="no code of a model is ever run", is_switch=True),
    Flag("rope-scaling", why="the model's own configuration is used"),
    Flag("rope-factor", why="the model's own configuration is used"),
    Flag("lora-adapters", why="headrace adapter add puts them into the store"),
    Flag("tokenizer-config-path", why="the model's own chat template is used"),
    Flag("huggingface-hub-cache", why="models stand in --data-dir", is_shared=True),
    Flag("weights-cache-override", why="models stand in --data-dir"),
    # What a request may ask for
    Flag("max-concurrent-requests", "max_concurrent_requests"),
    Flag("max-best-of", "max_best_of"),
    Flag("max-stop-sequences", "max_stop_sequences"),
    Flag("max-top-n-tokens", "max_top_n_tokens"),
    Flag("max-client-batch-size", "max_client_batch_size"),
    Flag("max-input-tokens", "max_input_tokens"),
    Flag("max-input-length", "max_input_tokens"),
    Flag("max-total-tokens", "max_total_tokens"),
    Flag("payload-limit", "payload_limit"),
    Flag("max-image-fetch-size", why="nothing that a prompt names is ever fetched"),
    Flag("disable-grammar-support", "disable_grammar_support", is_switch=True),
    Flag("enable-prefill-logprobs", why=_BUILT_IN, is_switch=True),
    Flag("watermark-gamma", "watermark_gamma"),
    Flag("watermark-delta", "watermark_delta"),
    # How it is computed
    Flag("max-batch-prefill-tokens", "max_step_tokens"),
    Flag("max-batch-total-tokens", "max_batch_total_tokens"),
    Flag("max-batch-size", "max_batch_size"),
    Flag("waiting-served-ratio", why="new prompts join the running batch in any step"),
    Flag("max-waiting-tokens", why="new prompts join the running batch in any step"),
    Flag("validation-workers", why="the gateways tokenize; --gateways adds some"),
    Flag("cuda-graphs", why="steps of all sizes are recorded"),
    Flag("cuda-memory-fraction", "cuda_memory_share"),
    Flag("disable-custom-kernels", "engine_way", is_switch=True, convert=_plain),
    Flag("master-addr", why=_ONE_MACHINE, is_shared=True),
    Flag("master-port", why=_ONE_MACHINE, is_shared=True),
    # The server
    Flag("hostname", "host", is_shared=True),
    Flag("port", "port", variables=("AIP_HTTP_PORT",)),
    Flag("api-key", "api_key"),
    Flag("cors-allow-origin", "cors_allow_origin"),
    Flag("graceful-termination-timeout", "drain_s"),
    Flag("prometheus-port", why=_OWN_PORT),
    Flag("json-output", why="logs are JSON lines", is_switch=True, is_shared=True),
    Flag("otlp-endpoint", "otlp_endpoint"),
    Flag("otlp-service-name", "otlp_service_name"),
    Flag("usage-stats", why="nothing about your use is ever sent"),
    Flag("env", why="headrace status says what runs", is_switch=True, is_shared=True),
    Flag("ngrok", why="put a proxy in front", is_switch=True),
    Flag("ngrok-authtoken", why="put a proxy in front"),
    Flag("ngrok-edge", why="put a proxy in front"),
)
"""TGI 3.3, ``text-generation-launcher``."""
PLATFORM_FLAGS = (
    Flag("predict-route", "predict_route", variables=("AIP_PREDICT_ROUTE",), is_shared=True),
    Flag("health-route", "health_route", variables=("AIP_HEALTH_ROUTE",), is_shared=True),
)
"""What Vertex AI says by variables alone, to TGI built for it. Here they are options as well."""

_GIVEN = "tgi_"
"""Before the names of options that are TGI's and not ours."""


def launcher_options(
    own: type[BaseSettings], *passed_on: type[BaseSettings]
) -> Callable[[Command], Command]:
    """Let a command take TGI's options and variables as its own.

    ``own`` are its settings; what means a setting of ``passed_on`` is put into the environment, for
    the processes that it starts.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> Any:
            return command(**translate(given, os.environ, own, *passed_on))

        translated: Command = run
        for flag in reversed(FLAGS + PLATFORM_FLAGS):
            if flag.field not in own.model_fields:
                translated = _option(flag, own, *passed_on)(translated)
        return translated

    return decorate


def translate(
    given: dict[str, Any],
    environment: MutableMapping[str, str],
    own: type[BaseSettings],
    *passed_on: type[BaseSettings],
) -> dict[str, Any]:
    """The options ``given``, with TGI's put under our names; says what has no meaning."""
    taken = {name: value for name, value in given.items() if not name.startswith(_GIVEN)}
    for flag in (_in_words_of(own, flag) for flag in FLAGS + PLATFORM_FLAGS):
        value = taken.get(flag.field) or given.get(_GIVEN + flag.field)
        place = _place(flag, own, *passed_on)
        if place is None:
            if _is_given(value):
                _say(flag)
            continue
        if not _is_given(value):
            value = _from_environment(flag, environment)
        if value is None:
            continue
        if place is not own:
            environment[_variable(flag)] = _as_text(_converted(flag, value))
        elif flag.setting == flag.field or not _is_given(taken.get(flag.setting)):
            taken[flag.setting] = _converted(flag, value)
    return taken


def _in_words_of(own: type[BaseSettings], flag: Flag) -> Flag:
    """The flag as a process understands it that has a setting of the same name."""
    if flag.field not in own.model_fields or flag.setting == flag.field:
        return flag
    return replace(flag, setting=flag.field, convert=_same)


def _place(flag: Flag, *settings: type[BaseSettings]) -> type[BaseSettings] | None:
    """Whose setting it is, if anybody's."""
    return next((one for one in settings if flag.setting in one.model_fields), None)


def _is_given(value: object) -> bool:
    return value not in (None, (), False)


def _from_environment(flag: Flag, environment: MutableMapping[str, str]) -> str | None:
    """The first of TGI's variables that is set, unless ours is."""
    if _variable(flag) in environment:
        return None
    for name in flag.all_variables:
        value = environment.get(name, "")
        if value and (not flag.is_switch or value.lower() in _TRUE):
            return value
    return None


def _variable(flag: Flag) -> str:
    return f"HEADRACE_{flag.setting.upper()}"


def _converted(flag: Flag, value: Any) -> Any:
    if flag.setting == "cors_allow_origin" and isinstance(value, str):
        return tuple(origin.strip() for origin in value.split(","))
    if isinstance(value, bool):
        value = str(value).lower()
    return flag.convert(value) if isinstance(value, str) else value


def _as_text(value: Any) -> str:
    """As pydantic reads it from the environment."""
    return value if isinstance(value, str) else json.dumps(value)


def _say(flag: Flag) -> None:
    why = flag.why or "it is no setting of this process"
    click.echo(f"headrace: --{flag.name} changes nothing here: {why}", err=True)


def _option(flag: Flag, *settings: type[BaseSettings]) -> Callable[[Command], Command]:
    place = _place(flag, *settings)
    words = ""
    if place is not None:
        described = place.model_fields[flag.setting].description or ""
        words = f"{' '.join(described.replace('``', '').split())} [{_variable(flag)}]"
    return click.option(
        f"--{flag.name}",
        _GIVEN + flag.field,
        is_flag=flag.is_switch,
        default=None,
        multiple=flag.setting == "cors_allow_origin",
        metavar=None if flag.is_switch else "VALUE",
        hidden=place is None,
        help=words,
    )
