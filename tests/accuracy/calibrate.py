"""`make calibrate`: fit the performance model's constants and its errors, and write them down."""

from __future__ import annotations

import re
import sys
from dataclasses import astuple, fields
from pathlib import Path
from statistics import mean

import placement.fitted
from placement.fitted import Constants, Errors, LlamaConstants
from tests.accuracy.fitting import fit
from tests.accuracy.folds import folds
from tests.accuracy.latency import kept, read_runs
from tests.accuracy.llamacpp_speed import fit_llamacpp, llamacpp_error
from tests.accuracy.other_gpus import Speed, read_speeds

FITTED = Path(placement.fitted.__file__)
_HOPPER = ("H100", "H200")


def written(source: str, constants: Constants, known: Errors, unknown: Errors) -> str:
    """`source` of fitted.py with these values, to three digits."""
    names = [field.name for field in fields(Constants)]
    values = zip(names, astuple(constants), strict=True)
    lines = "".join(f"    {name}={_rounded(value)!r},\n" for name, value in values)
    source = re.sub(
        r"FITTED = Constants\(\n.*?\)\n",
        f"FITTED = Constants(\n{lines})\n",
        source,
        flags=re.DOTALL,
    )
    for name, errors in (("KNOWN", known), ("UNKNOWN", unknown)):
        values_of = f"tpot={errors.tpot:.2f}, ttft={errors.ttft:.2f}"
        source = re.sub(rf"(?m)^{name} = .*$", f"{name} = Errors({values_of})", source)
    return source


def llamacpp_written(source: str, constants: LlamaConstants) -> str:
    """`source` of fitted.py with llama.cpp's values."""
    share, layer_s = _rounded(constants.gpu_bandwidth), _rounded(constants.layer_s)
    values = f"LlamaConstants(gpu_bandwidth={share!r}, layer_s={layer_s!r})"
    source = re.sub(r"(?m)^LLAMACPP = .*$", f"LLAMACPP = {values}", source)
    error = f"LLAMACPP_ERROR = {llamacpp_error(constants):.2f}"
    return re.sub(r"(?m)^LLAMACPP_ERROR = [0-9.]+", error, source)


def known_errors() -> Errors:
    """Of the runs of each model, by constants fitted to the other models."""
    models = [score for score in folds() if score.name.startswith("model")]
    runs = sum(score.runs for score in models)
    return Errors(
        tpot=sum(score.tpot * score.runs for score in models) / runs,
        ttft=sum(score.ttft * score.runs for score in models) / runs,
    )


def unknown_errors(constants: Constants) -> Errors:
    """Of the runs on generations that nothing was fitted to."""
    others = [each for each in read_speeds(constants) if not each.row.gpu.startswith(_HOPPER)]
    prompts = [each for each in others if each.quantity.startswith("prompt")]
    answers = [each for each in others if each not in prompts]
    return Errors(tpot=_error(answers), ttft=_error(prompts))


def _error(speeds: list[Speed]) -> float:
    return mean(abs(each.error) for each in speeds)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    constants = fit(kept(read_runs()))
    source = FITTED.read_text(encoding="utf-8")
    text = written(source, constants, known_errors(), unknown_errors(constants))
    text = llamacpp_written(text, fit_llamacpp())
    FITTED.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
