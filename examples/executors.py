"""The executor API by hand: no orchestrator, the script leads the two phases itself.

    python -m disagg_mpi launch -n 3 -- examples/executors.py

Rank 1 leads the context instance, rank 2 the generation instance; rank 0 only asks and prints. What
passes between the two leaders is the small ``context_phase_params``; the KV-cache goes its own way.
"""

import disagg_mpi as dm

with dm.launch_executors(dm.JobConfig(context=1, generation=1)) as executor:
    from mpi4py import MPI  # after the launch, which sets what MPI reads at its start

    comm = MPI.COMM_WORLD
    if comm.rank == 0:
        prompt = [29968, 1380, 314]  # "Machine learning is"
        comm.send(prompt, dest=1)
        print("tokens:", comm.recv(source=2))
    elif comm.rank == 1:
        request = dm.ExecutorRequest(
            request_id=1, prompt_token_ids=comm.recv(source=0), type=dm.RequestType.CONTEXT_ONLY,
            sampling=dm.SamplingParams(max_tokens=16))
        executor.enqueue_request(request)
        (response,) = executor.await_responses()
        comm.send((request, response.context_phase_params), dest=2)
        # At the end of the with block the executor waits until its blocks have been pulled.
    else:
        request, params = comm.recv(source=1)
        executor.enqueue_request(dm.ExecutorRequest(
            request_id=1, prompt_token_ids=request.prompt_token_ids, sampling=request.sampling,
            type=dm.RequestType.GENERATION_ONLY, context_phase_params=params))
        tokens = list(params.first_gen_tokens)
        while True:
            for response in executor.await_responses():
                tokens += response.token_ids
            if response.is_final:
                break
        comm.send(tokens, dest=0)
