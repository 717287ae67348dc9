from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from placement.catalogue import GpuType
from placement.errors import ConfigError
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.routing_policy import RoutingPolicy
from placement.spec import Spec, dump_yaml, load_yaml, parse_yaml, place

GOOD = """\
fleet: demo
models:
  - name: chat
    model: mixtral
    replicas: {min: 0, max: 2}
"""


def complaints(text: str, spec: type[Spec] = FleetSpec) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, spec, source="f.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("replicas", "replica"),
            "f.yaml:5: models[0].replica: unknown key; did you mean 'replicas'?",
        ),
        (
            GOOD.replace("max: 2", "max: two"),
            "f.yaml:5: models[0].replicas.max: input should be a valid integer, got 'two'",
        ),
        (
            GOOD.replace("    model: mixtral\n", ""),
            "f.yaml:3: models[0].model: required, but missing",
        ),
        (
            GOOD + "fleet: again\n",
            "f.yaml:6: fleet: the key stands twice (first on line 1)",
        ),
        (
            GOOD.replace("min: 0", "min: 3"),
            "f.yaml:5: models[0].replicas: min (3) is more than max (2)",
        ),
        (
            GOOD + "    engine_args: [--max-model-len=4096]\n",
            (
                "f.yaml:6: models[0].engine_args: --max-model-len=4096 would contradict the plan; "
                "use max_model_len"
            ),
        ),
        (
            GOOD + "    precision: [bf16, fp9]\n",
            "f.yaml:6: models[0].precision[1]: 'fp9' is not known; did you mean 'fp8'?",
        ),
        (
            GOOD + "    precision: fp8\n",
            "f.yaml:6: models[0].precision: input should be 'any' or a list, got 'fp8'; write [fp8]",
        ),
        (
            GOOD + "    precision: []\n",
            "f.yaml:6: models[0].precision: input should be 'any' or a list with at least one entry",
        ),
        (
            GOOD + "    pools: []\n",
            "f.yaml:6: models[0].pools: input should be a list with at least one entry",
        ),
        (
            GOOD + "    pools: h100\n",
            "f.yaml:6: models[0].pools: input should be a list, got 'h100'; write [h100]",
        ),
        (
            GOOD + "    slo: fast\n",
            "f.yaml:6: models[0].slo: input should be a mapping (`key: value`), got 'fast'",
        ),
        (
            GOOD + "    slo: {tpot_p95_ms: 50ms}\n",
            (
                "f.yaml:6: models[0].slo.tpot_p95_ms: input should be a valid number, got '50ms'; "
                "write the number alone, without a unit"
            ),
        ),
        (
            GOOD + "    max_model_len: '4096'\n",
            (
                "f.yaml:6: models[0].max_model_len: input should be a valid integer, got '4096'; "
                "write it without quotes"
            ),
        ),
        (
            GOOD + "    max_model_len: 4096.0\n",
            (
                "f.yaml:6: models[0].max_model_len: input should be a valid integer, got 4096.0; "
                "write 4096"
            ),
        ),
        (
            GOOD.replace("chat", "42"),
            (
                "f.yaml:3: models[0].name: input should be a valid string, got 42; "
                'in quotes it is text: "42"'
            ),
        ),
        (
            GOOD.replace("min: 0, max: 2", "min: 3"),
            "f.yaml:5: models[0].replicas.min: 3 is more than max, which is 1 unless given; give it",
        ),
        (
            GOOD + "    demand: {requests_per_s: 1, input_tokens: {mean: 900, p95: 90}}\n",
            (
                "f.yaml:6: models[0].demand.input_tokens.p95: 90 tokens are fewer than the mean of "
                "900; give more, or leave p95 out"
            ),
        ),
        (
            GOOD + "    max_model_len: 512\n    demand: {requests_per_s: 1}\n",
            (
                "f.yaml:6: models[0].max_model_len: 512 tokens are fewer than a usual request of the "
                "demand has, prompt and answer: 640; give more, or shorter input_tokens and "
                "output_tokens"
            ),
        ),
        (
            GOOD + "\tobjective: cost\n",
            (
                "f.yaml:6: not valid YAML: found character '\\t' that cannot start any token; "
                "indent with spaces, YAML takes no tabs"
            ),
        ),
        (
            GOOD + "    engine: simm\n",
            (
                "f.yaml:6: models[0].engine: input should be 'vllm', 'llamacpp' or 'sim', got 'simm'; "
                "did you mean 'sim'?"
            ),
        ),
        (
            GOOD + "    demand: {requests_per_s: .inf}\n",
            ("f.yaml:6: models[0].demand.requests_per_s: input should be a finite number, got inf"),
        ),
        (
            GOOD + "    simulate_gpu: H100-SXM\n",
            (
                "f.yaml:3: models[0]: simulate_gpu: H100-SXM means nothing to engine 'vllm'; "
                "add `engine: sim`, or leave it out"
            ),
        ),
        (
            GOOD + "gateway: {http_port: 8001}\n",
            (
                "f.yaml:6: gateway: http_port and grpc_port are both 8001; "
                "each needs a port of its own"
            ),
        ),
        ("", "f.yaml: the file is empty"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_key_and_what_was_expected(
    text: str, expected: str
) -> None:
    assert complaints(text) == [expected]


def test_a_wrong_item_does_not_also_make_its_list_too_short() -> None:
    (line,) = complaints("pools:\n  - {name: a, gpu: H100}\n", Inventory)

    assert line == "f.yaml:2: pools[0].gpus_per_node: required, but missing"


def test_an_empty_list_is_still_too_short() -> None:
    (line,) = complaints("pools: []\n", Inventory)

    assert line == "f.yaml:1: pools: input should be a list with at least one entry"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("{name: a, gpu: L4, gpus_per_node: 1}", ":3: pools[1].name: two pools are called 'a'"),
        (
            "{name: b, gpu: L4, gpus_per_node: 1, node_names: [a-0]}",
            ":3: pools[1].node_names[0]: two nodes are called 'a-0', this one and one of pool a",
        ),
        (
            "{name: b, gpu: L4, gpus_per_node: 1, nodes: 2, node_names: [x]}",
            ":3: pools[1].node_names: 1 names for 2 nodes; give a name for each",
        ),
        (
            "{name: b, gpu: L4, gpus_per_node: 1, nodes: 99999999999}",
            ":3: pools[1].nodes: input should be less than or equal to 100000",
        ),
    ],
)
def test_a_mistake_in_an_inventory_is_told_where_it_stands(second: str, expected: str) -> None:
    first = "pools:\n  - {name: a, gpu: L4, gpus_per_node: 1}\n"

    (line,) = complaints(f"{first}  - {second}\n", Inventory)

    assert line.startswith(f"f.yaml{expected}")


