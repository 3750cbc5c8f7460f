"""The whole line as a job: `ray job submit --working-dir . -- python -m jobs.run demo`."""

import sys

from oppu_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("run"))
