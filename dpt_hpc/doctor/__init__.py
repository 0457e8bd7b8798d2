"""`dpt-hpc doctor`: what would go wrong with a job, found before it burns node-hours."""