def test_every_mistake_is_told_at_once() -> None:
    lines = complaints(GOOD.replace("max: 2", "max: 0, step: 1"))

    assert [line.split(": ")[1] for line in lines] == [
        "models[0].replicas.max",
        "models[0].replicas.step",
    ]


def test_broken_yaml_names_its_line() -> None:
    (line,) = complaints("fleet: [demo\nmodels: {}\n")

    assert line.startswith("f.yaml:2: not valid YAML:")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load_yaml(tmp_path / "gone.yaml", FleetSpec)


def test_what_is_no_text_file_is_said(tmp_path: Path) -> None:
    binary = tmp_path / "fleet.yaml"
    binary.write_bytes(b"fleet: \xff\xfe")

    with pytest.raises(ConfigError, match=r"fleet\.yaml: is no text in UTF-8 \(byte 0xff at 7\)"):
        load_yaml(binary, FleetSpec)
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_yaml(tmp_path, FleetSpec)


def test_two_models_may_not_answer_to_one_name() -> None:
    twice = GOOD + "  - {name: other, model: mixtral, aliases: [chat]}\n"

    (line,) = complaints(twice)

    assert line.startswith("f.yaml:6: models[1].aliases[0]: two models of the fleet answer to the")
    assert "'chat', this one and models[0]" in line


def test_a_model_falls_back_to_another_model_of_the_fleet() -> None:
    text = GOOD + "  - {name: other, model: mixtral, fallback: [NAME]}\n"

    assert parse_yaml(text.replace("NAME", "chat"), FleetSpec, source="f.yaml")
    for name in ("other", "chatt"):
        told = complaints(text.replace("NAME", name))[0]
        assert told.startswith("f.yaml:6: models[1].fallback[0]: other: fallback ")
        assert f"'{name}' is no other model of the fleet" in told


def test_a_model_says_how_its_requests_are_spread() -> None:
    text = GOOD + "  - {name: other, model: mixtral, routing: {policy: session, weights: {v: 2}}}\n"

    other = parse_yaml(text, FleetSpec, source="f.yaml").models[-1]

    assert other.routing == RoutingPolicy(policy="session", weights={"v": 2})


def test_a_cpu_pool_must_say_how_much_memory_a_slot_has() -> None:
    text = "pools:\n  - {name: a, gpu: cpu, gpus_per_node: 2}\n"

    assert "memory_gib_per_gpu and kv_cache_gib_per_gpu" in complaints(text, Inventory)[0]


