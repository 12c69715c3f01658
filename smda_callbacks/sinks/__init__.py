"""Where a run's records go: memory, a folder on disk, a tracker.

Every sink follows the protocol of :mod:`smda_callbacks.sinks.base` and is final: none builds on another. The store
(:mod:`smda_callbacks.sinks.store`, read back by :mod:`smda_callbacks.sinks.store_reader`) is the truth; whatever else
receives the records is a view of it. Import what you need from the module that has it: the package itself loads
nothing.
"""
