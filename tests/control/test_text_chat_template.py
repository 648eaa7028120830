"""Rendering chats: where templates come from, what they see, what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.text.chat_template import ChatTemplate, load_chat_template
from tests.text_fixtures import CHATML

USER = {"role": "user", "content": "Hi"}


def render(source: str, messages: list[dict[str, object]], **options: object) -> str:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(messages, **options)  # type: ignore[arg-type]


def test_template_sees_messages_special_tokens_and_kwargs() -> None:
    source = (
        "{{ bos_token }}{{ x }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}{{ tools is none }}"
    )
    assert render(source, [USER], template_kwargs={"x": 5}) == "<s>5[user]HiTrue"


def test_generation_prompt() -> None:
    assert render(CHATML, [USER]).endswith("<|im_start|>assistant\n")
    assert render(CHATML, [USER], add_generation_prompt=False).endswith("<|im_end|>\n")


def test_filters_and_functions() -> None:
    source = (
        "{{ {'b': '<é>', 'a': 1} | tojson }}|{{ [1] | tojson(indent=2) }}|{{ strftime_now('%Y') | length }}|"
        "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}|"
        "{% generation %}kept{% endgeneration %}"
    )
    assert render(source, [USER]) == '{"b": "<é>", "a": 1}|[\n  1\n]|4|01|kept'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_a_template_does_wrong_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(source, [USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "Cannot apply chat template to an empty conversation"),
        ([{"content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "JSON"),
        (["text"], "object"),
    ],
)
def test_messages_at_fault(messages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(CHATML, messages)


def test_parts_are_joined_unless_the_template_reads_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render("{{ messages[0].content }}", parts) == "a\nb"
    assert render("{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}", parts) == "<a><b>"
    through = "{% set c = messages[0]['content'] %}{% for p in c %}<{{ p.text }}>{% endfor %}"
    assert render(through, parts) == "<a><b>"


def test_none_is_left_out_and_arguments_become_objects() -> None:
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}],
    }
    source = "{{ messages[0].content is defined }} {{ messages[0].tool_calls[0].function.arguments.x[0] }}"
    assert render(source, [message]) == "False 1"
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x": [1]}', "the caller's message was changed"


@pytest.mark.parametrize(("source", "text"), [("{{ m }}", "A b  "), ("{{ m | trim }}", "A b")])
def test_continue_final_message(source: str, text: str) -> None:
    """The prompt ends where the message does; a template that trims it wins."""
    loop = "{% for x in messages %}{% set m = x.content %}<|" + source + "|>{% endfor %}"
    chat = [USER, {"role": "assistant", "content": "A b  "}]
    rendered = render(loop, chat, add_generation_prompt=False, continue_final_message=True)
    assert rendered == f"<|Hi|><|{text}"


def test_continue_final_message_refuses() -> None:
    with pytest.raises(RequestError, match="both"):
        render(CHATML, [USER], continue_final_message=True)
    with pytest.raises(RequestError, match="changes the last message"):
        render("{{ messages[0].content | lower }}", [USER], add_generation_prompt=False, continue_final_message=True)


def test_own_names_cannot_be_overridden() -> None:
    with pytest.raises(RequestError, match="messages"):
        render(CHATML, [USER], template_kwargs={"messages": []})


def folder_with(path: Path, config: object = None, **files: str) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps({} if config is None else {"chat_template": config}))
    for name, text in files.items():
        (path / f"{name}.jinja").write_text(text)
    return path


def test_where_templates_come_from(tmp_path: Path) -> None:
    def text(override: str | None = None, asked: str | None = None) -> str:
        return load_chat_template(tmp_path, override, {}).render([USER], chat_template=asked)

    assert not load_chat_template(folder_with(tmp_path), None, {}).is_defined
    folder_with(tmp_path, "plain")
    assert text() == "plain"
    folder_with(tmp_path, [{"name": "default", "template": "first"}, {"name": "rag", "template": "second"}])
    assert (text(), text("rag"), text(asked="rag"), text(asked="{{ 1 }}")) == ("first", "second", "second", "1")
    folder_with(tmp_path, "plain", chat_template="file")
    assert text() == "file"
    assert text("{{ 'inline' }}") == "inline"
    (tmp_path / "own.txt").write_text("own")
    assert text(str(tmp_path / "own.txt")) == "own"


def test_templates_that_cannot_be_had(tmp_path: Path) -> None:
    folder_with(tmp_path)
    with pytest.raises(ConfigError, match="neither a readable file"):
        load_chat_template(tmp_path, "no-such-file.jinja", {})
    with pytest.raises(ConfigError, match="line 1"):
        load_chat_template(tmp_path, "{% if %}", {})
    with pytest.raises(RequestError, match="no chat template"):
        load_chat_template(tmp_path, None, {}).render([USER])
    folder_with(tmp_path, [{"name": "a", "template": "1"}, {"name": "b", "template": "2"}])
    with pytest.raises(RequestError, match=r"\['a', 'b'\]"):
        load_chat_template(tmp_path, None, {}).render([USER])
