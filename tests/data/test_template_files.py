"""Where Jinja chat templates are read from."""

import json

import pytest

from llm_jax.data.templates import make_template
from llm_jax.errors import UserError

SOURCE = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
OTHER = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
THIRD = "{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my.jinja", SOURCE),
        ("chat_template.jinja", SOURCE),
        ("tokenizer_config.json", json.dumps({"chat_template": SOURCE})),
        ("chat_template.json", json.dumps({"chat_template": SOURCE})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": SOURCE}]}),
        ),
    ],
)
def test_a_template_is_read_from_the_files_of_a_model(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "config.json").write_text("{}")
    assert make_template(str(tmp_path / name)).sources == (("default", SOURCE),)
    if name != "my.jinja":
        assert make_template(str(tmp_path)).sources == (("default", SOURCE),)


def test_a_folders_own_file_comes_before_its_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": OTHER}))
    (tmp_path / "chat_template.json").write_text("{}")
    assert make_template(str(tmp_path)).sources == (("default", OTHER),)
    (tmp_path / "chat_template.jinja").write_text(THIRD)
    assert make_template(str(tmp_path)).sources == (("default", THIRD),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jinja", "{% for %}", "no valid Jinja: .* in line 1"),
        ("a.jinja", "{% generation %}", "no valid Jinja"),
        ("a.jinja", "{{ 1 | nofilter }}", "no valid Jinja: No filter named 'nofilter'"),
        ("a.jinja", b"\xff", "cannot be read as a chat template"),
        ("a.jinja", "", "holds no chat template"),
        ("tokenizer_config.json", "{", "cannot be read as a chat template"),
        ("tokenizer_config.json", "[]", "cannot be read as a chat template"),
        ("tokenizer_config.json", "{}", "lacks 'chat_template'"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "cannot be read as a chat template"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "x"}]}',
            "holds no chat template 'default', it has rag",
        ),
        ("folder/config.json", "{}", "folder holds no chat template: no chat_template.jinja"),
    ],
)
def test_a_damaged_template_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        make_template(str(path.parent if name.startswith("folder") else path))
    assert "\n" not in str(error.value)
