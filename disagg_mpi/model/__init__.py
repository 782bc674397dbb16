"""Models on disk: finding one, converting one, describing one, and its tokenizer.

Nothing here imports torch, and transformers only where a model has no ``tokenizer.json``: rank 0
resolves the model and runs the tokenizer, and rank 0 holds no tensors.

======================  =======================================================================
``resolve``             what the user typed -> a checked directory (start here)
``fetch``               the default model: download once, convert once
``gguf_convert``        a Llama GGUF -> a directory that transformers reads
``gguf_tokenizer``      the tokenizer inside a GGUF -> ``tokenizer.json``
``gguf_file``           the GGUF container itself
``checkpoint``          is this directory complete?  ``ModelSpec``: what kind of model is it?
``safetensors_file``    headers read, files written one tensor at a time
``cache``               where converted models live, and how one appears there atomically
``tokenizer``           text <-> ids, chat messages -> ids
``chat_template``       chat messages -> text
``detokenizer``         ids -> text while they arrive
======================  =======================================================================
"""
