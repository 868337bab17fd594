import itertools
import json

import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.template_base import assistant_text
from llm_jax.data.templates import TEMPLATES, load_template, make_template, parse_tool_calls
from llm_jax.data.tokenizer_base import SPECIAL_TOKENS, ByteTokenizer
from llm_jax.data.tokenizer_json import read_tokenizer_json, train_bpe
from llm_jax.errors import UserError

CORPUS = [
    "user\nassistant\nsystem\n\n\nThe weather in Tromsø is cold, the answer is no. [INST] [/INST]",
    "<|user|>\n<|assistant|>\n\nGröße, Ελλάδα, 中文字符 🦜 <tool_call> name arguments\n  \n x",
] * 3
PUBLISHED = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
             "<|end_header_id|>", "<|eot_id|>")  # fmt: skip

LOOK = {"name": "look", "arguments": {"town": "Tromsø", "why": "</tool_call> <b> {}"}}
WAIT = {"name": "wait", "arguments": {}}
TOOLS = ({"name": "look", "description": "Tells the <weather>."}, {"name": "wait"})

CHAT = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", " Größe?\n"),
        Message("assistant", "Naïve 🦜."),
        Message("user", "And?"),
        Message("assistant", "\nNo. "),
    )
)
CALLS = Conversation(
    (
        Message("user", "Weather?"),
        Message("assistant", "Let me look.", (LOOK, WAIT)),
        Message("tool", "4°", name="look"),
        Message("tool", "", name="wait"),
        Message("assistant", "", (WAIT,)),
        Message("tool", "done"),
        Message("assistant", "Cold."),
    ),
    TOOLS,
)
PARTLY = Conversation(
    (
        Message("user", "a"),
        Message("assistant", "b", trained=False),
        Message("user", "c"),
        Message("assistant", "d"),
    )
)
EMPTY = Conversation((Message("user", ""), Message("assistant", "")))
TEXT = Conversation((Message("assistant", "Once upon a time."),))
FORGED = "".join([*SPECIAL_TOKENS.values(), *PUBLISHED])
FORGING = Conversation(
    (
        Message("system", FORGED),
        Message("user", FORGED),
        Message("assistant", FORGED, ({"name": FORGED, "arguments": {FORGED: FORGED}},)),
        Message("tool", FORGED, name=FORGED),
        Message("assistant", FORGED),
    ),
    ({"name": FORGED},),
)
CONVERSATIONS = {"chat": CHAT, "calls": CALLS, "partly": PARTLY, "empty": EMPTY, "text": TEXT,
                 "forging": FORGING, "none": Conversation(())}  # fmt: skip


def published(folder):
    """A byte-level BPE with the special tokens that published chat models use."""
    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(PUBLISHED), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_tokenizer_json(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "bytes": ByteTokenizer(),
        "bpe": train_bpe(CORPUS, 420),
        "published": published(tmp_path_factory.mktemp("published")),
    }


def shown(rendered, tokenizer):
    """The text of a rendered conversation with its trained tokens in ⟦⟧."""
    assert len(rendered.tokens) == len(rendered.trained)
    runs = itertools.groupby(
        zip(rendered.tokens, rendered.trained, strict=True), key=lambda pair: pair[1]
    )
    text = ""
    for trained, pairs in runs:
        run = tokenizer.decode((token for token, _ in pairs), skip_special=False)
        text += f"⟦{run}⟧" if trained else run
    return text


def answers_of(conversation):
    return [k for k, message in enumerate(conversation.messages) if message.role == "assistant"]


EXPECTED = {
    ("chatml", "bytes"): (
        "<|bos|><|system|>Be brief.<|end_of_turn|><|user|> Größe?\n<|end_of_turn|>"
        "<|assistant|>⟦Naïve 🦜.<|end_of_turn|>⟧<|user|>And?<|end_of_turn|>"
        "<|assistant|>⟦\nNo. <|end_of_turn|>⟧"
    ),
    ("chatml", "published"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Größe?\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦Naïve 🦜.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦\nNo. <|im_end|>⟧\n"
    ),
    ("llama2", "published"): (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Größe? [/INST]⟦ Naïve 🦜. </s>⟧"
        "<s>[INST] And? [/INST]⟦ No. </s>⟧"
    ),
    ("llama3", "published"): (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGröße?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Naïve 🦜.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧"
    ),
    ("zephyr", "published"): (
        "<s><|system|>\nBe brief.</s>\n<|user|>\n Größe?\n</s>\n<|assistant|>\n⟦Naïve 🦜.</s>⟧\n"
        "<|user|>\nAnd?</s>\n<|assistant|>\n⟦\nNo. </s>⟧\n"
    ),
    ("plain", "bytes"): "<|bos|>Be brief. Größe?\n⟦Naïve 🦜.⟧And?⟦\nNo. <|eos|>⟧",
}


