from unittest import mock

import jax
import pytest

from llm_jax.compilation import use_compilation_cache


@pytest.fixture
def updates(monkeypatch):
    """What is set in jax's config, which itself stays as it is."""
    made = {}
    with mock.patch.object(type(jax.config), "update", lambda self, *pair: made.update([pair])):
        yield made


@pytest.mark.parametrize(
    ("setting", "variable", "folder"),
    [
        ("/a", "/b", "/a"),
        (None, "/b", "/b"),
        (None, "", "/cache/compiled"),
    ],
)
def test_the_folder_is_the_setting_or_the_variable_or_ours(
    updates, monkeypatch, setting, variable, folder
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    monkeypatch.setenv("LLM_JAX_CACHE", "/cache")
    use_compilation_cache(setting)
    assert updates["jax_compilation_cache_dir"] == folder


def test_off_switches_it_off(updates):
    use_compilation_cache("off")
    assert updates == {"jax_enable_compilation_cache": False}
