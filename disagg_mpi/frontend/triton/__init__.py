"""A Triton model repository, as the guide for disaggregated serving lays it out, read as a job to serve.

One call at the start of ``serve``, :func:`~disagg_mpi.frontend.triton.plan.plan_of`; it reads files and
starts nothing. What it returns never changes. Every rank calls it with the same folder, as every rank reads
the same ``--config``, so that nothing of it is sent.

==============  ===============================================================================
``plan``        repository → :class:`~disagg_mpi.frontend.triton.plan.ServePlan` (start here)
``repository``  folders → their config.pbtxt
``pbtxt``       one config.pbtxt, filled in or still a template → message
``parameters``  a model's parameters as values, and which of them nobody asked for
``wiring``      which model does what: ensemble → BLS → context and generation
``tensors``     the ensemble's names of tensors → ours
``placement``   participant ids, device ids and copies → instances
``location``    gpt_model_path and tokenizer_dir → the model to load
==============  ===============================================================================

``tritonclient`` and protobuf (extra ``serve``) are imported by ``pbtxt`` alone, when a file is read.
"""
