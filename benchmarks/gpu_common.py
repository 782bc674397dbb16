"""What the benchmarks on GPUs share: the model's shape, its floors, arrivals, verdicts. No torch."""

from __future__ import annotations

import csv
import ctypes
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
}
"""Llama-3-8B; of positions as many as are measured with."""

TINY: dict[str, Any] = {
    **LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 4096,
    "dtype": "float32",
}
"""The same family for smoke tests: its figures mean nothing."""

REFERENCE_BANDWIDTH = 3.0e12
"""Bytes a second of an H100's memory: a second floor beside the measured one, so that machines compare."""


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model directory that holds nothing but its shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- what a step must read and compute -----------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama family, in parameters."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        return cls(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
                   config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"],
                   config["vocab_size"], config["tie_word_embeddings"])

    @property
    def layer_matrices(self) -> int:
        """Parameters of all layers that every token is multiplied with."""
        attention = 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def output(self) -> int:
        """Of the output layer."""
        return self.hidden * self.vocab

    @property
    def norms(self) -> int:
        return (2 * self.num_layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All."""
        return self.layer_matrices + self.norms + self.output * (1 if self.is_tied else 2)

    def weight_bytes(self, item: int) -> int:
        """Read by any generation step: all but the table of embeddings, of which it takes a row a token."""
        return (self.layer_matrices + self.norms + self.output) * item

    def kv_bytes(self, item: int) -> int:
        """Of one position."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item

    def generation_bytes(self, kv_tokens: float, weight_item: int, kv_item: int) -> float:
        """What a step must read at least: weights once, and K and V of all positions that it attends to."""
        return self.weight_bytes(weight_item) + kv_tokens * self.kv_bytes(kv_item)

    def context_flops(self, chunks: Iterable[tuple[int, int]], num_rows: int) -> int:
        """Of a context step with ``chunks`` (start, length), whose logits are wanted at ``num_rows`` tokens.

        A token's attention is over itself and what is before it: two products of ``head_dim`` a head.
        """
        tokens, seen = 0, 0
        for start, length in chunks:
            tokens += length
            seen += length * start + length * (length + 1) // 2
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * seen
        return 2 * self.layer_matrices * tokens + 2 * self.output * num_rows + attention


def share(part: float, whole: float) -> str:
    """``87 %``."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else ""


# ---- distributions -------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share ``q`` of all does not exceed (nearest rank); NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def gaps_of(times: Sequence[float]) -> list[float]:
    """Between tokens that came at ``times``; those that came together have none between them."""
    return [after - before for before, after in itertools.pairwise(times)]


# ---- arrivals ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds after the first."""
    prompt: int
    output: int
    """In tokens."""


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times within ``seconds``, ``rate`` a second on average; the same for the same seed."""
    chooser = random.Random(seed)
    times: list[float] = []
    now = chooser.expovariate(rate) if rate > 0 else math.inf
    while now < seconds:
        times.append(now)
        now += chooser.expovariate(rate)
    return times


def read_trace(path: Path, count: int) -> list[Arrival]:
    """The first ``count`` requests of a trace, in order of arrival.

    Mooncake's form: a JSON object a line with ``timestamp`` in ms, ``input_length``, ``output_length``.
    Azure's: a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens. Raises ``ValueError`` with the
    line for anything else.
    """
    with path.open(newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            rows = _mooncake_rows(path, file)
        elif {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(first.strip().split(",")):
            rows = _azure_rows(path, file)
        else:
            raise ValueError(
                f"{path}:1: found {first.strip()[:60]!r}; needed JSON lines with timestamp, input_length and "
                "output_length, or a CSV with TIMESTAMP,ContextTokens,GeneratedTokens")
        found = []
        for row in rows:
            found.append(row)
            if len(found) == count:
                break
    found.sort(key=lambda row: row.at)
    return [Arrival(row.at - found[0].at, row.prompt, row.output) for row in found]


def _mooncake_rows(path: Path, file: Iterable[str]) -> Iterable[Arrival]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Arrival(row["timestamp"] / 1e3, max(1, row["input_length"]), max(1, row["output_length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {type(error).__name__}: {error}; needed an object with "
                             "timestamp, input_length and output_length") from None


def _azure_rows(path: Path, file: Iterable[str]) -> Iterable[Arrival]:
    for number, row in enumerate(csv.DictReader(file), 2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
            yield Arrival(at, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}; needed TIMESTAMP (2023-11-16 18:17:03.97), "
                             "ContextTokens, GeneratedTokens") from None


def fitted(trace: Sequence[Arrival], *, speed: float, max_prompt: int, max_output: int) -> list[Arrival]:
    """The trace ``speed`` times as fast, with lengths cut to what is measured with."""
    return [Arrival(row.at / speed, min(row.prompt, max_prompt), min(row.output, max_output))
            for row in trace]


# ---- what came of a load, and what it says -------------------------------------------------------


@dataclass
class Figures:
    """One layout under one load. Times in seconds; NaN: there is none."""

    layout: str
    load: str
    itl_p50: float = math.nan
    itl_p90: float = math.nan
    itl_p99: float = math.nan
    itl_max: float = math.nan
    ttft_p50: float = math.nan
    ttft_p99: float = math.nan
    tokens_per_second: float = math.nan
    """Output tokens, of all requests."""
    prompt_tokens_per_second: float = math.nan
    """Of prompts that got their first token."""
    quiet_itl_p50: float = math.nan
    """Before the first prompt came."""
    num_prompts: int = 0
    num_late: int = 0
    """Prompts without a first token when the load was over; their wait until then counts as their TTFT."""
    num_failed: int = 0
    attainment: float = math.nan
    """Share of requests within both limits."""

    def json(self) -> dict[str, Any]:
        return {key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Figures:
        return cls(**{key: math.nan if value is None else value for key, value in row.items()})


# Differences smaller than this are noise between two runs of a minute.
_MARGIN = 1.05
_POINTS = 0.02


def verdict_of(baseline: Figures, split: Figures) -> str:
    """Whether disaggregation (``split``) pays against ``baseline``, under the same load, and for what."""
    head = f"{split.layout} against {baseline.layout}, {split.load}: "
    for each in (split, baseline):
        if each.num_failed:
            return head + f"no verdict: {each.num_failed} requests of {each.layout} failed"
    if math.isnan(baseline.itl_p99) or math.isnan(split.itl_p99):
        return head + "no verdict: no time between tokens was measured on both sides"
    # How many times better the split is; below 1: worse.
    better = {
        "ITL P99": _ratio(baseline.itl_p99, split.itl_p99),
        "TTFT P50": _ratio(baseline.ttft_p50, split.ttft_p50),
        "output tokens/s": _ratio(split.tokens_per_second, baseline.tokens_per_second),
    }
    known = {name: value for name, value in better.items() if not math.isnan(value)}
    wins = [name for name, value in known.items() if value >= _MARGIN]
    losses = [name for name, value in known.items() if value <= 1 / _MARGIN]
    figures = "; ".join(f"{name} {_in_words(name, value)}" for name, value in known.items())
    if not (math.isnan(split.attainment) or math.isnan(baseline.attainment)):
        figures += f"; within both limits {split.attainment:.0%} against {baseline.attainment:.0%}"
        if abs(split.attainment - baseline.attainment) >= _POINTS:
            (wins if split.attainment > baseline.attainment else losses).append("requests within both limits")
    late = split.num_late - baseline.num_late
    if late > 0:
        losses.append("prompts in time")
        figures += f"; {late} more prompts without a first token at the end"
    if not wins:
        return f"{head}{figures}: does not pay"
    if not losses:
        return f"{head}{figures}: pays"
    if "ITL P99" not in wins:
        return f"{head}{figures}: does not pay for a steady time between tokens; better only in " + \
            " and ".join(wins)
    return f"{head}{figures}: pays where a steady time between tokens is worth the loss in " + \
        " and ".join(losses)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _in_words(name: str, better: float) -> str:
    if "tokens/s" in name:
        return f"{better:.2f}x"
    if 1 / _MARGIN < better < _MARGIN:
        return "the same"
    return f"{better:.1f}x lower" if better > 1 else f"{1 / better:.1f}x higher"


# ---- the machine ---------------------------------------------------------------------------------


def gpu_in_words() -> str:
    """Name, memory and driver of the GPUs, as nvidia-smi has them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi here"
    try:
        done = subprocess.run(
            [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            text=True, capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return "; ".join(done.stdout.strip().splitlines()) or done.stderr.strip()


def find_gpus() -> int:
    """How many CUDA devices the driver shows; asked without torch, which may not be there."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def need_gpus(count: int = 1) -> None:
    """End with code 2 where there are fewer."""
    found = find_gpus()
    if found >= count:
        return
    print(f"found {f'{found} CUDA devices' if found else 'no CUDA device'} here (by libcuda.so.1); needed: "
          f"{count} or more, of NVIDIA, with its driver, not hidden by CUDA_VISIBLE_DEVICES; for a smoke "
          "test without one type: python benchmarks/gpu_engine.py --device emulated --tiny", file=sys.stderr)
    sys.exit(2)


def end_in_order() -> None:
    """A SIGTERM is an exit like others: what was started is ended with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Results:
    """Figures that are on disk as soon as they are measured."""

    def __init__(self, path: Path | None, **about: Any) -> None:
        self.data: dict[str, Any] = {**about, "command": sys.argv}
        self._path = path
        self._write()

    def add(self, section: str, row: Any) -> None:
        self.data.setdefault(section, []).append(row)
        self._write()

    def set(self, section: str, value: Any) -> None:
        self.data[section] = value
        self._write()

    def take(self, path: Path) -> None:
        """What a part that ran by itself has written, whole or not."""
        if path.exists():
            part = json.loads(path.read_text())
            for section, value in part.items():
                if section in ("command", "machine"):
                    continue
                if isinstance(value, list):
                    self.data.setdefault(section, []).extend(value)
                else:
                    self.data[section] = value
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            temporary = self._path.with_name(self._path.name + ".part")
            temporary.write_text(json.dumps(self.data, indent=1) + "\n")
            temporary.replace(self._path)
