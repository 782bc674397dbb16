"""Rank 0: the request table, admission, routing, and the API that users hold.

``table`` is what is known of requests and instances, ``router`` picks instances, ``dispatcher`` is the
life of a request (all three pure); ``handle`` and ``orchestrator`` are the API over a pump thread.
"""
