"""Chat templates: what they render, where they are read from, and what the sandbox keeps them from."""

import json
import sys
from pathlib import Path

import pytest

from lucid_jax.models import ChatTemplate, chat, load_model, save_model
from lucid_jax.models.tokenizer import END_OF_TEXT, Tokenizer

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def rendered(source, messages=SAID, **variables):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


def test_what_templates_are_written_with():
    """Blocks that leave no line, loop controls, special tokens, JSON, dates and marks for training."""
    source = """
    {% for m in messages %}
        {% if m.role == 'assistant' %}{% break %}{% endif %}
{{ bos_token }}{{ m.content }}
    {% endfor %}
"""
    assert rendered(source) == "\n<s>Hi\n"
    assert rendered("{{ messages | tojson }}") == json.dumps(SAID)
    assert rendered("{{ {'é': '<'} | tojson(indent=1) }}") == '{\n "é": "<"\n}'
    assert rendered("{% generation %}{{ messages[1].content }}{% endgeneration %}") == "Yes?"
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    assert rendered("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}") == "2"


def test_what_is_given():
    source = "{{ add_generation_prompt }} {{ tools is none }} {{ thinking | default('no') }}"
    assert rendered(source) == "True True no"
    assert rendered(source, add_generation_prompt=False, thinking="yes") == "False True yes"
    assert rendered("{{ bos_token }}", bos_token="<b>") == "<b>"
    assert rendered("{{ 'name' in messages[0] }}", [{**SAID[0], "name": None}]) == "False"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users may begin') }}", "refuses: only users may begin"),
        ("{% for %}", "refuses: "),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses: "),
        ("{{ messages[9].content }}", "refuses: "),
        ("{{ 1 + messages[0].content }}", "fails on these messages .TypeError"),
        ("{{ 1 // 0 }}", "fails on these messages .ZeroDivisionError"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "fails on these messages .RecursionError",
        ),
    ],
)
def test_templates_that_fail(source, message):
    with pytest.raises(ValueError, match=message):
        rendered(source)


def test_only_plain_values_reach_a_template():
    """Others may have methods that write files."""
    said = [{"role": "user", "content": Path("x")}]
    with pytest.raises(ValueError, match=r"fails on these messages .TypeError: Object of"):
        rendered("{{ messages[0].content.unlink() }}", said)


def test_where_a_folder_keeps_it(tmp_path):
    """In tokenizer_config.json, as text or by name; chat_template.jinja has the last word."""
    path = tmp_path / "tokenizer.json"
    Tokenizer.train(["Hi"], vocab_size=260).save(path)
    assert Tokenizer.load(path).chat_template is None
    settings = {"bos_token": {"content": "<s>"}, "model_max_length": 5, "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = Tokenizer.load(path).chat_template
    assert (template.source, template.tokens) == ("old", {"bos_token": "<s>"})
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "new"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(path).chat_template.source == "new"
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert Tokenizer.load(path).chat_template.source == "newest"


@pytest.mark.parametrize("template", [5, [], [{"name": "rag", "template": "x"}]])
def test_templates_that_are_none(tmp_path, template):
    path = tmp_path / "tokenizer.json"
    Tokenizer.train(["Hi"], vocab_size=260).save(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json must have a text as chat_template"
    ):
        Tokenizer.load(path)


def test_a_conversation_to_ids():
    """The template alone says what starts a text; special tokens of its text are such."""
    tokenizer = Tokenizer.train(["Hi"], vocab_size=260)
    tokenizer.chat_template = ChatTemplate(f"{{{{ messages[0].content }}}}{END_OF_TEXT}")
    ids = tokenizer.apply_chat_template(SAID)
    assert ids == [*tokenizer.encode("Hi"), tokenizer.end_of_text_id]


def test_a_tokenizer_without_a_template():
    _, tokenizer = load_model()
    with pytest.raises(ValueError, match="came without a chat template"):
        tokenizer.apply_chat_template(SAID)


def test_a_template_survives_saving(tmp_path):
    """With the token that starts prompts where tokenizer_config.json says so."""
    model, tokenizer = load_model()
    save_model(tmp_path, model, tokenizer)
    assert not (tmp_path / "tokenizer_config.json").exists()
    told = Tokenizer(tokenizer._backend, 5, ChatTemplate("x", {"eos_token": "<e>"}))
    save_model(tmp_path, model, told)
    _, again = load_model(tmp_path)
    assert again._add_bos == 5
    assert again.chat_template.source == "x"
    assert again.chat_template.tokens["eos_token"] == "<e>"


def test_without_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat._environment.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lucid-jax\[gguf\]'"):
        rendered("x")
