"""Fixtures: simulated devices, a compile cache that outlives the session, tiny texts and runs, and
a fake endpoint."""

import dataclasses
import http.server
import json
import os
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax import config as config_module
from llm_jax import run
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.corpus import DataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.metrics import MetricsConfig
from llm_jax.models.config import ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig

DEVICES = 8
MEMORY_MAPS = 20_000

# Subprocesses inherit the variables, so they compile into and out of the same cache.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/llm_jax/compiled-by-tests").expanduser())
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Every simulated device may wait in several collectives at once, and each wait holds a thread: with
# as few as a small machine has cores, no thread would be left for the device that is waited for.
os.environ.setdefault("NPROC", str(8 * DEVICES))
# On a machine that is busy, or put to sleep meanwhile, devices may keep each other waiting for
# longer than the 40 seconds after which XLA takes that for a deadlock and aborts.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
# A test runs its programs a few times on tiny shapes, so the compiler takes most of the time, and
# four times as long with the passes that make them fast and the emitters that make fusions so.
QUICKLY = "--xla_cpu_use_fusion_emitters=false"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE} {QUICKLY}".strip()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Every compiled program holds memory maps, and a process that has more than Linux allows
    (65,530 as a rule) is killed; so programs are forgotten in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture
def optimised():
    """Programs are compiled as they are for users: for tests of programs that differ and are to
    round alike."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Token stores of this session; the user's own cache is neither read nor filled."""
    folder = tmp_path_factory.mktemp("cache")
    with mock.patch.dict(os.environ, LLM_JAX_CACHE=str(folder)):
        yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """About 100 KB of text in 60 documents, in which some words follow others more often."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("<|endoftext|>".join(babble(seed) for seed in range(60)))
    return path


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory):
    """A second, smaller corpus, for mixtures."""
    path = tmp_path_factory.mktemp("corpus") / "other.txt"
    path.write_text("<|endoftext|>".join(babble(seed, words=100) for seed in range(100, 120)))
    return path


def babble(seed, words=260):
    """Made-up prose: each word is one of the three that may follow the word before."""
    random = np.random.default_rng(seed)
    syllables = ("ka", "lo", "mi", "ne", "ru", "sha", "ti", "vo")
    vocabulary = [a + b for a in syllables for b in syllables]
    word, text = 0, []
    for _ in range(words):
        word = (5 * word + int(random.integers(3)) + 1) % len(vocabulary)
        text.append(vocabulary[word])
    return " ".join(text) + ".\n"


@pytest.fixture(scope="session")
def tiny_config(corpus):
    """`tiny_config(**sections)`: a PretrainConfig that trains in seconds, as a ConfigDict."""

    def make(**sections):
        settings = {
            "model": ModelConfig(
                embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=128
            ),
            "tokenizer": TokenizerConfig(path="bytes"),
            "data": DataConfig(source=str(corpus), validation_fraction=0.1),
            "phases": (PhaseConfig(length=32, batch=8, steps=6),),
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
            "evaluation": PretrainEvaluationConfig(every=1000, rows=8),
            "checkpoint": CheckpointConfig(every=2),
            "metrics": MetricsConfig(every=1, tensorboard=False),
            "sample": SampleConfig(max_new_tokens=0),
        }
        return config_module.defaults(PretrainConfig, **{**settings, **sections})

    return make


@pytest.fixture(scope="session")
def run_on():
    """`run_on(devices, config, workdir)`: run.run on the first so many of the devices."""

    def start(devices, config, workdir):
        def make_mesh(mesh_config):
            return real(mesh_config, jax.devices()[:devices])

        real = run.make_mesh
        with mock.patch.object(run, "make_mesh", make_mesh):
            return run.run(config, workdir)

    return start


@dataclasses.dataclass
class Chat:
    """A chat completion that was asked for."""

    body: dict
    key: str


@pytest.fixture
def endpoint():
    """A server at `endpoint.url`: `endpoint.says(body)` gives its answer to a request, a text or a
    (status, error); `endpoint.asked` are the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(Chat(body, self.headers["Authorization"]))
            answer, status = server.says(body), 200
            if isinstance(answer, tuple):
                status, reason = answer
                content = {"error": {"message": reason}}
            else:
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "message": message, "finish_reason": server.reason}
                content = {"id": "x", "object": "chat.completion", "created": 0,
                           "model": body["model"], "choices": [choice]}  # fmt: skip
            data = json.dumps(content).encode()
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.asked, server.reason = [], "stop"
    server.handle_error = lambda *arguments: None  # a client that did not wait
    server.says = lambda body: "fine"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
