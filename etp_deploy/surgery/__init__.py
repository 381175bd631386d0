"""Exact removal of dead channels, heads and neurons from an ONNX graph.

The stages, each a module of its own: `prepare` (model -> model with known shapes), `rules` (node ->
statements), `analysis` (statements -> constants and keep masks, a fixpoint), `plan` (what goes, what stays and
why), `rewrite` (plan -> model, the only module that writes graphs).
"""