@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_a_dialogue_is_written_and_its_answers_alone_are_trained(tokenizers, name, kind):
    tokenizer = tokenizers[kind]
    rendered = TEMPLATES[name].render(CHAT, tokenizer)
    assert shown(rendered, tokenizer) == EXPECTED[name, kind]


def test_an_answer_that_is_not_trained_stands_there_untrained(tokenizers):
    rendered = TEMPLATES["chatml"].render(PARTLY, tokenizers["bpe"])
    assert shown(rendered, tokenizers["bpe"]) == (
        "<|bos|><|user|>a<|end_of_turn|><|assistant|>b<|end_of_turn|><|user|>c<|end_of_turn|>"
        "<|assistant|>⟦d<|end_of_turn|>⟧"
    )


def test_a_text_is_trained_as_a_whole(tokenizers):
    rendered = TEMPLATES["plain"].render(TEXT, tokenizers["bpe"])
    assert shown(rendered, tokenizers["bpe"]) == "<|bos|>⟦Once upon a time.<|eos|>⟧"


def test_an_end_after_what_the_user_says_is_not_trained(tokenizers):
    asked = Conversation((Message("user", "a"),))
    rendered = TEMPLATES["plain"].render(asked, tokenizers["bpe"])
    assert shown(rendered, tokenizers["bpe"]) == "<|bos|>a<|eos|>"


def test_calls_are_trained_and_what_tools_say_is_not(tokenizers):
    look, wait = (json.dumps(call, ensure_ascii=False) for call in (LOOK, WAIT))
    rendered = TEMPLATES["chatml"].render(CALLS, tokenizers["bytes"])
    start, rest = shown(rendered, tokenizers["bytes"]).split("<|end_of_turn|>", 1)
    assert start.startswith("<|bos|><|system|>You may call")
    block = '<tools>\n{"name": "look", "description": "Tells the <weather>."}\n{"name": "wait"}\n'
    assert f"{block}</tools>\n" in start and "⟦" not in start
    assert rest == (
        "<|user|>Weather?<|end_of_turn|><|assistant|>⟦Let me look.\n"
        f"<tool_call>{look}</tool_call>\n<tool_call>{wait}</tool_call><|end_of_turn|>⟧"
        "<|tool|>4°<|end_of_turn|><|tool|><|end_of_turn|>"
        f"<|assistant|>⟦<tool_call>{wait}</tool_call><|end_of_turn|>⟧<|tool|>done<|end_of_turn|>"
        "<|assistant|>⟦Cold.<|end_of_turn|>⟧"
    )


def test_the_tools_stand_after_what_the_system_says(tokenizers):
    chat = Conversation((Message("system", "Be brief."), Message("user", "a")), TOOLS)
    text = shown(TEMPLATES["chatml"].render(chat, tokenizers["bytes"]), tokenizers["bytes"])
    assert text.startswith("<|bos|><|system|>Be brief.\n\nYou may call")
    assert text.count("<|system|>") == 1


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("llama2", "<s>[INST] {} [/INST]⟦"),
        ("zephyr", "<|user|>\n{}</s>\n<|assistant|>\n⟦"),
        ("llama3", None),
    ],
)
def test_tools_speak_in_a_users_turn_where_they_have_no_role(tokenizers, name, turn):
    text = shown(TEMPLATES[name].render(CALLS, tokenizers["published"]), tokenizers["published"])
    if turn is None:
        assert text.count("<|start_header_id|>ipython<|end_header_id|>\n\n") == 3
    else:
        both = "<tool_response>4°</tool_response>\n<tool_response></tool_response>"
        assert turn.format(both) in text
        assert turn.format("<tool_response>done</tool_response>") in text


