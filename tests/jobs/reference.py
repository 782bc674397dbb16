"""What transformers' own ``generate`` answers to 50 prompts: the truth that every layout is held against.

Computed once a machine and kept in the cache folder, under a name that says with what it was computed.
Each token comes with the gap between the two largest logits it was chosen from: where that is under
``NEAR_TIE`` another order of additions may rightly choose the other token.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

MAX_TOKENS = 32
NEAR_TIE = 1e-3

_OPENINGS = [
    "Machine learning is", "The capital of France is", "Once upon a time", "def fibonacci(n):",
    "The three laws of thermodynamics are", "To bake bread you need", "Dear Sir or Madam,",
    "In 1969, humans first", "Photosynthesis is the process by which", "The quick brown fox",
    "Water boils at", "An MPI communicator is", "Q: What is 12 times 12?\nA:", "List of planets:\n1.",
    "The opposite of hot is", "SELECT name FROM users WHERE", "Roses are red,", "E = mc^2 means that",
    "The stock market", "My favourite colour is", "import numpy as np\n", "Breaking news:",
    "The sea was calm and", "Übung macht den", "数学は", "A list of prime numbers: 2, 3, 5,", "x",
]
_SENTENCES = [
    "The river bends twice before it reaches the mill, and in spring it floods the lower field. ",
    "Nobody in the village remembers who planted the oak, though everyone has an opinion. ",
    "A compiler translates a program in one language into an equivalent program in another. ",
    "In 1843 the surveyors counted 217 houses, 3 churches and a single, very old inn. ",
    "Water expands when it freezes, which is why pipes burst in cold winters. ",
    "The committee met on Tuesday; it adjourned without a vote, as it had the week before. ",
    "Light takes about eight minutes and twenty seconds to travel from the Sun to the Earth. ",
    "She kept the letters in a tin box: forty of them, tied with a faded blue ribbon. ",
    "for i in range(10):\n    print(i, i ** 2)\n",
    "Prices rose by 4.2 percent in March, fell by 1.1 percent in April, and then stood still. ",
    "The recipe asks for two eggs, a cup of flour, a pinch of salt and some patience. ",
    "Every message has a sender, a receiver, a tag and a communicator it belongs to. ",
]
# Words of the long prompts: within a chunk of 512 tokens, beyond one, beyond two, and many blocks.
_LENGTHS = [40, 60, 80, 100, 120, 150, 180, 200, 220, 250, 280, 300, 320, 340, 360, 380, 400, 420, 450,
            480, 520, 620, 900]


def prompts() -> list[str]:
    """27 short prompts and 23 long ones (up to about 1,300 tokens), always the same."""
    chooser = random.Random(20240613)
    long = []
    for length in _LENGTHS:
        text = ""
        while len(text.split()) < length:
            text += chooser.choice(_SENTENCES)
        long.append(text.rstrip())
    return [*_OPENINGS, *long]


def reference(model: Path) -> list[dict[str, list[float]]]:
    """For each prompt ``{"token_ids", "gaps"}``, greedy in fp32."""
    import torch
    import transformers

    from disagg_mpi.model.cache import cache_dir

    key = json.dumps([prompts(), MAX_TOKENS, str(model), torch.__version__, transformers.__version__])
    file = cache_dir() / "test-reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        answers = _generate(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(answers))
        temporary.rename(file)
    return json.loads(file.read_text())


def _generate(path: Path) -> list[dict[str, list[float]]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=tokenizer.eos_token_id)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        top = [step[0].topk(2).values for step in output.logits]
        answers.append({"token_ids": tokens, "gaps": [float(t[0] - t[1]) for t in top]})
    return answers


def compare(
    name: str, found: list[list[int]], truth: list[dict[str, list[float]]], near_tie: float = NEAR_TIE
) -> tuple[list[str], list[str]]:
    """Wrong prompts, in words, and those that differ at a near-tie, which ends their comparison."""
    problems, near_ties = [], []
    assert len(found) == len(truth)
    for number, (tokens, answer) in enumerate(zip(found, truth, strict=True)):
        expected = answer["token_ids"]
        if tokens == expected:
            continue
        at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b),
                  min(len(tokens), len(expected)))
        gap = answer["gaps"][at] if at < len(answer["gaps"]) else float("inf")
        text = (f"{name}: prompt {number} differs at token {at}: {tokens[at:at + 3]} for "
                f"{expected[at:at + 3]}, gap of the reference's top two {gap:.2e}")
        if gap < near_tie:
            near_ties.append(text)
        else:
            problems.append(text)
    return problems, near_ties
