import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import cpu_expert_map, cpu_plugin, cpu_weight_report
from cluster.engines.after_import import AfterImport
from cluster.engines.pixtral_without_torchvision import PROCESSOR, TWIN, _Twin


@pytest.fixture
def experts() -> Any:
    class CPUUnquantizedExperts:
        def apply(
            self,
            topk_weights: Any,
            topk_ids: Any,
            expert_map: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            self.seen = (topk_weights, topk_ids)

    module = types.ModuleType("cpu_moe")
    vars(module)["CPUUnquantizedExperts"] = CPUUnquantizedExperts
    cpu_expert_map.map_experts(module)
    cpu_expert_map.map_experts(module)
    return CPUUnquantizedExperts()


def apply(experts: Any, expert_map: list[int] | None, *, on_input: bool = False) -> list[Any]:

    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    ids = torch.tensor([[2, 0], [3, 2]], dtype=torch.int32)
    mapping = expert_map and torch.tensor(expert_map, dtype=torch.int32)
    experts.apply(
        topk_weights=weights,
        topk_ids=ids,
        expert_map=mapping,
        apply_router_weight_on_input=on_input,
    )
    return [seen.tolist() for seen in experts.seen]


def test_ids_become_local_and_experts_of_other_ranks_weigh_nothing(experts: Any) -> None:
    weights, ids = apply(experts, [-1, -1, 0, 1])

    assert weights == [[0.75, 0.0], [0.5, 0.5]]
    assert ids == [[0, 0], [1, 0]]


def test_without_expert_parallelism_nothing_changes(experts: Any) -> None:
    weights, ids = apply(experts, None)

    assert weights == [[0.75, 0.25], [0.5, 0.5]]
    assert ids == [[2, 0], [3, 2]]


def test_weights_that_are_already_in_the_input_cannot_be_taken_back(experts: Any) -> None:
    with pytest.raises(NotImplementedError, match="router weights"):
        apply(experts, [-1, -1, 0, 1], on_input=True)


def hooks_after_register(
    monkeypatch: pytest.MonkeyPatch, version: str, *, on_cpu: bool
) -> list[Any]:
    """The import hooks for the experts that `register` leaves beside such a vLLM."""
    vllm, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    vars(vllm)["__version__"] = version
    vars(platforms)["current_platform"] = types.SimpleNamespace(is_cpu=lambda: on_cpu)
    for module in (vllm, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", before.copy())
    cpu_plugin.register("late_experts", "late_loader")
    cpu_plugin.register("late_experts", "late_loader")
    added = [hook for hook in sys.meta_path if hook not in before]
    return [
        hook
        for hook in added
        if isinstance(hook, AfterImport)
        and hook.changes("late_experts", cpu_expert_map.map_experts)
    ]


def test_fix_waits_for_the_experts_to_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "late_experts.py").write_text(
        "class CPUUnquantizedExperts:\n    def apply(self, expert_map): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    [hook] = hooks_after_register(monkeypatch, "0.32.0", on_cpu=True)
    module = importlib.import_module("late_experts")
    sys.modules.pop("late_experts")

    assert hasattr(module.CPUUnquantizedExperts.apply, "__wrapped__")
    assert hook not in sys.meta_path


def test_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks_after_register(monkeypatch, "0.32.0", on_cpu=False) == []


def test_other_versions_are_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert hooks_after_register(monkeypatch, "0.33.1", on_cpu=True) == []

    assert "0.33.1: left out" in caplog.text


def test_pixtral_takes_the_twin_that_needs_no_torchvision(tmp_path: Path) -> None:
    (tmp_path / TWIN).touch()

    spec = _Twin().find_spec(PROCESSOR, [str(tmp_path)])

    assert spec is not None
    assert (spec.name, spec.origin) == (PROCESSOR, str(tmp_path / TWIN))


def test_other_modules_have_no_twin(tmp_path: Path) -> None:
    (tmp_path / TWIN).touch()

    assert (
        _Twin().find_spec("transformers.models.pixtral.modeling_pixtral", [str(tmp_path)]) is None
    )


def test_bytes_of_the_weights_are_logged_before_they_are_repacked(
    caplog: pytest.LogCaptureFixture,
) -> None:

    loader = types.ModuleType("loader")
    vars(loader)["process_weights_after_loading"] = lambda model: setattr(model, "weight", None)
    cpu_weight_report.report_weights(loader)
    cpu_weight_report.report_weights(loader)
    model = torch.nn.Linear(1024, 2**19, bias=False, dtype=torch.bfloat16, device="meta")

    with caplog.at_level(logging.INFO, logger="vllm.bora"):
        loader.process_weights_after_loading(model)

    assert model.weight is None
    assert [record.getMessage() for record in caplog.records] == [
        "Model loading took 1.000000000 GiB memory (weights of this rank)"
    ]
