from __future__ import annotations

import pytest

from cluster.weight_files import wanted_files

MISTRALS = (
    "README.md", "SYSTEM_PROMPT.txt", "config.json", "consolidated.safetensors",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "params.json", "tekken.json", "figure.png",
)  # fmt: skip
GGUF = (
    "Model-Q4_K_M-00002-of-00002.gguf", "Model-Q4_K_M-00001-of-00002.gguf", "Model-Q8_0.gguf",
    "mmproj-Q4_K_M.gguf", "README.md",
)  # fmt: skip


def test_of_weights_that_are_there_twice_only_one_form_is_wanted():
    hf = set(wanted_files(MISTRALS, "hf"))
    mistral = set(wanted_files(MISTRALS, "mistral"))

    assert set(MISTRALS) - hf == {"consolidated.safetensors", "figure.png"}
    assert {name for name in set(MISTRALS) - mistral if name.endswith(".safetensors")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("checkpoint_format", ["hf", "mistral"])
def test_the_only_form_is_wanted_whatever_was_asked_for(checkpoint_format):
    only = ["config.json", "consolidated.safetensors"]

    assert wanted_files(only, checkpoint_format) == only


def test_an_adapter_is_wanted_whole():
    files = ["adapter_config.json", "adapter_model.safetensors"]

    assert wanted_files(files, "hf") == files


def test_pickled_weights_are_wanted_only_where_there_are_no_others():
    old = ["config.json", "pytorch_model.bin"]

    assert wanted_files(old, "hf") == old
    assert wanted_files([*old, "model.safetensors"], "hf") == ["config.json", "model.safetensors"]


def test_copies_in_other_folders_and_configurations_without_weights_are_no_checkpoint():
    assert wanted_files(["config.json", "original/consolidated.safetensors"], "hf") == []


@pytest.mark.parametrize(
    ("precision", "files"),
    [("q4_k_m", [GGUF[1], GGUF[0]]), ("q8_0", ["Model-Q8_0.gguf"]), ("q2_k", [])],
)
def test_files_of_a_quantisation_are_told_from_others_and_from_the_vision_tower(precision, files):
    assert wanted_files(GGUF, "gguf", precision) == files


@pytest.mark.parametrize(
    ("precision", "file"),
    [
        ("q2_k", "M-Q2_K.gguf"),
        ("q2_k_l", "M-Q2_K_L.gguf"),
        ("q6_k", "M-Q6_K.gguf"),
        ("q6_k_l", "M-Q6_K_L.gguf"),
        ("fp16", "M-F16.gguf"),
        ("bf16", "M-BF16.gguf"),
        ("fp32", "M.fp32.gguf"),
        ("iq3_xs", "Q/m-iq3_xs-00001-of-00001.gguf"),
    ],
)
def test_a_quantisation_is_told_from_those_whose_names_hold_its_own(precision: str, file: str):
    names = (
        *("M-Q2_K.gguf", "M-Q2_K_L.gguf", "M-UD-Q2_K_XL.gguf", "M-Q6_K.gguf", "M-Q6_K_L.gguf"),
        *("M-F16.gguf", "M-BF16.gguf", "M.fp32.gguf", "Q/m-iq3_xs-00001-of-00001.gguf"),
        *("M-UD-Q6_K_XL.gguf", "M-IQ3_XXS.gguf"),
    )

    assert wanted_files(names, "gguf", precision) == [file]
