"""Every context instance hands prompts to every generation instance, led by hand through the executor API.

    mpirun -n N python pairs.py JOBS.json ANSWERS.json

JOBS is a list of ``{"config", "prompts", "max_tokens"}``, one after the other in the same N ranks, because
starting these costs most. ANSWERS has for each a list of ``{"context", "generation", "prompt", "token_ids",
"way", "bytes"}``: instances by their index. Each leader's books must be in order and empty at its end.
"""

import json
import sys
import time
from pathlib import Path

import msgspec

import disagg_mpi as dm
from disagg_mpi.executor.base import Executor
from disagg_mpi.job import plan
from disagg_mpi.job.launch import start_mpi
from disagg_mpi.topology import build_topology

# What a rank with a tiny model needs; the plan counts the activations of a real one.
plan.RUNTIME_BYTES = 250 * 2**20

_OFFERED, _ANSWERED = 1, 2


def compute(executor: Executor, context: int, generations: list[int], prompts: list[list[int]],
            sampling: dm.SamplingParams) -> None:
    """A context leader's part: each prompt once for each generation leader (its world rank)."""
    wanted = {}
    for place, leader in enumerate(generations):
        for number, prompt in enumerate(prompts):
            request_id = ((context * len(generations) + place) * len(prompts) + number) + 1
            wanted[request_id] = (leader, {"context": context, "generation": place, "prompt": number})
            executor.enqueue_request(dm.ExecutorRequest(
                request_id=request_id, prompt_token_ids=prompt, sampling=sampling,
                type=dm.RequestType.CONTEXT_ONLY))
    while wanted:
        for response in executor.await_responses():
            assert response.error is None and response.is_final, response
            leader, what = wanted.pop(response.request_id)
            comm.send((what, response.context_phase_params), dest=leader, tag=_OFFERED)


def generate(executor: Executor, num_requests: int, prompts: list[list[int]],
             sampling: dm.SamplingParams) -> None:
    """A generation leader's part: pull what is offered, from any context, and tell rank 0 the tokens."""
    answers: dict[int, dict] = {}
    num_open = num_requests
    while num_open:
        while comm.iprobe(tag=_OFFERED):
            what, params = comm.recv(tag=_OFFERED)
            answers[params.req_id] = {**what, "token_ids": list(params.first_gen_tokens)}
            executor.enqueue_request(dm.ExecutorRequest(
                request_id=params.req_id, prompt_token_ids=prompts[what["prompt"]], sampling=sampling,
                type=dm.RequestType.GENERATION_ONLY, context_phase_params=params))
        for response in executor.await_responses(timeout=0.005):
            assert response.error is None, response
            answer = answers[response.request_id]
            answer["token_ids"] += response.token_ids
            if response.is_final:
                num_open -= 1
                answer |= {"way": response.timing.transport, "bytes": response.timing.handover_bytes}
    comm.send(list(answers.values()), dest=0, tag=_ANSWERED)


def run(config: dm.JobConfig, prompts: list[list[int]], max_tokens: int) -> list[dict]:
    """One job; its answers, at rank 0."""
    groups = build_topology(config).groups
    contexts = [group.leader for group in groups if group.role == "context"]
    generations = [group.leader for group in groups if group.role == "generation"]
    sampling = dm.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    answers: list[dict] = []
    with dm.launch_executors(config) as executor:
        if comm.rank == 0:
            for leader in generations:
                while not comm.iprobe(source=leader, tag=_ANSWERED):
                    time.sleep(0.01)  # a receive would keep a core busy meanwhile
                answers += comm.recv(source=leader, tag=_ANSWERED)
        elif comm.rank in contexts:
            compute(executor, contexts.index(comm.rank), generations, prompts, sampling)
        elif comm.rank in generations:
            generate(executor, len(contexts) * len(prompts), prompts, sampling)
        if executor is not None:
            executor.shutdown()
            problems = executor.check_integrity(idle=True)
            assert not problems, problems
    return answers


comm = start_mpi()
found = [run(msgspec.convert(job["config"], dm.JobConfig), job["prompts"], job["max_tokens"])
         for job in json.loads(Path(sys.argv[1]).read_text())]
if comm.rank == 0:
    Path(sys.argv[2]).write_text(json.dumps(found))
