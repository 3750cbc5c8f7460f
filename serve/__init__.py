"""The Ray Serve application: run from a checkout, by `oppu serve CONFIG` or `serve deploy serve/config.yaml`."""
