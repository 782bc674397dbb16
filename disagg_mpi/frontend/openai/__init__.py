"""The OpenAI API of one job.

``routes`` puts it together: ``calls`` says what a client may send, ``sampling`` what that means for the
engine, ``completions`` and ``chat`` answer it with ``replies``; ``answering`` follows a request to its end,
or to its client's.
"""
