"""The model files against what is published about the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from placement.candidate import simulated_device
from placement.catalogue import CONFIGS, Checkpoint, ModelSpec
from placement.errors import UnknownName
from placement.kv_cache import kv_bytes_per_token
from placement.memory import memory_use
from placement.parameters import count_parameters
from placement.weight_bytes import checkpoint_bytes
from tests.placement.builders import CATALOGUE, a_candidate

MODELS = {name: model for name, model in CATALOGUE.models.items() if not name.startswith("nano-")}
GPUS = [gpu for gpu in CATALOGUE.gpus.values() if gpu.compute_capability is not None]
GGUF = "gguf"

# Billions of parameters of the language model, and of vision tower and projector: counted on the
# Hugging Face classes on the meta device, or by the same formulas where no class exists. Then the
# elements that one token takes in the KV cache of all layers.
COUNTED = {
    "mistral-7b-v0.1": (7.242, 0.0, 65536),
    "mistral-7b-v0.2": (7.242, 0.0, 65536),
    "mistral-7b-v0.3": (7.248, 0.0, 65536),
    "mathstral-7b": (7.248, 0.0, 65536),
    "mixtral-8x7b": (46.703, 0.0, 65536),
    "mixtral-8x22b-v0.1": (140.621, 0.0, 114688),
    "mixtral-8x22b-instruct-v0.1-v0.3": (140.630, 0.0, 114688),
    "codestral-22b": (22.247, 0.0, 114688),
    "mistral-small-2409": (22.247, 0.0, 114688),
    "mistral-nemo-12b": (12.248, 0.0, 81920),
    "ministral-8b-2410": (8.020, 0.0, 73728),
    "mistral-large-2407": (122.610, 0.0, 180224),
    "mistral-large-2411": (122.610, 0.0, 180224),
    "pixtral-12b-2409": (12.248, 0.435, 81920),
    "pixtral-large-2411": (122.610, 1.525, 180224),
    "mistral-small-3-24b-2501": (23.572, 0.0, 81920),
    "mistral-small-3.1-24b-2503": (23.572, 0.439, 81920),
    "mistral-small-3.2-24b-2506": (23.572, 0.439, 81920),
    "magistral-small-2506-2507": (23.572, 0.0, 81920),
    "magistral-small-2509": (23.572, 0.439, 81920),
    "devstral-small-2505-2507": (23.572, 0.0, 81920),
    "devstral-small-2-24b-2512": (23.572, 0.439, 81920),
    "devstral-2-123b-2512": (125.026, 0.0, 180224),
    "ministral-3-3b-2512": (3.429, 0.420, 53248),
    "ministral-3-8b-2512": (8.490, 0.428, 69632),
    "ministral-3-14b-2512": (13.506, 0.439, 81920),
    "mistral-large-3-675b-2512": (673.421, 2.570, 35136),
    "mistral-large-3-eagle": (11.653, 0.0, 576),
    "mistral-small-4-119b-2603": (118.973, 0.428, 11520),  # the tower is a guess
    "mistral-medium-3.5-128b": (125.026, 2.678, 180224),
    # Counted with an indexer in one layer of four it has 1048.677 B, and 38,016 elements: nine
    # layers without a latent of their own, every fourth without a rotary part.
    "mistral-large-4-1t-a52b": (1048.204, 1.704, 41472),
}

EXACT = {
    "mistral-7b-v0.1": 7_241_732_096,  # half of the index file's total_size
    "mixtral-8x7b": 46_702_792_704,  # the same
    "ministral-8b-2410": 8_019_808_256,  # the model card
    "mistral-small-3-24b-2501": 23_572_403_200,  # a quarter of its FP32 file
}

# Published totals that neither round to ours nor come within 0.1 %.
OTHER_TOTALS = {
    "mistral-7b-v0.1": "announced as 7.3 B; the index file has 7.24",
    "mistral-7b-v0.2": "as v0.1",
    "mistral-7b-v0.3": "as v0.1, with 6 M for a larger vocabulary",
    "mathstral-7b": "as v0.3",
    "pixtral-12b-2409": "12 B is the text decoder, rounded; the tower has 0.43",
    "devstral-2-123b-2512": "123 B is Large 2's; the vocabulary is four times as large: 2.4 B more",
    "ministral-3-8b-2512": "8.4 + 0.4 B are cut, not rounded: 8.49 + 0.43",
}
OTHER_ACTIVE = {
    "mixtral-8x7b": "12.9 B with the input embedding, which we leave out: 12.75",
    "mistral-large-3-675b-2512": "41 B is 39 + 2.5, cut; counted 39.0 + 2.57",
}

IMPORTANCE = "1 to 3 bits use an importance matrix; their mix of formats is not in gguf_mix.py"
DYNAMIC = "unsloth chooses formats tensor by tensor"
OLD_MIXTRAL = "a file of 2023 with less mixing of formats; later ones have 28.4 GB"
# Sizes of files that are further than 1 % from arithmetic: the most they differ, in %, and why.
OTHER_SIZES = {
    ("ministral-3-14b-2512", "iq1_s"): (2.0, DYNAMIC),
    ("ministral-3-14b-2512", "iq1_m"): (2.0, DYNAMIC),
    ("mistral-7b-v0.3", "iq1_m"): (10.0, IMPORTANCE),
    ("mistral-large-2407", "iq2_m"): (7.5, IMPORTANCE),
    ("mistral-large-2407", "iq3_xxs"): (6.0, IMPORTANCE),
    ("mistral-large-2407", "iq3_m"): (4.5, IMPORTANCE),
    ("mistral-large-4-1t-a52b", "iq1_s"): (15.5, DYNAMIC),
    ("mistral-small-4-119b-2603", "q4_k_m"): (2.5, DYNAMIC),
    ("mistral-small-4-119b-2603", "q6_k"): (2.0, DYNAMIC),
    ("mixtral-8x7b", "q4_k_m"): (8.0, OLD_MIXTRAL),
    ("mixtral-8x7b", "q5_k_m"): (3.5, OLD_MIXTRAL),
}

UNPLANNABLE = (
    "codestral-mamba-7b",
    "voxtral-mini-3b-2507",
    "voxtral-small-24b-2507",
    "voxtral-mini-4b-realtime-2602",
    "leanstral",
    "shieldstral-1.0-3b",
)

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)


def _without_tower(model: ModelSpec) -> ModelSpec:
    """A GGUF file holds the language model; the tower is a file of its own."""
    return model.model_copy(
        update={"architecture": model.architecture.model_copy(update={"vision": None})}
    )


def _computed_bytes(model: ModelSpec, checkpoint: Checkpoint) -> int:
    if checkpoint.format == GGUF:
        model = _without_tower(model)
    return checkpoint_bytes(model.architecture, checkpoint.model_copy(update={"size_bytes": None}))


def _rounds_to(count: int, published: int) -> bool:
    """Whether `count` gives `published` at the digits that are published."""
    digits = len(str(published).rstrip("0"))
    return round(count, digits - len(str(count))) == published


def test_every_model_whose_architecture_is_known_is_there_and_no_other() -> None:
    assert set(MODELS) == set(COUNTED)


@every_model
def test_a_file_is_called_like_its_model(model: ModelSpec) -> None:
    assert (CONFIGS / "models" / f"{model.name}.yaml").is_file()


@pytest.mark.parametrize("name", UNPLANNABLE)
def test_a_model_that_cannot_be_planned_is_unknown(name: str) -> None:
    with pytest.raises(UnknownName):
        CATALOGUE.model(name)


def test_the_readme_says_why_the_others_are_missing() -> None:
    rows = (CONFIGS / "models" / "README.md").read_text(encoding="utf-8").splitlines()

    assert sum(row.startswith("| ") and "`mistralai/" in row for row in rows) == len(UNPLANNABLE)


@every_model
def test_parameters_are_those_of_the_hugging_face_class(model: ModelSpec) -> None:
    language, vision, _ = COUNTED[model.name]

    parameters = count_parameters(model.architecture)

    assert round(parameters.language / 1e9, 3) == language
    assert round(parameters.vision / 1e9, 3) == vision


@pytest.mark.parametrize(("name", "total"), EXACT.items())
def test_parameters_are_exact_where_a_source_is(name: str, total: int) -> None:
    assert count_parameters(MODELS[name].architecture).total == total


@every_model
def test_parameters_are_the_published_ones_or_the_difference_is_explained(model: ModelSpec) -> None:
    total, published = count_parameters(model.architecture).total, model.published_parameters

    assert published is not None
    agrees = _rounds_to(total, published) or total == pytest.approx(published, rel=1e-3)
    assert agrees != (model.name in OTHER_TOTALS)
    assert total == pytest.approx(published, rel=0.06)


@every_model
def test_active_parameters_of_a_mixture_are_the_published_ones(model: ModelSpec) -> None:
    published = model.published_active_parameters
    if published is None:
        assert model.architecture.moe is None or model.architecture.is_draft
        return
    active = count_parameters(model.architecture).active

    assert _rounds_to(active, published) != (model.name in OTHER_ACTIVE)
    assert active == pytest.approx(published, rel=0.015)


@every_model
def test_a_token_takes_its_layers_keys_and_values(model: ModelSpec) -> None:
    per_token = kv_bytes_per_token(model.architecture, tensor_parallel_size=1, element_bytes=1)

    assert per_token == COUNTED[model.name][2]


@every_model
def test_file_sizes_follow_from_the_architecture_or_the_difference_is_explained(
    model: ModelSpec,
) -> None:
    for checkpoint in model.checkpoints:
        if checkpoint.size_bytes is None:
            continue
        percent, _reason = OTHER_SIZES.get((model.name, checkpoint.precision), (1.0, ""))

        computed = _computed_bytes(model, checkpoint)

        assert checkpoint.size_bytes == pytest.approx(computed, rel=percent / 100)


def test_no_file_of_hugging_face_or_mistral_needs_an_explanation() -> None:
    for name, precision in OTHER_SIZES:
        found = [entry for entry in MODELS[name].checkpoints if entry.precision == precision]
        assert [entry.format for entry in found] == [GGUF]


@every_model
def test_a_name_leads_to_its_model_in_any_case(model: ModelSpec) -> None:
    for name in (model.name, *model.aliases):
        assert CATALOGUE.model(name.upper()) is model


def test_no_two_models_answer_to_a_name() -> None:
    names = [name.lower() for model in MODELS.values() for name in (model.name, *model.aliases)]

    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("mistral-large-3", "mistral-large-3-675b-2512"),
        ("mistral-large-4", "mistral-large-4-1t-a52b"),
        ("mistral-small-3.2", "mistral-small-3.2-24b-2506"),
        ("mistral-small-4", "mistral-small-4-119b-2603"),
        ("mistral-medium-3.5", "mistral-medium-3.5-128b"),
        ("mixtral-8x22b", "mixtral-8x22b-instruct-v0.1-v0.3"),
        ("devstral-2", "devstral-2-123b-2512"),
        ("devstral-small-2", "devstral-small-2-24b-2512"),
        ("ministral-3-14b", "ministral-3-14b-2512"),
        ("pixtral-12b", "pixtral-12b-2409"),
        ("mistral-7b", "mistral-7b-v0.3"),
        ("mistralai/Devstral-2-123B-Instruct-2512", "devstral-2-123b-2512"),
    ],
)
def test_short_names_and_repositories_resolve(short: str, name: str) -> None:
    assert CATALOGUE.model(short).name == name


@pytest.mark.parametrize("name", ["ministral-8b", "mistral-small", "magistral-small", "mistral"])
def test_names_that_two_models_could_claim_belong_to_none(name: str) -> None:
    with pytest.raises(UnknownName):
        CATALOGUE.model(name)


@every_model
def test_the_first_checkpoint_is_the_vendors_and_its_repository_an_alias(model: ModelSpec) -> None:
    first = model.checkpoints[0]

    assert first.source.startswith("mistralai/")
    assert first.source in model.aliases


@every_model
def test_weights_of_others_are_marked(model: ModelSpec) -> None:
    for checkpoint in model.checkpoints:
        assert checkpoint.third_party != checkpoint.source.startswith("mistralai/")


@every_model
def test_other_weights_of_the_shape_are_no_aliases(model: ModelSpec) -> None:
    for repository in model.same_shape:
        with pytest.raises(UnknownName):
            CATALOGUE.model(repository)


@every_model
def test_flags_of_the_native_layout_stand_with_native_checkpoints_only(model: ModelSpec) -> None:
    assert not {"--load-format", "--config-format"} & set(model.engine_args)
    for checkpoint in model.checkpoints:
        assert ("--load-format" in checkpoint.engine_args) == (checkpoint.format == "mistral")


@every_model
def test_flags_follow_from_what_the_model_can_do(model: ModelSpec) -> None:
    assert ("--tool-call-parser" in model.engine_args) == ("tools" in model.capabilities)
    assert ("--reasoning-parser" in model.engine_args) == ("reasoning" in model.capabilities)
    assert ("vision" in model.capabilities) == (model.architecture.vision is not None)


@every_model
def test_what_is_known_is_said_with_its_source(model: ModelSpec) -> None:
    assert model.sources
    assert model.licence
    assert model.tokenizer
    assert model.released is not None
    assert model.status is not None
    assert model.context <= model.architecture.max_position
    assert not model.architecture_is_guess or "not read" in model.note


def test_the_guessed_architectures_are_marked() -> None:
    guessed = {model.name for model in MODELS.values() if model.architecture_is_guess}

    assert guessed == {
        "magistral-small-2506-2507",
        "magistral-small-2509",
        "devstral-small-2505-2507",
    }


def test_ministral_8b_sees_everything_in_every_fourth_layer() -> None:
    architecture = MODELS["ministral-8b-2410"].architecture

    assert (architecture.full_attention_layers, architecture.num_layers) == (9, 36)
    assert architecture.sliding_window == 32768


def test_a_draft_has_no_vocabulary_of_its_own() -> None:
    parameters = count_parameters(MODELS["mistral-large-3-eagle"].architecture)

    assert parameters.embedding == parameters.head == 0
    assert parameters.feed_forward == 2 * 7168**2  # merges a token with its target's hidden state


def test_large_4_projects_queries_directly() -> None:
    architecture = MODELS["mistral-large-4-1t-a52b"].architecture
    per_layer = (
        6144 * 64 * 128  # q
        + 6144 * (512 + 64)  # kv_a
        + 512 * 64 * (64 + 128)  # kv_b
        + 64 * 128 * 6144  # o
    )

    assert count_parameters(architecture).attention == 72 * per_layer


@every_model
def test_every_checkpoint_on_every_gpu_has_a_memory_split_without_negative_numbers(
    model: ModelSpec,
) -> None:
    for checkpoint in model.checkpoints:
        for gpu in GPUS:
            for ranks in (1, 8):
                candidate = a_candidate(
                    model,
                    checkpoint=checkpoint,
                    device=simulated_device(gpu),
                    tensor_parallel_size=ranks,
                    max_model_len=min(model.context, 32768),
                )

                use = memory_use(candidate)

                parts = use.per_gpu.model_dump()
                assert all(size >= 0 for size in parts.values())
                total = parts.pop("total_bytes")
                assert use.missing_bytes > 0 or sum(parts.values()) <= total
                assert use.kv.tokens >= 0


def test_keys_stand_in_one_order() -> None:
    order = [
        "name", "title", "aliases", "released", "status", "licence", "tokenizer",
        "published_parameters", "published_active_parameters", "context", "capabilities",
        "architecture_is_guess", "architecture", "checkpoints", "same_shape", "drafts",
        "loaded_by", "engine_args", "vendor_figures", "note", "sources",
    ]  # fmt: skip
    for name in MODELS:
        keys = list(_document(CONFIGS / "models" / f"{name}.yaml"))
        assert keys == [key for key in order if key in keys]


def _document(path: Path) -> dict[str, object]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document
