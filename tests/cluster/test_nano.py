import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors import safe_open
from tokenizers import Tokenizer

from cluster import nano
from cluster.nano.gguf_file import GGUF_MODELS, GGUF_PRECISIONS
from cluster.nano.recipes import RECIPES
from cluster.nano.store import content_version
from cluster.nano.tokenizers import CHAT_TEMPLATE, HF_CONTROL_TOKENS
from cluster.nano.weights import Tensor, write
from placement.catalogue import load_catalogue
from placement.errors import UnknownName
from placement.headers.model_files import local_model
from placement.parameters import count_parameters

EVERY_MODEL = pytest.mark.parametrize("name", nano.NAMES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__")
    return header


def bfloat16_values(path: Path) -> Iterator[npt.NDArray[np.float32]]:
    header = header_of(path)
    start = path.stat().st_size - max(entry["data_offsets"][1] for entry in header.values())
    for entry in header.values():
        begin, end = entry["data_offsets"]
        bits = np.fromfile(path, "<u2", (end - begin) // 2, offset=start + begin)
        yield (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def digest_of(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


@EVERY_MODEL
def test_parameters_on_disk_are_those_of_the_catalogue(name: str, cache: Path) -> None:
    weights = nano.ensure(name, cache) / RECIPES[name].weights_file

    on_disk = sum(int(np.prod(entry["shape"])) for entry in header_of(weights).values())

    model = load_catalogue().model(name)
    assert on_disk == count_parameters(model.architecture).total


@EVERY_MODEL
def test_catalogue_knows_format_and_size_of_the_weight_file(name: str, cache: Path) -> None:
    checkpoint, *gguf = load_catalogue().model(name).checkpoints
    folder = nano.ensure(name, cache)

    assert checkpoint.source == f"nano:{name}"
    assert checkpoint.size_bytes == (folder / RECIPES[name].weights_file).stat().st_size
    params = {"mistral": "params.json", "hf": "config.json"}[checkpoint.format]
    assert (folder / params).exists()
    assert [entry.precision for entry in gguf] == (
        list(GGUF_PRECISIONS) if name in GGUF_MODELS else []
    )


@pytest.mark.parametrize("precision", GGUF_PRECISIONS)
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_file_is_what_the_catalogue_says(name: str, precision: str, cache: Path) -> None:
    checkpoints = {c.precision: c for c in load_catalogue().model(name).checkpoints}
    architecture = load_catalogue().model(name).architecture

    file = nano.ensure_gguf(name, precision, cache)

    model, _ = local_model(file)
    assert model.checkpoints[0].precision == precision
    assert model.checkpoints[0].size_bytes == checkpoints[precision].size_bytes
    assert checkpoints[precision].source == f"nano:{name}/{precision}.gguf"
    told = {"sliding_window": None, "intermediate_size": model.architecture.intermediate_size}
    assert model.architecture == architecture.model_copy(update=told)


def test_gguf_file_is_the_same_bytes_each_time(cache: Path, tmp_path: Path) -> None:
    first = nano.ensure_gguf("nano-7b", "fp16", cache)
    second = nano.ensure_gguf("nano-7b", "fp16", tmp_path)

    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_a_nano_model_without_a_gguf_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nano-7b"):
        nano.ensure_gguf("nano-large-3", "fp16", tmp_path)
    with pytest.raises(UnknownName, match="q8_0"):
        nano.ensure_gguf("nano-7b", "q8_1", tmp_path)


@EVERY_MODEL
def test_safetensors_reads_the_weights(name: str, cache: Path) -> None:
    path = nano.ensure(name, cache) / RECIPES[name].weights_file

    with safe_open(path, "np") as weights:
        names = set(weights.keys())

    assert names == set(header_of(path))


@EVERY_MODEL
def test_same_bytes_wherever_it_is_made(name: str, cache: Path, tmp_path: Path) -> None:
    assert digest_of(nano.ensure(name, cache)) == digest_of(nano.ensure(name, tmp_path))


def test_what_is_there_is_not_written_again(cache: Path) -> None:
    told: list[str] = []
    nano.ensure("nano-7b", cache)

    nano.ensure("nano-7b", cache, progress=told.append)

    assert told == []


def test_progress_is_told_when_a_model_is_written(tmp_path: Path) -> None:
    told: list[str] = []

    folder = nano.ensure("nano-7b", tmp_path, progress=told.append)

    assert told == [f"writing nano-7b to {folder}"]


def test_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BORA_CACHE", str(tmp_path))

    folder = nano.ensure("nano-7b")

    assert folder == tmp_path / "nano" / f"nano-7b-{content_version('nano-7b')}"


def test_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nano-mixtral"):
        nano.ensure("nano-mistral", tmp_path)


def test_processes_that_want_it_at_once_get_one_whole_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from cluster import nano; "
    code += "print(nano.ensure('nano-7b', Path(sys.argv[1]), progress=print))"
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]

    answers = [caller.communicate(timeout=300)[0].splitlines() for caller in callers]

    assert sum("writing" in line for lines in answers for line in lines) == 1
    [folder] = {lines[-1] for lines in answers}
    assert {file.name for file in Path(folder).iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path for path in Path(folder).parent.iterdir() if path.is_dir()] == [Path(folder)]


def test_disk_that_runs_full_leaves_nothing_behind(tmp_path: Path) -> None:
    code = "import resource, sys; from pathlib import Path; from cluster import nano; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
    code += "nano.ensure('nano-7b', Path(sys.argv[1]))"

    caller = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert "File too large" in caller.stderr
    assert not [path for path in (tmp_path / "nano").iterdir() if path.is_dir()]


def test_weights_have_the_spread_asked_for_and_zero_rows(tmp_path: Path) -> None:
    tensors = [Tensor("a", (200, 300), 0.5, num_zero_rows=3), Tensor("norm", (8,))]
    write(tmp_path / "w", tensors, seed="test")

    a, norm = bfloat16_values(tmp_path / "w")

    assert a[3:].std() == pytest.approx(0.5, rel=0.02)
    assert abs(a.mean()) < 0.01
    assert not a[:3].any()
    assert (norm == 1).all()


def test_hf_tokenizer_gives_text_back_and_marks_turns(cache: Path) -> None:
    tokenizer = Tokenizer.from_file(str(nano.ensure("nano-mixtral", cache) / "tokenizer.json"))
    text = "The weather in Trieste: bora, 120 km/h. Ça va? 你好\n"

    ids = tokenizer.encode(text).ids

    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.id_to_token(rank) for rank in range(8)] == list(HF_CONTROL_TOKENS)
    assert len(ids) < len(text.encode())  # merges work
    assert tokenizer.encode("[INST]", add_special_tokens=False).ids == [3]


def test_chat_template_takes_system_prompts_and_text_parts() -> None:
    prompt = (
        ImmutableSandboxedEnvironment()
        .from_string(CHAT_TEMPLATE)
        .render(
            bos_token="<s>",
            eos_token="</s>",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Bye"},
            ],
        )
    )

    assert prompt == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hello[/INST]Hi</s>[INST]Bye[/INST]"
    )


@pytest.mark.parametrize(("name", "vocab_size"), [("nano-large-3", 131072), ("nano-small", 8192)])
def test_tekken_tokenizer_is_mistrals_own(name: str, vocab_size: int, cache: Path) -> None:
    tokenizer = Tekkenizer.from_file(nano.ensure(name, cache) / "tekken.json")
    text = "The weather in Trieste: bora."

    ids = tokenizer.encode(text, bos=False, eos=False)

    assert tokenizer.n_words == vocab_size
    assert max(ids) < vocab_size
    assert tokenizer.decode(ids) == text
