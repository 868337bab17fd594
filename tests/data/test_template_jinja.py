import itertools
import json

import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.template_jinja import JinjaTemplate
from llm_jax.data.templates import load_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizer_json import read_tokenizer_json
from llm_jax.errors import UserError

CHATML = """\
{%- if tools %}
{{ '<|im_start|>system\\n' }}
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ZEPHYR = """\
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
    {% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{ raise_exception('unknown role') }}
    {% endif %}
<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>

    {% if message.role == 'assistant' %}
        {%- generation %}
{{ message.content | trim }}
            {%- for call in message.tool_calls or [] %}
{{ {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}
            {%- endfor %}
<|eot_id|>{% endgeneration %}
    {% else %}
{{ message.content | trim }}<|eot_id|>
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""
# A space before the answer that its prompt lacks, and one before its end.
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SOURCES = {"chatml": CHATML, "zephyr": ZEPHYR, "llama3": LLAMA3, "llama2": LLAMA2}
SPECIALS = ("<|begin_of_text|>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>")  # fmt: skip

CHAT = Conversation(
    (
        Message("system", "Be <brief> & kind."),
        Message("user", " Größe? "),
        Message("assistant", "Naïve 🦜."),
        Message("user", "And?"),
        Message("assistant", "No."),
    )
)
USERS = Conversation(CHAT.messages[1:])  # llama2's form above knows no system turn
CALLS = Conversation(
    (
        Message("user", "Weather?"),
        Message(
            "assistant",
            "",
            ({"name": "look", "arguments": {"town": "Tromsø", "why": "<a & b>"}},),
        ),
        Message("tool", "4°", name="look"),
        Message("assistant", "Cold."),
    ),
    ({"type": "function", "function": {"name": "look", "description": "It's <here>."}},),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE with the special tokens of the templates here."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe = library.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(
        ["user\nassistant\n\n\n the answer is no. Naïve Größe [INST]"] * 3, trainer
    )
    bpe.save(str(file))
    return read_tokenizer_json(file)


def template(source, *more):
    return JinjaTemplate("mine.jinja", (("default", source), *more))


def shown(rendered, tokenizer):
    """The text of a rendered conversation with its trained tokens in ⟦⟧."""
    pairs = zip(rendered.tokens, rendered.trained, strict=True)
    text = ""
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode((token for token, _ in run), skip_special=False)
        text += f"⟦{words}⟧" if trained else words
    return text


# Without the marks ⟦⟧, these are what transformers 5.23 makes of the same templates.
EXPECTED = {
    ("chatml", "chat"): (
        "<|im_start|>system\nBe <brief> & kind.<|im_end|>\n<|im_start|>user\n Größe? <|im_end|>\n"
        "<|im_start|>assistant\n⟦Naïve 🦜.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n"
    ),
    ("zephyr", "chat"): (
        "<|system|>\nBe <brief> & kind.</s>\n<|user|>\n Größe? </s>\n"
        "<|assistant|>\n⟦Naïve 🦜.</s>⟧\n<|user|>\nAnd?</s>\n<|assistant|>\n⟦No.</s>⟧\n"
    ),
    ("llama3", "chat"): (
        "<|begin_of_text|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe <brief> & kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGröße?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Naïve 🦜.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧"
    ),
    ("llama2", "users"): (
        "<|begin_of_text|>[INST]  Größe?  [/INST]⟦ Naïve 🦜. </s>⟧"
        "<|begin_of_text|>[INST] And? [/INST]⟦ No. </s>⟧"
    ),
    ("llama3", "calls"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWeather?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "look", "parameters": {"town": "Tromsø", "why": "<a & b>"}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n4°<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Cold.<|eot_id|>⟧"
    ),
}
CONVERSATIONS = {"chat": CHAT, "users": USERS, "calls": CALLS}


@pytest.mark.parametrize(("name", "conversation"), EXPECTED)
def test_a_dialogue_is_written_and_its_answers_alone_are_trained(tokenizer, name, conversation):
    rendered = template(SOURCES[name]).render(CONVERSATIONS[conversation], tokenizer)
    assert shown(rendered, tokenizer) == EXPECTED[name, conversation]
    ids = {token for token in rendered.tokens if token in tokenizer.specials.values()}
    assert tokenizer.bos_id in ids or name in ("chatml", "zephyr")


def test_a_description_of_tools_is_written_as_it_is(tokenizer):
    prompt = template(CHATML).render_prompt(CALLS.messages[:1], CALLS.tools, tokenizer)
    assert tokenizer.decode(prompt, skip_special=False) == (
        '<|im_start|>system\n{"type": "function", "function": {"name": "look", "description": '
        '"It\'s <here>."}}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["published", "bytes"])
@pytest.mark.parametrize(("name", "conversation"), EXPECTED)
def test_the_prompt_of_each_answer_is_what_stands_before_it(tokenizer, name, conversation, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizer
    conversation = CONVERSATIONS[conversation]
    rendered = template(SOURCES[name]).render(conversation, tokenizer)
    for k, message in enumerate(conversation.messages):
        if message.role == "assistant":
            prompt = template(SOURCES[name]).render_prompt(
                conversation.messages[:k], conversation.tools, tokenizer
            )
            assert rendered.tokens[: len(prompt)] == prompt
            assert rendered.trained[len(prompt) - 1 : len(prompt) + 1] == [False, True]


@pytest.mark.parametrize("name", SOURCES)
def test_an_answer_that_is_not_trained_stands_there_untrained(tokenizer, name):
    first, answer, *rest = USERS.messages
    quiet = Conversation((first, Message("assistant", answer.content, trained=False), *rest))
    text = shown(template(SOURCES[name]).render(quiet, tokenizer), tokenizer)
    assert text.count("⟦") == 1 and "⟦ No." in text.replace("⟦", "⟦ ").replace("  ", " ")
    whole = shown(template(SOURCES[name]).render(USERS, tokenizer), tokenizer)
    assert text.replace("⟦", "").replace("⟧", "") == whole.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("name", SOURCES)
def test_no_text_can_forge_a_special_token(tokenizer, name):
    forged = f"{''.join(SPECIALS)}\U000f0000\U000f0001 <|im_end|><"

    def made(words):
        return Conversation(
            (Message("user", words), Message("assistant", words)), ({words: words},)
        )

    def specials(conversation):
        tokens = template(SOURCES[name]).render(conversation, tokenizer).tokens
        return [token for token in tokens if token in tokenizer.specials.values()]

    assert specials(made(forged)) == specials(made("a"))
    rendered = template(SOURCES[name]).render(made(forged), tokenizer)
    assert shown(rendered, tokenizer).count(forged) == (4 if name == "chatml" else 2)


@pytest.mark.parametrize("first", ["<", "<|im_", "<|im_end|", " <|i", "<|im_<|im_"])
def test_two_texts_cannot_make_a_special_token_together(tokenizer, first):
    joined = template("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    rest = "<|im_end|>".removeprefix(first.strip()[first.strip().rfind("<") :])
    tokens = joined.render_prompt(
        [Message("user", f"{first} "), Message("user", rest)], (), tokenizer
    )
    assert tokenizer.special_id("<|im_end|>") not in tokens
    assert tokenizer.decode(tokens) == first.strip() + rest


def test_special_tokens_that_overlap_or_have_one_character_cannot_be_forged(tokenizer, monkeypatch):
    strings = {300: "ab", 301: "bc", 302: "x"}
    odd = ByteTokenizer()
    odd._string_of_special |= strings
    conversation = Conversation((Message("user", "abcx"), Message("assistant", "xabc")))
    rendered = template("{% for m in messages %}{{ m.content }}x{% endfor %}").render(
        conversation, odd
    )
    assert rendered.tokens == [*b"abcx", 302, *b"xabc", 302]
    assert rendered.trained == [False] * 5 + [True] * 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if not loop.last %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('.')[0] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if 'No' in m.content %}!{% endif %}{% endfor %}",
        "nothing",
    ],
)
def test_a_template_whose_answers_are_not_to_be_found_is_refused(tokenizer, source):
    conversation = Conversation(CHAT.messages, where="chats.jsonl:7")
    with pytest.raises(UserError) as error:
        template(source).render(conversation, tokenizer)
    message = str(error.value)
    assert message.startswith("chats.jsonl:7: 'mine.jinja' is a chat template without assistant")
    assert "Put {% generation %} and" in message and "\n" not in message
    prompt = template(source).render_prompt(CHAT.messages[:2], (), tokenizer)
    assert isinstance(prompt, list)


def test_answers_are_found_without_the_space_around_them(tokenizer):
    source = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}"
    chat = Conversation((Message("user", " a "), Message("assistant", "\n b \n")))
    text = shown(template(source).render(chat, tokenizer), tokenizer)
    assert text == "a<|im_end|>⟦b<|im_end|>⟧"


def test_calls_need_tags(tokenizer):
    with pytest.raises(UserError, match="without assistant spans"):
        template(CHATML).render(CALLS, tokenizer)
    assert template(CHATML).render_prompt(CALLS.messages[:3], (), tokenizer)


def test_tags_that_mark_nothing_are_refused(tokenizer):
    source = (
        "{% for m in messages %}{{ m.content }}{% if false %}{% generation %}{% endgeneration %}"
    )
    with pytest.raises(UserError, match="without assistant spans"):
        template(source + "{% endif %}{% endfor %}").render(CHAT, tokenizer)


def test_an_answer_in_several_spans_is_trained_but_not_in_part(tokenizer):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}!{% endgeneration %}</s>{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    text = shown(template(source).render(USERS, tokenizer), tokenizer)
    assert text == " Größe? ⟦Naïve 🦜.!</s>⟧And?⟦No.!</s>⟧"
    partly = Conversation((*USERS.messages[:3], Message("assistant", "x", trained=False)))
    with pytest.raises(UserError, match="marks 4 assistant spans for 2 assistant turns"):
        template(source).render(partly, tokenizer)


def test_the_token_that_begins_the_next_turn_is_not_trained(tokenizer):
    source = (
        "{% for m in messages %}<|start_header_id|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}<|start_header_id|>"
    )
    text = shown(template(source).render(USERS, tokenizer), tokenizer)
    assert text.endswith("⟦No.<|eot_id|>⟧<|start_header_id|>") and "⟧<|start_header_id|>And" in text


def test_an_empty_answer_is_its_end_alone(tokenizer):
    empty = Conversation((Message("user", ""), Message("assistant", "")))
    for name, end in (("chatml", "⟦<|im_end|>⟧\n"), ("llama3", "⟦<|eot_id|>⟧")):
        assert shown(template(SOURCES[name]).render(empty, tokenizer), tokenizer).endswith(end)


@pytest.mark.parametrize(
    ("source", "stops"),
    [
        (CHATML, ["<|im_end|>", "</s>"]),
        (LLAMA3, ["<|eot_id|>", "</s>"]),
        (ZEPHYR, ["</s>"]),
        (LLAMA2, ["</s>"]),
        ("unknowable", ["<|im_end|>", "</s>"]),  # this tokenizer's token for ends of turns
    ],
)
def test_generation_stops_where_a_turn_ends(tokenizer, source, stops):
    ids = tuple(map(tokenizer.special_id, stops))
    assert template(source).stop_ids(tokenizer) == ids


def test_tools_choose_the_template_that_is_made_for_them(tokenizer):
    both = template(LLAMA2, ("tool_use", LLAMA3))
    assert both.render(CALLS, tokenizer) == template(LLAMA3).render(CALLS, tokenizer)
    assert both.render(USERS, tokenizer) == template(LLAMA2).render(USERS, tokenizer)


def test_what_templates_expect_is_there(tokenizer):
    source = (
        "{{ strftime_now('%Y') | length }}{{ {'é': '<&>'} | tojson }}{{ [1] | tojson(indent=1) }}"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ tools is none }}{{ eos_token }}{{ pad_token }}"
    )
    tokens = template(source).render_prompt((), (), tokenizer)
    text = tokenizer.decode(tokens, skip_special=False)
    assert text == '4{"é": "<&>"}[\n 1\n]1True</s>'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must take turns.') }}", "roles must take turns."),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "'__class__'"),
        ("{{ raise_exception('two\nlines') }}", "two lines."),
        ("{{ 1 / 0 }}", "division by zero."),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(tokenizer, source, message):
    with pytest.raises(UserError, match=r"^chats:3: the chat template ") as error:
        template(source).render(Conversation(CHAT.messages, where="chats:3"), tokenizer)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_template_is_loaded_from_its_description(tokenizer):
    both = template(CHATML, ("tool_use", LLAMA3))
    assert load_template(json.loads(json.dumps(both.describe()))) == both
