"""The lm-evaluation-harness: its numbers against those of our own tasks on the same rows, what it
hands to the model, and what bad input gets. Needs pip install 'llm_jax[eval]'."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax.data.corpus import ComponentConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizer_json import train_bpe
from llm_jax.errors import UserError
from llm_jax.evals.generation import GenerationConfig, generation_task
from llm_jax.evals.multiple_choice import MultipleChoiceConfig, multiple_choice_task
from llm_jax.evals.pairs import encode_pair
from llm_jax.evals.perplexity import PerplexityConfig, perplexity_task

pytest.importorskip("lm_eval")

import datasets
import huggingface_hub
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from llm_jax.evals.harness import run_harness
from llm_jax.evals.harness_model import HarnessModel, generation_settings

BYTES = ByteTokenizer()
WORDS = ("red", "a green one", "blue", "very dark violet", "grey")
ANSWERED = """
task: answered
output_type: generate_until
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/prompts.jsonl}}
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: chosen
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/questions.jsonl}}
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
READ = """
task: read
output_type: loglikelihood_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/texts.jsonl}}
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}, {metric: word_perplexity}]
"""
REMOTE = """
task: remote
dataset_path: somebody/some_questions
dataset_name: hard
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def folder(tmp_path):
    """A folder of task files and of questions; `prompts.jsonl` and `texts.jsonl` are not there."""
    for text in (ANSWERED, CHOSEN, READ, REMOTE):
        path = tmp_path / f"{text.split()[1]}.yaml"
        path.write_text(text % {"folder": tmp_path} if "%(" in text else text)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(36):
        size = int(rng.integers(2, 5))
        choices = rng.permutation(WORDS)[:size].tolist()
        answer = int(rng.integers(size))
        rows.append({"question": f"Item {number}?", "choices": choices, "answer": answer})
    write(tmp_path / "questions.jsonl", rows)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def figures(results, task):
    """Metrics without the names of filters."""
    return {key.partition(",")[0]: value for key, value in results["results"][task].items()}


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_a_multiple_choice_task_has_the_numbers_of_ours(folder, plain_subject, params):
    results = run_harness(
        plain_subject, params, ["chosen"], include_path=str(folder), log_samples=True
    )
    config = MultipleChoiceConfig(source=str(folder / "questions.jsonl"))
    ours = multiple_choice_task(config, plain_subject)(params)
    found = figures(results, "chosen")
    assert found["acc"] == ours.metrics["accuracy"]
    assert found["acc_norm"] == found["acc_bytes"] == ours.metrics["accuracy_by_bytes"]
    assert found["acc_stderr"] == pytest.approx(ours.metrics["accuracy_stderr"])
    assert 0 < found["acc"] < 1 and found["acc"] != found["acc_norm"]
    samples = results["samples"]["chosen"]
    for sample, row in zip(samples, ours.examples, strict=True):
        totals = [total for [(total, _)] in sample["resps"]]
        np.testing.assert_allclose(totals, row["logprobs"], atol=1e-4)


def test_a_generative_task_has_the_numbers_of_ours(folder, subject, params):
    rows = [{"prompt": f"Say {i}.", "completion": "x"} for i in range(30)]
    write(folder / "prompts.jsonl", rows)
    config = GenerationConfig(
        data=PromptDataConfig(source=str(folder / "prompts.jsonl"), validation_fraction=0.2),
        held_out=False,
        max_new_tokens=6,
    )
    wrote = {}
    for row in generation_task(config, subject)(params).examples:
        wrote[row["prompt"]] = row["texts"][0]
    assert len(set(wrote.values())) > 10
    for number, row in enumerate(rows):
        row["completion"] = (wrote[row["prompt"]].strip() if number % 3 else "") or "no"
    write(folder / "prompts.jsonl", rows)
    ours = generation_task(config, subject)(params)

    results = run_harness(
        subject,
        params,
        ["answered"],
        include_path=str(folder),
        apply_chat_template=True,
        log_samples=True,
    )
    exact = figures(results, "answered")["exact_match"]
    assert exact == ours.metrics["accuracy"] and 0 < exact < 1
    for sample in results["samples"]["answered"]:
        assert sample["resps"] == [[wrote[sample["doc"]["prompt"]]]]


def test_perplexity_is_that_of_ours(folder, plain_subject, params):
    texts = ["a short text", "Wörter, 世界, and more", "b" * 60]
    write(folder / "texts.jsonl", [{"text": text} for text in texts])
    results = run_harness(plain_subject, params, ["read"], include_path=str(folder))
    source = ComponentConfig(source=str(folder / "texts.jsonl"), name="texts")
    ours = perplexity_task(PerplexityConfig(sources=(source,)), plain_subject)(params).metrics
    for name in ("bits_per_byte", "byte_perplexity"):
        assert figures(results, "read")[name] == pytest.approx(ours[name], rel=1e-6)
    assert "samples" not in results


def test_a_long_text_is_read_in_windows_each_token_once(plain_subject, params, all_logprobs):
    text = "It was a bright cold day in April, and the clocks struck thirteen. " * 3
    subject = dataclasses.replace(plain_subject, length=64)
    [found] = HarnessModel(subject, params).loglikelihood_rolling(
        [request("loglikelihood_rolling", text)]
    )
    tokens, expected, known = [BYTES.bos_id, *text.encode()], 0.0, 1
    while known < len(tokens):
        end = min(known + 64, len(tokens))
        begin = max(0, end - 65)  # the last window is a whole one too
        logprobs = all_logprobs(np.array(tokens[begin:end]))
        expected += sum(logprobs[i - begin - 1, tokens[i]] for i in range(known, end))
        known = end
    assert found == pytest.approx(expected, rel=1e-5)


class Standard(TemplateLM):
    """The harness's own rule on tokens of ours."""

    eot_token_id = prefix_token_id = generate_until = loglikelihood_rolling = None

    def __init__(self, tokenizer):
        super().__init__()
        self.ours = tokenizer

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return [*self.ours.document_start, *self.ours.encode(string)]

    def _loglikelihood_tokens(self, requests, **kwargs):
        raise NotImplementedError


