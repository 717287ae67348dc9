"""The GPU files against what was read or measured about the cards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from placement.catalogue import GpuType
from tests.placement.builders import CATALOGUE

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """Figures of one card; None: not known, so the file may only guess and must say so."""

    compute_capability: float
    smi_mib: int
    torch_gib: float | None  # a measurement, no guess
    bandwidth_gb: int | None
    bf16_tflops: float | None
    fp8_tflops: float | None  # 0: no FP8 arithmetic
    fp4_tflops: float | None
    nvlink_gb: int  # per direction; bridges of pairs count only where they are part of the card
    pcie_gb: int | None
    peer_to_peer: bool
    power_w: int
    price: float | None  # USD an hour


CARDS = {
    "RTX-3090": Card(8.6, 24576, 23.58, 936, 71, 0, 0, 56, 32, False, 350, 0.18),
    "RTX-4090": Card(8.9, 24564, 23.516, 1008, 165.2, 330.3, 0, 0, 32, False, 450, 0.29),
    "RTX-5090": Card(12.0, 32607, None, 1792, 209, 419, 1676, 0, 64, False, 575, None),
    "RTX-6000-Ada": Card(8.9, 49140, None, 960, 364, 728, 0, 0, 32, True, 300, None),
    "RTX-PRO-6000": Card(12.0, 97887, None, 1597, None, None, None, 0, 64, True, 600, None),
    "L4": Card(8.9, 23034, None, 300, 121, 242, 0, 0, 32, True, 72, None),
    "A10": Card(8.6, 23028, None, 600, 125, 0, 0, 0, 32, True, 150, None),
    "L40S": Card(8.9, 46068, None, 864, 362, 733, 0, 0, 32, True, 350, 0.94),
    "A100-40-PCIe": Card(8.0, 40960, None, 1555, 312, 0, 0, 0, 32, True, 250, 0.80),
    "A100-40-SXM": Card(8.0, 40960, None, 1555, 312, 0, 0, 300, 32, True, 400, 2.74),
    "A100-80-PCIe": Card(8.0, 81920, 79.15, 1935, 312, 0, 0, 0, 32, True, 300, 1.79),
    "A100-80-SXM": Card(8.0, 81920, 79.25, 2039, 312, 0, 0, 300, 32, True, 400, 1.79),
    "H100-PCIe": Card(9.0, 81559, 79.18, 2000, 756.5, 1513, 0, 0, 64, True, 350, 2.89),
    "H100-SXM": Card(9.0, 81559, 79.18, 3350, 989, 1978, 0, 450, 64, True, 700, 3.99),
    "H100-NVL": Card(9.0, 95830, None, 3938, 835, 1671, 0, 300, 64, True, 400, 3.19),
    "H200-SXM": Card(9.0, 143771, 139.8, 4800, 989, 1978, 0, 450, 64, True, 700, 4.45),
    "B200": Card(10.0, 183359, None, 7700, 2250, 4500, 9000, 900, 64, True, 1000, 5.00),
    "B300": Card(10.3, 275040, None, None, None, None, None, 900, 128, True, 1400, 6.00),
    "GB200": Card(10.0, 189471, None, 8000, 2500, 5000, 10000, 900, None, True, 1200, None),
    "V100-32": Card(7.0, 32768, None, 900, 125, 0, 0, 150, 16, True, 300, None),
}

GUESSED_FLOPS = {"RTX-PRO-6000", "B300"}
GUESSED_BANDWIDTH = {"B300"}

every_card = pytest.mark.parametrize(("name", "card"), CARDS.items(), ids=CARDS.keys())


def test_the_table_has_every_gpu() -> None:
    assert set(CARDS) == {gpu.name for gpu in CATALOGUE.gpus.values()} - {"cpu"}


@every_card
def test_memory_is_what_torch_was_seen_to_report_or_marked_as_a_guess(
    name: str, card: Card
) -> None:
    gpu = CATALOGUE.gpu(name)

    assert gpu.memory_bytes is not None
    assert gpu.memory_is_guess == (card.torch_gib is None)
    if card.torch_gib is not None:
        assert gpu.memory_bytes == pytest.approx(card.torch_gib * GIB, rel=1e-4)


@every_card
def test_torch_sees_a_little_less_than_nvidia_smi(name: str, card: Card) -> None:
    gpu = CATALOGUE.gpu(name)

    assert gpu.nvidia_smi_mib == card.smi_mib
    assert gpu.memory_bytes is not None
    assert 0.95 < gpu.memory_bytes / (card.smi_mib * 2**20) < 1


@every_card
def test_speed_is_the_published_one(name: str, card: Card) -> None:
    gpu = CATALOGUE.gpu(name)

    assert gpu.compute_capability == card.compute_capability
    assert (card.bandwidth_gb is None) == (name in GUESSED_BANDWIDTH)
    assert (card.bf16_tflops is None) == (name in GUESSED_FLOPS)
    if card.bandwidth_gb is not None:
        assert gpu.memory_bandwidth_bytes_per_s == card.bandwidth_gb * 1e9
    if card.bf16_tflops is not None:
        assert gpu.bf16_flops == pytest.approx(card.bf16_tflops * 1e12)
        assert gpu.fp8_flops == pytest.approx((card.fp8_tflops or 0) * 1e12 or None)
        assert gpu.fp4_flops == pytest.approx((card.fp4_tflops or 0) * 1e12 or None)


@every_card
def test_native_formats_follow_from_the_compute_capability(name: str, card: Card) -> None:
    gpu = CATALOGUE.gpu(name)

    assert (gpu.fp8_flops is not None) == (card.compute_capability >= 8.9)
    assert (gpu.fp4_flops is not None) == (card.compute_capability >= 10.0)


@every_card
def test_links_power_and_price_are_the_published_ones(name: str, card: Card) -> None:
    gpu = CATALOGUE.gpu(name)

    assert gpu.nvlink_bytes_per_s == card.nvlink_gb * 1e9
    assert card.pcie_gb is None or gpu.pcie_bytes_per_s == card.pcie_gb * 1e9
    assert gpu.peer_to_peer == card.peer_to_peer
    assert gpu.power_w == card.power_w
    assert gpu.price_per_hour == card.price


@pytest.mark.parametrize("gpu", CATALOGUE.gpus.values(), ids=lambda gpu: gpu.name)
def test_a_price_has_a_source_and_its_absence_is_said(gpu: GpuType) -> None:
    priced = any(source.startswith("price: ") for source in gpu.sources)

    assert gpu.name == "cpu" or priced == (gpu.price_per_hour is not None)
    assert gpu.price_per_hour is not None or "No price known" in gpu.note


@pytest.mark.parametrize("name", sorted(GUESSED_FLOPS | GUESSED_BANDWIDTH))
def test_guessed_speed_is_said_to_be_one(name: str) -> None:
    assert "are guesses" in CATALOGUE.gpu(name).note
