"""What `flame doctor` looks at: this machine, its GPUs, the links between ranks, and what a recipe needs."""
