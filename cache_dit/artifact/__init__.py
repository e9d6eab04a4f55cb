"""Artifacts: a cached model compiled ahead of time, in one ``.pt2`` file that runs without the model's code.

==============  =====================================================================================
file            what it does
==============  =====================================================================================
sizes           sizes and guards over symbols as plain data, and their evaluation
manifest        what an artifact says of itself, as JSON
export          model -> passes -> two programs -> package
load            package -> a module that runs with the usual runtime
==============  =====================================================================================
"""
