"""Our kernels inside other people's models; nothing here is imported before it is asked for.

* ``transformers``: ``attn_implementation="exafuse"`` for any transformers model.
* ``patching``: ``exafuse.patch(model)`` for the families whose layers we know.
"""
