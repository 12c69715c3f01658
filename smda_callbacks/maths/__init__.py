"""The algebra: numpy arrays in, numpy arrays out; no model, no file, no network.

``ridge``, ``sparse``, ``quality`` and ``formula`` fit a policy and say how far it may be believed; the other
modules split its change between snapshots. Import what you need from the module that has it
(``from smda_callbacks.maths.ridge import fit_ridge``): the package itself loads nothing but numpy.
"""
