"""The report as a job: `python -m jobs.report runs/paper`, the same as `oppu report`."""

import sys

from oppu_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("report"))
