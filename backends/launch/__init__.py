"""Job files: training under Slurm or Kubernetes."""
