"""What one short run on a card measures: `make gpu`, or on a machine without this project's environment `run.sh`."""