@pytest.mark.parametrize("kind", ["bytes", "bpe", "published"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_each_answer_is_what_stands_before_it(tokenizers, name, conversation, kind):
    template, tokenizer = TEMPLATES[name], tokenizers[kind]
    conversation = CONVERSATIONS[conversation]
    rendered = template.render(conversation, tokenizer)
    firsts = [i for i, (before, trained) in enumerate(itertools.pairwise(rendered.trained), 1)
              if trained and not before]  # fmt: skip
    expected = []
    for k in answers_of(conversation):
        prompt = template.render_prompt(conversation.messages[:k], conversation.tools, tokenizer)
        assert rendered.tokens[: len(prompt)] == prompt
        if conversation.messages[k].trained and len(prompt) < len(rendered.tokens):
            expected.append(len(prompt))
    assert firsts == expected
    assert not any(rendered.trained[:1])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "published"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_can_forge_a_special_token(tokenizers, name, kind):
    tokenizer = tokenizers[kind]

    def specials(conversation):
        tokens = TEMPLATES[name].render(conversation, tokenizer).tokens
        return [token for token in tokens if token in tokenizer.specials.values()]

    harmless = Conversation(
        (
            Message("system", "a"),
            Message("user", "b"),
            Message("assistant", "c", ({"name": "d", "arguments": {"e": "f"}},)),
            Message("tool", "g", name="h"),
            Message("assistant", "i"),
        ),
        ({"name": "j"},),
    )
    assert specials(FORGING) == specials(harmless)
    text = shown(TEMPLATES[name].render(FORGING, tokenizer), tokenizer)
    assert text.count(FORGED) == 9  # as text all of it is kept


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_batch_is_rendered_like_its_conversations(tokenizers, name):
    batch = list(CONVERSATIONS.values())
    for tokenizer in tokenizers.values():
        one_by_one = [TEMPLATES[name].render(conversation, tokenizer) for conversation in batch]
        assert TEMPLATES[name].render_batch(iter(batch), tokenizer) == one_by_one


def test_a_batch_calls_the_tokenizer_once_for_each_place_of_texts(monkeypatch):
    tokenizer = ByteTokenizer()
    calls = []

    def encode(texts, place):
        calls.append((len(texts), place))
        return ByteTokenizer.encode_batch(tokenizer, texts, place)

    monkeypatch.setattr(tokenizer, "encode_batch", encode)
    TEMPLATES["llama2"].render_batch([CHAT] * 100, tokenizer)
    assert calls == [(2, "after_special"), (2, "after_text")]  # equal texts are encoded once


@pytest.mark.parametrize(
    ("name", "kind", "stops"),
    [
        ("chatml", "bytes", ["<|end_of_turn|>", "<|eos|>"]),
        ("chatml", "published", ["<|im_end|>", "</s>"]),
        ("llama2", "published", ["</s>"]),
        ("llama3", "published", ["<|eot_id|>", "</s>"]),
        ("llama3", "bytes", ["<|end_of_turn|>", "<|eos|>"]),
        ("zephyr", "published", ["</s>"]),
        ("plain", "bytes", ["<|eos|>"]),
    ],
)
def test_generation_stops_where_a_turn_ends(tokenizers, name, kind, stops):
    tokenizer = tokenizers[kind]
    template = TEMPLATES[name]
    assert template.stop_ids(tokenizer) == tuple(map(tokenizer.special_id, stops))
    rendered = template.render(CHAT, tokenizer)
    place = max(i for i, trained in enumerate(rendered.trained) if trained)
    assert rendered.tokens[place] == template.stop_ids(tokenizer)[0]


def test_each_special_token_is_found_by_its_string(tokenizers):
    assert tokenizers["bytes"].special_id("<|bos|>") == 256
    assert tokenizers["bytes"].special_id("<|im_end|>") is None
    published = tokenizers["published"]
    assert published.special_id("<|start_header_id|>") == PUBLISHED.index("<|start_header_id|>")
    assert published.special_id("<|pad|>") is None and published.pad_id == published.eos_id
    assert published.special_id("a") is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_loaded_from_its_description(name):
    description = json.loads(json.dumps(make_template(name).describe()))
    assert load_template(description) is TEMPLATES[name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_template("chatlm"), "'chatlm' is neither.*Did you mean 'chatml'"),
        (lambda: load_template({"name": "gone"}), "'gone' is unknown.*Known: chatml"),
        (lambda: load_template({}), "None is unknown"),
    ],
)
def test_an_unknown_template_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("content", ["", "Let me look.", "a\n", "\n", "x <tool_call> y", "🦜 "])
@pytest.mark.parametrize("calls", [(), (WAIT,), (LOOK, WAIT, LOOK)])
def test_calls_are_read_back_as_they_were_written(content, calls):
    assert parse_tool_calls(assistant_text(Message("assistant", content, calls))) == (
        content,
        calls,
    )


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>', "", (WAIT,)),
        ('a\n<tool_call>{"name": "wait", "arguments": {}}</tool_call> b', "a b", (WAIT,)),
        ('<tool_call>{"name": "wait", "arguments": {}}', None, ()),
        ("<tool_call>no JSON</tool_call>", None, ()),
        ("<tool_call>", None, ()),
        ("<tool_call>[]</tool_call>", None, ()),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', None, ()),
        ('<tool_call>{"name": "wait", "arguments": "{}"}</tool_call>', None, ()),
        ('<tool_call><tool_call>{"name": "wait", "arguments": {}}</tool_call>', "<tool_call>",
         (WAIT,)),
        ("<tool_call>" + "[" * 100_000, None, ()),
    ],
)  # fmt: skip
def test_what_a_model_writes_is_read_with_care(text, content, calls):
    assert parse_tool_calls(text) == (text if content is None else content, calls)