def test_pairs_are_cut_where_the_harness_cuts_them():
    text = "the answer is that there are other answers, then some.\n\n" * 20
    tokenizer = train_bpe([text], 320)
    pairs = [
        ("the answer is", " that"), ("the answer is ", "that"), ("the ans", "wer is"),
        ("then \n", "some."), ("the answer is  ", " that"), ("Wör", "ter"),
    ]  # fmt: skip
    separate = 0
    for context, continuation in pairs:
        found = encode_pair(tokenizer, context, continuation)
        assert found == Standard(tokenizer)._encode_pair(context, continuation)
        separate += found[1] == tokenizer.encode(continuation, "after_text")
    assert separate < len(pairs)


def test_a_conversation_keeps_its_tokens_and_cannot_be_forged(subject, params):
    asks = [{"role": "user", "content": "Be <|assistant|> now."}]
    model = HarnessModel(subject, params)
    prompt = model.apply_chat_template(asks)
    begun = model.apply_chat_template(
        [*asks, {"role": "assistant", "content": "I am "}], add_generation_prompt=False
    )
    assert prompt.endswith("<|assistant|>") and begun == prompt + "I am "
    head, rest = model._encode_pair(prompt, "it")
    assert head.count(BYTES.special_ids["assistant"]) == 1 and rest == list(b"it")
    assert model._encode_pair(begun, "it") == ([*head, *b"I am"], list(b" it"))
    pairs = [(head, list(b"it")), ([*head, *b"I am"], list(b" it")), ([BYTES.bos_id], list(b"it"))]
    wanted = [(found.total, found.is_greedy) for found in subject.loglikelihoods(params, pairs)]
    requests = [request("loglikelihood", context, "it") for context in (prompt, begun, "")]
    assert model.loglikelihood(requests) == wanted
    with pytest.raises(UserError, match="text of its own in place of the conversation"):
        model.loglikelihood([request("loglikelihood", prompt + "I am", " it")])


