"""Every claim measured by one command: stages that write JSON, and a report that is composed of nothing else."""
