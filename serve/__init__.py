"""The Ray Serve application: started by `oppu serve CONFIG` or `serve deploy serve/config.yaml`."""