def test_what_is_written_reads_back() -> None:
    fleet = parse_yaml(GOOD, FleetSpec, source="f.yaml")

    assert parse_yaml(dump_yaml(fleet), FleetSpec, source="again") == fleet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fleet: 2020-13-45", ":1: fleet: '2020-13-45' is not a valid timestamp; in quotes it"),
        ("a: 1\nfleet: " + "7" * 5000, ":2: fleet: '" + "7" * 40 + "...' is not a valid int;"),
        ("fleet: " + "7" * 100, ":1: fleet: a number of more than 64 bits"),
        ("fleet: &a\n  - *a", ":1: fleet[0]: an alias that contains itself"),
        ("fleet: &a {<<: *a}", ":1: fleet.<<: an alias that contains itself"),
        ("a:\n  - " + "[" * 101, ":2: nested more than 100 levels deep"),
        ("[" * 3000, ":1: nested more than 100 levels deep"),
        ("[" * 50_000 + "]" * 50_000, ":1: nested more than 100 levels deep"),
        ("- " * 50_000 + "x", ":1: nested more than 100 levels deep"),
        ("[" * 120 + "]" * 120, "levels deep"),
        ("fleet: !!python/object:os.system x", ":1: fleet: the tag "),
        ("fleet: !!set {a, b}", ":1: fleet: the tag "),
        ("fleet: !!bool x", ":1: fleet: 'x' is not a valid bool"),
        ("a: 1\n[x]: 2", ":2: document: a key must be a single word"),
        ("a: 1\nb: \0", ":2: not valid YAML: a character that YAML does not allow"),
        ('fleet: "\\UFFFFFFFF"', ":1: not valid YAML"),
        ('fleet: "\\ud800"', ":1: fleet: half of a surrogate pair"),
        ("fleet: \ud800", ":1: not valid YAML"),
        ("fleet: {<<: 5}", ":1: fleet.<<: expects a mapping"),
    ],
)
def test_odd_yaml_is_refused_at_its_line(text: str, expected: str) -> None:
    (line,) = complaints(text)

    assert line.startswith("f.yaml:")
    assert expected in line


def test_aliases_that_expand_beyond_measure_are_refused() -> None:
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]

    (line,) = complaints("\n".join(bomb))

    assert "more than 1,000,000 entries" in line


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1.0e+999"])
def test_numbers_are_finite(number: str) -> None:
    pools = (
        f"pools:\n  - name: a\n    gpu: L4\n    gpus_per_node: 1\n    host_memory_gib: {number}\n"
    )

    (line,) = complaints(pools, Inventory)

    assert line.startswith("f.yaml:5: pools[0].host_memory_gib: input should be a finite number")


def test_a_merged_key_is_overridden_and_its_mistakes_are_told_where_they_stand() -> None:
    base = "  - &base {name: chat, model: mixtral, max_num_seqs: -1}\n"
    text = f"fleet: a\nmodels:\n{base}  - {{<<: *base, name: other, max_num_seqs: 4}}\n"

    (line,) = complaints(text)

    assert line.startswith("f.yaml:3: models[0].max_num_seqs: ")
    fleet = parse_yaml(text.replace("-1", "1"), FleetSpec, source="f.yaml")
    assert [model.name for model in fleet.models] == ["chat", "other"]
    assert [model.max_num_seqs for model in fleet.models] == [1, 4]


def test_a_date_is_read_as_one() -> None:
    text = dump_yaml(parse_yaml(GOOD, FleetSpec, source="f")).replace("demo", "2020-12-31")

    assert parse_yaml(text, FleetSpec, source="f").fleet == "2020-12-31"


def test_a_place_is_found_after_reading(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(GOOD + "    pools:\n      - a\n      - b\n")

    assert place(file, "models", 0, "pools", 1) == f"{file}:8: models[0].pools[1]"
    assert place(tmp_path / "gone", "models", 0) == f"{tmp_path / 'gone'}: models[0]"


def test_ports_that_are_both_free_to_choose_are_two() -> None:
    fleet = parse_yaml(GOOD + "gateway: {http_port: 0, grpc_port: 0}\n", FleetSpec, source="f")

    assert fleet.gateway.http_port == fleet.gateway.grpc_port == 0


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=8)
    | st.sampled_from(["fp8", "any", "vllm", "sim", "chat", ".inf", "2020-13-45", "0o9", "<<"])
)
KEYS = st.sampled_from(["fleet", "models", "name", "pools", "gpu", "precision", "slo", "gateway"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS | st.text(max_size=4) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)
PIECES = st.sampled_from(
    [
        *"[]{},:-?&*!|>%@`#'\"\n \t\\0",
        *("&a ", "*a", "<<: ", "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!x "),
        *("- ", ": ", "? ", "\n  ", "fleet", "models", "name", "precision", "gateway", "http_port"),
        *("2020-13-45", "1_0", "0b", "0x", "1:99", "~", ".nan", "null", '"\\x', "--- ", "... "),
    ]
)


def parses_or_is_refused(text: str) -> None:
    for spec in (FleetSpec, Inventory, GpuType):
        with contextlib.suppress(ConfigError):
            parse_yaml(text, spec, source="f.yaml")


@given(st.text())
def test_any_text_is_a_spec_or_a_config_error(text: str) -> None:
    parses_or_is_refused(text)


@given(st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join))
def test_anything_like_yaml_is_a_spec_or_a_config_error(text: str) -> None:
    parses_or_is_refused(text)


@given(VALUES)
def test_any_value_is_a_spec_or_a_config_error(value: object) -> None:
    parses_or_is_refused(yaml.safe_dump(value))


@given(st.integers(0, len(GOOD)), st.integers(0, 6), st.lists(PIECES, max_size=4).map("".join))
def test_a_fleet_with_a_slip_of_the_hand_is_a_spec_or_a_config_error(
    at: int, gone: int, put: str
) -> None:
    parses_or_is_refused(GOOD[:at] + put + GOOD[at + gone :])
