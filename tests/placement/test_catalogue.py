from __future__ import annotations

from pathlib import Path

import pytest

from placement.catalogue import GpuType, ModelSpec, load_catalogue
from placement.errors import ConfigError, UnknownName
from placement.weight_bytes import checkpoint_bytes
from tests.placement.builders import CATALOGUE

GPU_TYPES = {
    "RTX-3090", "RTX-4090", "RTX-5090", "RTX-6000-Ada", "RTX-PRO-6000", "L4", "L40S", "A10",
    "V100-32", "A100-40-PCIe", "A100-40-SXM", "A100-80-PCIe", "A100-80-SXM", "H100-PCIe",
    "H100-SXM", "H100-NVL", "H200-SXM", "B200", "B300", "GB200", "cpu",
}  # fmt: skip


def test_every_promised_gpu_type_is_there() -> None:
    assert set(CATALOGUE.gpus) == GPU_TYPES


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("4090", "RTX-4090"),
        ("h100", "H100-SXM"),
        ("a100-80", "A100-80-SXM"),
        ("H200", "H200-SXM"),
        ("H100-80GB-HBM3", "H100-SXM"),
        ("A100-80GB-PCIe", "A100-80-PCIe"),
    ],
)
def test_short_names_and_those_of_nvidia_smi_resolve(alias: str, name: str) -> None:
    assert CATALOGUE.gpu(alias).name == name


def test_a_hugging_face_repo_id_is_an_alias_too() -> None:
    assert CATALOGUE.model("mistralai/Mixtral-8x7B-Instruct-v0.1").name == "mixtral-8x7b"


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'RTX-4090'"):
        CATALOGUE.gpu("RTX-4091")


@pytest.mark.parametrize("gpu", CATALOGUE.gpus.values(), ids=lambda gpu: gpu.name)
def test_a_gpu_type_has_a_source_and_plausible_figures(gpu: GpuType) -> None:
    assert gpu.sources
    assert (gpu.memory_bytes is None) == (gpu.name == "cpu")
    assert gpu.memory_bytes is None or 20e9 < gpu.memory_bytes < 300e9
    assert 0.01e12 < gpu.memory_bandwidth_bytes_per_s < 10e12
    assert gpu.fp8_flops is None or gpu.fp8_flops >= 1.9 * gpu.bf16_flops


@pytest.mark.parametrize(
    "model",
    [model for name, model in CATALOGUE.models.items() if name.startswith("nano-")],
    ids=lambda model: model.name,
)
def test_the_models_made_here_have_the_size_that_follows_from_their_architecture(
    model: ModelSpec,
) -> None:
    """Published models: test_catalogue_models.py."""
    for checkpoint in model.checkpoints:
        computed = checkpoint_bytes(
            model.architecture, checkpoint.model_copy(update={"size_bytes": None})
        )
        assert checkpoint.size_bytes == pytest.approx(computed, rel=0.01)


def test_two_entries_may_not_share_a_name(tmp_path: Path) -> None:
    for folder in ("models", "gpus"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        text = (
            f"name: {name}\ntitle: {name}\naliases: [same]\n"
            "memory_bandwidth_bytes_per_s: 1.0e+12\nbf16_flops: 1.0e+14\n"
        )
        (tmp_path / "gpus" / f"{name}.yaml").write_text(text)

    with pytest.raises(ConfigError, match="b and a both answer to 'same'"):
        load_catalogue(tmp_path)
