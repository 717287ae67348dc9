from __future__ import annotations

import json

import pytest

from cluster.model_headers import remote_subject
from placement.errors import ConfigError
from tests.cluster.fake_hub import a_hub, running_hub
from tests.placement.header_files import a_mistral_gguf, safetensors_bytes
from tests.placement.test_hf_config import MISTRAL

REPO = "org/model"
CONFIG = json.dumps(MISTRAL).encode()
WEIGHTS = safetensors_bytes({"a.weight": ("BF16", (1024, 1024)), "b.weight": ("BF16", (1000,))})
INDEX = json.dumps({"weight_map": {"a.weight": "m-1.safetensors"}}).encode()


def test_sizes_come_from_headers_and_the_weights_stay_where_they_are():
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    with a_hub(REPO, files) as (endpoint, sent):
        subject = remote_subject(REPO, endpoint=endpoint)

    assert subject.from_headers
    assert subject.model.checkpoints[0].size_bytes == 2 * 1024 * 1024 + 2000
    assert subject.model.checkpoints[0].source == REPO
    assert sum(sent) < 10_000


def test_a_revision_has_sizes_of_its_own():
    with running_hub() as hub:
        hub.publish(REPO, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
        smaller = safetensors_bytes({"a.weight": ("BF16", (1000,))})
        hub.publish(REPO, {"config.json": CONFIG, "model.safetensors": smaller}, "half/size")

        subject = remote_subject(REPO, revision="half/size", endpoint=hub.url)

    assert subject.model.checkpoints[0].size_bytes == 2000
    assert subject.model.checkpoints[0].source == REPO


def test_an_index_decides_which_files_count():
    files = {
        "config.json": CONFIG,
        "model.safetensors.index.json": INDEX,
        "m-1.safetensors": WEIGHTS,
        "consolidated.safetensors": WEIGHTS,
    }
    with a_hub(REPO, files) as (endpoint, _):
        subject = remote_subject(REPO, endpoint=endpoint)

    assert subject.model.checkpoints[0].size_bytes == 2 * 1024 * 1024 + 2000


def test_a_quantisation_is_chosen_among_several_gguf_files():
    small, large = a_mistral_gguf(), a_mistral_gguf(layers=4)
    files = {"m-Q4_K_M.gguf": small, "m-Q8_0.gguf": large, "mmproj-F16.gguf": small}
    with a_hub(REPO, files) as (endpoint, _):
        subject = remote_subject(REPO, precision="q8_0", endpoint=endpoint)
        with pytest.raises(ConfigError, match="--precision chooses"):
            remote_subject(REPO, endpoint=endpoint)

    assert subject.model.architecture.num_layers == 4
    assert subject.gguf is not None


def test_a_quantisation_is_looked_for_in_whole_words_of_file_names():
    small, large = a_mistral_gguf(), a_mistral_gguf(layers=4)
    repo = "org/model-Q6_K-GGUF"
    with a_hub(repo, {"m-Q6_K.gguf": large, "m-Q6_K_L.gguf": small}) as (endpoint, _):
        subject = remote_subject(repo, precision="q6_k", endpoint=endpoint)

    assert subject.model.architecture.num_layers == 4


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"config.json": CONFIG, "model.safetensors": WEIGHTS[:-1]}, "truncated"),
        ({"config.json": b"{"}, "not readable as JSON"),
        ({"README.md": b"hello"}, "not one GGUF file but none"),
        ({"config.json": CONFIG, "model.safetensors.index.json": INDEX}, r"names m-1\.safetensors"),
    ],
)
def test_a_damaged_repository_is_refused_with_the_cause(files: dict[str, bytes], cause: str):
    with a_hub(REPO, files) as (endpoint, _), pytest.raises(ConfigError, match=cause):
        remote_subject(REPO, endpoint=endpoint)


def test_a_repository_that_is_not_there_is_refused():
    with (
        a_hub("org/other", {}) as (endpoint, _),
        pytest.raises(ConfigError, match="nor readable as a Hugging Face repository"),
    ):
        remote_subject(REPO, endpoint=endpoint)


def test_a_hub_that_does_not_answer_is_an_error_at_once():
    with pytest.raises(ConfigError, match="nor readable as a Hugging Face repository"):
        remote_subject(REPO, endpoint="http://127.0.0.1:9")
