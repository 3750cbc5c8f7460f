"""The `prepare` stage as a job: `ray job submit --working-dir . -- python -m jobs.prepare demo`."""

import sys

from oppu_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("prepare"))
