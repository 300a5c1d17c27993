"""Fine-tuning: losses, what trains, and how it is planned."""
