"""Stages as Kubernetes jobs.

`spec` describes a job independently of any operator, `render` makes its manifest, `validation` checks that, `submit`
runs it and `watch` follows it. `outputs` keeps a job's outputs until its submitter has them. `work_pool` makes the pods
of flows, which submit the jobs.
"""