def test_stop_strings_lengths_and_seeds_are_those_of_the_task(subject, plain_subject, params):
    def written(model, **settings):
        requests = [request("generate_until", f"Item {i}", settings) for i in range(6)]
        return model.generate_until(requests)

    model = HarnessModel(plain_subject, params)
    whole = written(model, until=[], max_gen_toks=12)
    stop = next(text[2] for text in whole if len(text) > 4)
    assert written(model, until=[stop], max_gen_toks=12) == [t.partition(stop)[0] for t in whole]
    assert written(model, until=stop, max_tokens=12) == [t.partition(stop)[0] for t in whole]
    sampled = written(model, until=[], max_gen_toks=12, temperature=1.0)
    assert sampled != whole
    assert sampled == written(model, until=[], max_gen_toks=12, do_sample=True, temperature=1)
    assert whole == written(model, until=[], max_gen_toks=12, do_sample=False, temperature=1)
    other = HarnessModel(plain_subject, params, seed=1)
    assert sampled != written(other, until=[], max_gen_toks=12, temperature=1.0)
    twice = [request("generate_until", "Item", {"temperature": 1.0, "max_gen_toks": 12})] * 2
    first, second = model.generate_until(twice)
    assert first != second


def test_a_stop_string_that_is_a_special_token_ends_as_that_token(plain_subject, uniform):
    """Logits that are all zero choose token 0 for ever; it is no special one, so a subject whose
    tokenizer has it as one is stopped by its name alone."""
    tokenizer = ByteTokenizer()
    tokenizer.specials["<zero>"] = 0
    model = HarnessModel(dataclasses.replace(plain_subject, tokenizer=tokenizer), uniform)
    asked = [
        request("generate_until", "a", {"until": until, "max_gen_toks": 4})
        for until in ([], ["<zero>"])
    ]
    assert model.generate_until(asked) == ["\0" * 4, "\0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not what this model can do; it knows until"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": True}, "do_sample needs a temperature above 0"),
        ({"temperature": 1.0, "top_p": 2}, "top_p=2"),
        ({"until": [3]}, r"until=\[3\] must be texts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        generation_settings(settings)


def test_settings_of_a_task_are_taken():
    found = generation_settings({"num_beams": 1, "max_new_tokens": 3, "temperature": 0.5,
                                 "top_k": 7, "until": ["x"]})  # fmt: skip
    assert (found["max_new_tokens"], found["stop_strings"]) == (3, ("x",))
    assert (found["sampler"].temperature, found["sampler"].top_k) == (0.5, 7)
    assert generation_settings({})["max_new_tokens"] == 256


def test_a_template_is_named_and_recorded(subject, plain_subject, params):
    model = HarnessModel(subject, params)
    other = HarnessModel(dataclasses.replace(subject, template=TEMPLATES["plain"]), params)
    assert json.loads(model.chat_template(True)) == {"name": "chatml"}
    assert model.chat_template(False) == "" and model.tokenizer_name != other.tokenizer_name
    with pytest.raises(UserError, match="has one of its own"):
        model.chat_template("tool_use")
    with pytest.raises(UserError, match="the model has no chat template"):
        run_harness(plain_subject, params, ["chosen"], apply_chat_template=True)


def test_tasks_that_cannot_be_had_are_told(folder, plain_subject, params):
    def told(task, text=None):
        if text is not None:
            (folder / f"{task}.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            run_harness(plain_subject, params, [task], include_path=str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    said = told("remote")
    assert (
        "--tasks=remote needs the network for the data set somebody/some_questions (hard)" in said
    )
    assert "dataset_path: json" in said
    group = "group: several\ntask:\n  - chosen\n  - task: remote\n    num_fewshot: 1\n"
    assert "the data set somebody/some_questions (hard)" in told("several", group)
    easy = REMOTE.replace("remote", "easy").replace("hard", "easy")
    (folder / "easy.yaml").write_text(easy)
    group = "group: both\ntask: [remote, easy]\n"
    assert "the data set somebody/some_questions (hard and 1 more)" in told("both", group)
    broken = CHOSEN.replace("task: chosen", "task: broken") % {"folder": folder / "nowhere"}
    assert "cannot be loaded: FileNotFoundError" in told("broken", broken)
    assert "questions.jsonl" in told("broken")
    unsafe = CHOSEN.replace("task: chosen", "task: unsafe\nunsafe_code: true")
    assert "'unsafe' would run what the model writes" in told("unsafe", unsafe % {"folder": folder})
