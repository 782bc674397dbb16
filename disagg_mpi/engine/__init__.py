"""One rank's engine: schedule → forward → sample → progress transfers.

``block_manager``, ``sequence`` and ``scheduler`` are pure; torch is imported by ``runner``,
``attention``, ``weights`` and ``sampler`` only.
"""
