"""The demo's data, networks and training: everything from scikit-learn's digits to a pruned network.

Importing a module of this package needs torch; `etp_deploy.demo.data` alone does not.
"""
