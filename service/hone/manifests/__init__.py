"""Kubernetes objects of an attempt, from its Run, its Plan and the platform's Cluster. One renderer for the service,
the command line and people with kubectl.

Pure: no network, no clock, no chance; the same arguments give the same objects.

    job = render_job(run, plan, cluster, managed=True)
    print(to_yaml([job]))
"""

from hone.manifests.job import applied_run, job_name, render_job
from hone.manifests.refusals import refuse
from hone.manifests.tenant import render_tenant
from hone.manifests.text import to_yaml

__all__ = ["applied_run", "job_name", "refuse", "render_job", "render_tenant", "to_yaml"]
