"""Chat templates: equal to transformers on what models use, harmless on what they should not."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from common.failures import Failure
from common.models import chat_template
from common.models.chat_template import ChatTemplate
from tests.support.models import simulated

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

DEFAULT_SYSTEM_PROMPT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ALTERNATING = """
{{- bos_token }}
{%- set ns = namespace(expected='user', turns=0) %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role != ns.expected %}
        {{- raise_exception('Roles must alternate, not ' ~ message.role) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- set ns.expected = 'assistant' if message.role == 'user' else 'user' %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

EVERYTHING = """
{%- macro show(part) -%}
    {%- if part is string %}{{ part }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endmacro -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{{ {'tools': tools, 'é<&>': "it's"} | tojson }}
{{ [3, 1] | tojson(indent=2) }}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
    {{ loop.index0 }}/{{ loop.length }} {{ message.role | upper }}:
    {% if message.content is string %}
        {{ message.content.strip().split('</think>')[-1] }}
    {% elif message.content is iterable %}
        {% for part in message.content %}{{ show(part) }}{% endfor %}
    {% endif %}
    {% generation %}{{ message.get('name', 'nobody') }}{% endgeneration %}
{% endfor %}
{{- messages[::-1] | map(attribute='role') | join(',') }} {{ undefined_thing }}
"""

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello <b>&</b> 'world' 🙂"}]
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "<think>hm</think> Hello. "},
    {"role": "user", "content": "  Go on \n\n"},
]
INSTRUCTED = [{"role": "system", "content": "Be brief."}, *TALK]
NAMED: list[dict[str, Any]] = [{"role": "user", "content": "x", "name": "Ann"}]
PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path = simulated(tmp_path_factory.mktemp("data")).path
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.bos_token = "<s>"
    tokenizer.eos_token = "</s>"
    return tokenizer


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages, **options)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (source, messages)
        for source in (CHATML, DEFAULT_SYSTEM_PROMPT, ALTERNATING, EVERYTHING)
        for messages in (HELLO, TALK, INSTRUCTED, NAMED)
    ]
    + [(EVERYTHING, PARTS), (EVERYTHING, [{"role": "skip", "content": ""}] * 3 + TALK * 3)],
)
def test_prompts_equal_those_of_transformers(
    reference: PreTrainedTokenizerFast,
    source: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    expected = reference.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert render(source, messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, [*HELLO, {"role": "assistant", "content": "Once upon "}]),
        (CHATML, [*HELLO, {"role": "assistant", "content": ""}]),
        (ALTERNATING, [*HELLO, {"role": "assistant", "content": "Once upon"}]),
        (ALTERNATING, [{"role": "user", "content": " trimmed on both sides "}]),
        (EVERYTHING, [*HELLO, {"role": "assistant", "content": "a", "name": "b"}]),
        (EVERYTHING, PARTS),
    ],
)
def test_continuing_the_final_message_equals_transformers(
    reference: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]]
) -> None:
    """The prompt ends inside the last message, for the model to go on from there."""
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert render(source, messages, continue_final_message=True) == expected
    assert messages[-1]["content"] in ("", *(m["content"] for m in messages)), "left unchanged"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant"}], "no final message"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "no final message"),
        ([*HELLO, {"role": "system", "content": "left out"}], "leaves the final message out"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(Failure, match=reason) as caught:
        render(ALTERNATING, messages, continue_final_message=True)
    assert caught.value.code == "TEMPLATE_ERROR"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Only <two> roles') }}", "Only <two> roles"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ missing.attribute.deeper }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% set x = namespace() %}{% set x.__class__ = 1 %}", "may not be set"),
        ("{% include 'other' %}", "no loader"),
        ("{{ 'a' * 1000000000000 }}", "product is too long"),
        ("{{ 1000000000000 * [0] }}", "product is too long"),
        ("{{ 7 ** 100000000 }}", "exponent is too large"),
        ("{{ range(10000000) | list }}", "Range too big"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_or_reaches_out_gives_one_clear_error(
    source: str, reason: str
) -> None:
    with pytest.raises(Failure) as caught:
        render(source, HELLO)
    assert caught.value.code == "TEMPLATE_ERROR"
    assert caught.value.message.startswith("Template error: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(chat_template, "_MAX_CPU_S", 0.1)
    started = time.thread_time()
    with pytest.raises(Failure, match=r"ran longer than 0\.1 s"):
        render(source, HELLO)
    assert time.thread_time() - started < 1


def test_limits_on_the_messages() -> None:
    with pytest.raises(Failure, match="there are no messages"):
        render(CHATML, [])
    with pytest.raises(Failure, match="more than 4096 messages"):
        render(CHATML, HELLO * 4097)
    with pytest.raises(Failure, match="longer than 16777216 characters"):
        render(CHATML, [{"role": "user", "content": ["x" * 17_000_000]}])


def test_a_long_conversation_takes_milliseconds() -> None:
    """Four thousand messages stay two orders of magnitude below the time limit."""
    started = time.thread_time()
    prompt = render(CHATML, [{"role": "user", "content": "x" * 200}] * 4000)
    assert len(prompt) > 800_000
    assert time.thread_time() - started < 0.5


async def test_rendering_in_a_thread_gives_the_same(tmp_path: Path) -> None:
    template = ChatTemplate.load(simulated(tmp_path).path)
    for messages in (HELLO, HELLO * 1000, [{"role": "user", "content": "x" * 100_000}]):
        assert await template.render_async(messages) == template.render(messages)
    with pytest.raises(Failure, match="Template error"):
        await template.render_async([{"role": "user"}] * 100)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    template = ChatTemplate.load(tmp_path)
    assert template.sha256 == ""
    with pytest.raises(Failure) as caught:
        template.render(HELLO)
    assert caught.value.code == "TEMPLATE_ERROR"
    assert caught.value.message == "Template error: template not found"


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    """A file of its own, then chat_template.json, then the tokenizer's configuration."""

    def configure(template: object) -> None:
        config = {"bos_token": {"content": "<s>"}, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    configure("{{ bos_token }}1")
    assert ChatTemplate.load(tmp_path).render(HELLO) == "<s>1"
    configure([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "2"}])
    assert ChatTemplate.load(tmp_path).render(HELLO) == "2"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "3"}))
    assert ChatTemplate.load(tmp_path).render(HELLO) == "3"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}4")
    assert ChatTemplate.load(tmp_path).render(HELLO) == "<s>4"


def test_a_template_that_is_none_is_found_at_load(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(Failure, match="chat template is broken") as caught:
        ChatTemplate.load(tmp_path)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_templates_print_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}", HELLO) == time.strftime("%Y")


TAKES_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}<tool_call>{{ messages[0].content }}"
)


def test_tools_are_given_to_a_template_that_takes_them() -> None:
    assert ChatTemplate(TAKES_TOOLS, TOKENS).takes_tools
    assert not ChatTemplate("{{ messages }}<tool_call>", TOKENS).takes_tools
    assert not ChatTemplate(None, TOKENS).takes_tools
    shown = render(TAKES_TOOLS, [{"role": "user", "content": "hi"}], tools=[{"name": "f"}])
    assert shown == '{"name": "f"}<tool_call>hi'
